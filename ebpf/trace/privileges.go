package trace

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// DropPrivileges gives up, for all threads and for good, what a process with open Tracers no longer needs: that is every capability, also those
// that a program started later could draw on, since maps and links are descriptors and the kernel asks for nothing to use them. Before Linux 5.19
// it did where unprivileged BPF is off: there CAP_BPF, or CAP_SYS_ADMIN before 5.8, stays. The user stays: a root without capabilities still owns
// root's files. A file to record to can be opened before or after, the next Tracer only before.
//
// It fails in a binary that is linked with cgo, whose threads Go cannot reach.
func DropPrivileges() error {
	keep := uint64(0)
	switch major, minor := version(release()); {
	case major < 5 || major == 5 && minor < 8:
		keep = 1 << unix.CAP_SYS_ADMIN
	case major == 5 && minor < 19:
		keep = 1 << unix.CAP_BPF
	}
	if err := prctlAll(unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		if errors.Is(err, syscall.ENOTSUP) {
			return errors.New("drop privileges: the binary is linked with cgo: build it with CGO_ENABLED=0 and without -race")
		}
		return fmt.Errorf("no_new_privs: %w", err)
	}
	for c := uintptr(0); ; c++ {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // past the last that this kernel has
		}
		if err != nil {
			return fmt.Errorf("capability bounding set: %w", err)
		}
		if in == 0 || keep>>c&1 == 1 {
			continue
		}
		if err := prctlAll(unix.PR_CAPBSET_DROP, c, 0); errors.Is(err, unix.EPERM) {
			break // no CAP_SETPCAP; no_new_privs keeps exec from drawing on the set
		} else if err != nil {
			return fmt.Errorf("capability bounding set: %w", err)
		}
	}
	if err := prctlAll(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil {
		return fmt.Errorf("ambient capabilities: %w", err)
	}
	have, err := effective()
	if err != nil {
		return err
	}
	if err := capsetAll(have & keep); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

func prctlAll(option, arg2, arg3 uintptr) error {
	if _, _, no := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, arg2, arg3, 0, 0, 0); no != 0 {
		return no
	}
	return nil
}

// version returns the first two numbers of a kernel's release; zeros if there are none.
func version(release string) (major, minor int) {
	first, rest, _ := strings.Cut(release, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err := strconv.Atoi(first)
	if err != nil {
		return 0, 0
	}
	minor, err = strconv.Atoi(rest[:end])
	if err != nil {
		return major, 0
	}
	return major, minor
}

// unprivileged returns kernel.unprivileged_bpf_disabled: 0, 1 or 2; -1 where it cannot be read.
func unprivileged() int {
	b, err := os.ReadFile("/proc/sys/kernel/unprivileged_bpf_disabled")
	if err != nil {
		return -1
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return -1
	}
	return n
}
