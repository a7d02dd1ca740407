package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// nsKinds are the namespaces that Reexec makes, by their names in /proc/self/ns.
//
// The second process is number 1 of its PID namespace. /proc stays the first one's until Enter takes it away with all other files: /proc/self
// leads to the second process there, too, and all numbers in it are those of the first one's namespace. A fresh /proc would be refused
// wherever something is mounted over a part of the old one, as in most containers.
var nsKinds = []string{"user", "mnt", "net", "ipc", "uts", "pid"}

const nsFlags = unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// nsSet maps a name in /proc/self/ns to the identity of the namespace, "mnt:[4026531841]".
type nsSet map[string]string

func readNamespaces() (nsSet, error) {
	set := nsSet{}
	for _, k := range nsKinds {
		id, err := os.Readlink("/proc/self/ns/" + k)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) && len(set) > 0 {
				continue // a kernel without this kind
			}
			return nil, &fault{"namespaces cannot be read", err, "mount /proc"}
		}
		set[k] = id
	}
	return set, nil
}

// String is the form in which the first process hands its namespaces to the second: "user=user:[1] mnt=mnt:[2]".
func (s nsSet) String() string {
	var parts []string
	for _, k := range nsKinds {
		if id, ok := s[k]; ok {
			parts = append(parts, k+"="+id)
		}
	}
	return strings.Join(parts, " ")
}

func parseNSSet(v string) nsSet {
	set := nsSet{}
	for f := range strings.FieldsSeq(v) {
		if k, id, ok := strings.Cut(f, "="); ok {
			set[k] = id
		}
	}
	return set
}

// attempt is one way to ask the kernel for namespaces.
type attempt struct {
	what string
	attr syscall.SysProcAttr
}

// attempts lists what to try, best first. Each names what the kernel refused if it fails.
func attempts(keepUser bool) []attempt {
	var out []attempt
	root := os.Geteuid() == 0
	if !keepUser {
		if root {
			// All ids, not only 0: with less the new root could not open files of other users.
			uids, uerr := readIDMap("/proc/self/uid_map")
			gids, gerr := readIDMap("/proc/self/gid_map")
			if uerr == nil && gerr == nil {
				out = append(out, attempt{"a user namespace with all ids", syscall.SysProcAttr{
					Cloneflags: unix.CLONE_NEWUSER | nsFlags, UidMappings: uids, GidMappings: gids, GidMappingsEnableSetgroups: true,
				}})
			}
		}
		out = append(out, attempt{"a user namespace", syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | nsFlags,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
			// An ordinary user's capabilities in the new namespace are lost by exec unless they are ambient. These three are what Enter
			// needs: mount and pivot_root, chroot on an initramfs, and emptying the bounding set.
			AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_SETPCAP},
		}})
	}
	if root {
		out = append(out, attempt{"new namespaces to root", syscall.SysProcAttr{Cloneflags: nsFlags}})
	}
	// Each first with a PID namespace, which may be refused by itself: sysctl user.max_pid_namespaces, 32 levels at most.
	var all []attempt
	for _, a := range out {
		a.attr.Pdeathsig = syscall.SIGKILL
		without := a
		a.attr.Cloneflags |= unix.CLONE_NEWPID
		all = append(all, a, without)
	}
	return all
}

// readIDMap turns /proc/self/uid_map into the identity map of every id that this process knows; user_namespaces(7).
func readIDMap(path string) ([]syscall.SysProcIDMap, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseIDMap(b)
}

func parseIDMap(b []byte) ([]syscall.SysProcIDMap, error) {
	var out []syscall.SysProcIDMap
	for line := range bytes.Lines(b) {
		var inside, outside, n int
		if _, err := fmt.Sscan(string(line), &inside, &outside, &n); err != nil || inside < 0 || n <= 0 {
			return nil, fmt.Errorf("id map line %q", strings.TrimSpace(string(line)))
		}
		out = append(out, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: n})
	}
	if len(out) == 0 {
		return nil, errors.New("id map is empty")
	}
	return out, nil
}

// userNSRemedy says what stands against a user namespace here, as far as the kernel tells.
func userNSRemedy(err error) string {
	switch {
	case sysctlIs("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", 1):
		return "give the program an AppArmor profile with \"userns,\" or set sysctl kernel.apparmor_restrict_unprivileged_userns=0"
	case sysctlIs("/proc/sys/kernel/unprivileged_userns_clone", 0):
		return "set sysctl kernel.unprivileged_userns_clone=1"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return "raise sysctl user.max_user_namespaces and the other user.max_*_namespaces"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return "the kernel needs CONFIG_USER_NS, CONFIG_NET_NS, CONFIG_IPC_NS, CONFIG_UTS_NS and CONFIG_PID_NS"
	}
	return "let the container or service manager allow user namespaces, or run as root"
}

func sysctlIs(path string, want int) bool {
	b, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	return err == nil && n == want
}
