package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// cgoRemedy belongs to everything that needs a system call on each thread.
const cgoRemedy = "build with CGO_ENABLED=0 and without -race"

// linkedWithCgo says whether the binary has threads that the Go runtime cannot reach. The build tag would say only that cgo was possible.
func linkedWithCgo() bool {
	_, _, no := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0)
	return no == syscall.ENOTSUP
}

// setNoNewPrivs sets it on every thread, or with cgo on this one: seccomp and Landlock copy it to the others with TSYNC.
func setNoNewPrivs(cgo bool) error {
	if cgo {
		return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return allThreadsPrctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0)
}

func allThreadsPrctl(option, arg2, arg3 uintptr) error {
	if _, _, no := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, arg2, arg3, 0, 0, 0); no != 0 {
		return no
	}
	return nil
}

// dropCapabilities empties all five sets on every thread. An ordinary user without namespaces may not touch the bounding set; that is not an
// error, since no_new_privs keeps exec from drawing on it.
func dropCapabilities(cgo bool) error {
	if cgo {
		return &fault{"the binary is linked with cgo", nil, cgoRemedy}
	}
	for c := uintptr(0); ; c++ {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // past the last capability of this kernel
		}
		if err != nil {
			return fmt.Errorf("read the capability bounding set: %w", err)
		}
		if in == 0 {
			continue
		}
		if err := allThreadsPrctl(unix.PR_CAPBSET_DROP, c, 0); errors.Is(err, unix.EPERM) {
			break
		} else if err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	if err := allThreadsPrctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	if err := allThreadsCapsetNone(); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// landlockRules is what a Landlock ABI can forbid; everything it can is handled and nothing is allowed.
// Documentation/userspace-api/landlock.rst, "Previous limitations".
func landlockRules(abi int, signalsFixed bool) (attr unix.LandlockRulesetAttr, what string) {
	fsBits := 13
	what = "files"
	for _, from := range []int{2 /* refer */, 3 /* truncate */, 5 /* ioctl on devices */, 9 /* unix sockets by path */} {
		if abi >= from {
			fsBits++
		}
	}
	attr.Handled_access_fs = 1<<fsBits - 1
	if abi >= 4 {
		attr.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		what += ", TCP"
	}
	if abi >= 10 {
		attr.Handled_access_net |= unix.LANDLOCK_ACCESS_NET_BIND_UDP | unix.LANDLOCK_ACCESS_NET_CONNECT_SEND_UDP
		what += ", UDP"
	}
	if abi >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		what += ", abstract sockets"
		// Before erratum 2 was fixed, threads with domains of their own could not signal each other, and the runtime preempts by signals.
		if signalsFixed {
			attr.Scoped |= unix.LANDLOCK_SCOPE_SIGNAL
			what += ", signals"
		}
	}
	return attr, what
}

// erratumSignals is bit 1: "Scoped signal handling (ABI: 6)".
const erratumSignals = 1 << 1

// enterLandlock puts every thread into a Landlock domain that allows nothing. no_new_privs must be set.
//
// The system calls are made here and not by a library because there are no rules to build, only "nothing", and because the ABI in force and
// what it covers must be known for the report.
func enterLandlock(cgo bool) (detail string, err error) {
	abi, err := landlockQuery(unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errors.Is(err, unix.ENOSYS):
		return "", &fault{"this kernel has no Landlock", nil, "Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK"}
	case errors.Is(err, unix.EOPNOTSUPP):
		return "", &fault{"Landlock is switched off", nil, "add landlock to the lsm= boot parameter"}
	case err != nil:
		return "", fmt.Errorf("landlock_create_ruleset: %w", err)
	}
	errata, err := landlockQuery(unix.LANDLOCK_CREATE_RULESET_ERRATA)
	if err != nil {
		errata = 0 // a kernel from before errata were listed has not fixed them
	}
	attr, what := landlockRules(abi, errata&erratumSignals != 0)
	fd, err := landlockCreate(&attr)
	if err != nil {
		return "", fmt.Errorf("landlock_create_ruleset: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()

	var no syscall.Errno
	switch {
	case !cgo:
		_, _, no = syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(fd), 0, 0)
	case abi >= 8:
		// TSYNC copies this thread's no_new_privs, so it must be this thread's.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := setNoNewPrivs(cgo); err != nil {
			return "", fmt.Errorf("no_new_privs: %w", err)
		}
		_, _, no = syscall.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(fd), unix.LANDLOCK_RESTRICT_SELF_TSYNC, 0)
	default:
		return "", &fault{fmt.Sprintf("the binary is linked with cgo and Landlock is ABI %d", abi), nil, cgoRemedy + ", or Linux 7.0"}
	}
	if no != 0 {
		return "", fmt.Errorf("landlock_restrict_self: %w", no)
	}
	// The root directory exists in every mount namespace and was readable until now.
	dir, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(dir)
		return "", errors.New("the root directory can still be opened")
	}
	if !errors.Is(err, unix.EACCES) {
		return "", fmt.Errorf("open / says %w, not that it is denied", err)
	}
	return fmt.Sprintf("ABI %d, nothing allowed (%s)", abi, what), nil
}
