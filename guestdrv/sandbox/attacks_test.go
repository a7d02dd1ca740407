package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// What attacks work on; open before Enter.
var (
	heldFile int    // a memfd that may not be mapped
	heldMap  int    // a memfd that may
	heldPair [2]int // a socket pair
	heldAnon []byte // anonymous memory
	hostPID  int    // the first process
)

func prepareAttacks() {
	heldFile = must(unix.MemfdCreate("file", unix.MFD_CLOEXEC))
	heldMap = must(unix.MemfdCreate("map", unix.MFD_CLOEXEC))
	_ = must(0, errors.Join(unix.Ftruncate(heldFile, 4096), unix.Ftruncate(heldMap, 4096)))
	heldPair = must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	heldAnon = must(unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE))
	// Of the first process, as the host's /proc has it: inside it has none.
	status := string(must(os.ReadFile("/proc/self/status")))
	_, after, _ := strings.Cut(status, "PPid:")
	hostPID = must(strconv.Atoi(strings.Fields(after)[0]))
}

// call makes a system call by number. Pointers are left 0: the filter decides before the kernel looks at them.
func call(nr uintptr, a ...uintptr) func() error {
	return func() error {
		var v [6]uintptr
		copy(v[:], a)
		r, _, no := syscall.RawSyscall6(nr, v[0], v[1], v[2], v[3], v[4], v[5])
		if no != 0 {
			return no
		}
		if r == 0 && (nr == unix.SYS_CLONE || nr == unix.SYS_CLONE3) {
			os.Exit(98) // the new process
		}
		return nil
	}
}

func fdErr(_ int, err error) error { return err }

func mapErr(_ []byte, err error) error { return err }

const neg1 = ^uintptr(0)

// attacks is what a program that was taken over would try.
func attacks() map[string]func() error {
	rw, rx := unix.PROT_READ|unix.PROT_WRITE, unix.PROT_READ|unix.PROT_EXEC
	file, shared := uintptr(heldFile), uintptr(unix.MAP_SHARED)
	m := map[string]func() error{
		"open":                 func() error { return fdErr(unix.Open("/etc/passwd", unix.O_RDONLY, 0)) },
		"openat2":              call(unix.SYS_OPENAT2, uintptr(heldPair[0])),
		"stat":                 func() error { return unix.Stat("/", &unix.Stat_t{}) },
		"readlink":             func() error { return fdErr(unix.Readlink("/proc/self/exe", make([]byte, 10))) },
		"mkdir":                func() error { return unix.Mkdir("/x", 0o700) },
		"unlink":               func() error { return unix.Unlink("/x") },
		"chdir":                func() error { return unix.Chdir("/") },
		"fchdir":               call(unix.SYS_FCHDIR, file),
		"ftruncate":            call(unix.SYS_FTRUNCATE, file),
		"fchmod":               call(unix.SYS_FCHMOD, file, 0o4755),
		"socket":               func() error { return fdErr(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)) },
		"socketpair":           call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM),
		"connect":              call(unix.SYS_CONNECT, uintptr(heldPair[0])),
		"accept4":              call(unix.SYS_ACCEPT4, uintptr(heldPair[0])),
		"setsockopt":           call(unix.SYS_SETSOCKOPT, uintptr(heldPair[0])),
		"ptrace attach":        func() error { return unix.PtraceAttach(hostPID) },
		"ptrace traceme":       call(unix.SYS_PTRACE, unix.PTRACE_TRACEME),
		"process_vm_writev":    call(unix.SYS_PROCESS_VM_WRITEV, uintptr(hostPID)),
		"execve":               func() error { return unix.Exec("/proc/self/exe", nil, nil) },
		"execveat":             call(unix.SYS_EXECVEAT, file),
		"clone process":        call(unix.SYS_CLONE, uintptr(unix.SIGCHLD)),
		"clone vfork":          call(unix.SYS_CLONE, uintptr(unix.CLONE_VFORK|unix.SIGCHLD)),
		"clone new user ns":    call(unix.SYS_CLONE, uintptr(unix.CLONE_NEWUSER|unix.SIGCHLD)),
		"clone untraced":       call(unix.SYS_CLONE, uintptr(threadFlags|unix.CLONE_UNTRACED)),
		"unshare":              call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER),
		"setns":                call(unix.SYS_SETNS, file),
		"memfd_create":         func() error { return fdErr(unix.MemfdCreate("x", 0)) },
		"memfd_secret":         call(unix.SYS_MEMFD_SECRET),
		"pipe2":                func() error { return unix.Pipe2(make([]int, 2), 0) },
		"eventfd2":             call(unix.SYS_EVENTFD2),
		"epoll_create1":        call(unix.SYS_EPOLL_CREATE1),
		"timerfd_create":       call(unix.SYS_TIMERFD_CREATE),
		"signalfd4":            call(unix.SYS_SIGNALFD4, neg1),
		"inotify_init1":        call(unix.SYS_INOTIFY_INIT1),
		"fanotify_init":        call(unix.SYS_FANOTIFY_INIT),
		"dup":                  call(unix.SYS_DUP, 0),
		"dup3":                 call(unix.SYS_DUP3, 0, 9),
		"fcntl dup":            call(unix.SYS_FCNTL, 0, unix.F_DUPFD),
		"fcntl owner":          call(unix.SYS_FCNTL, 0, unix.F_SETOWN, uintptr(hostPID)),
		"pidfd_open":           call(unix.SYS_PIDFD_OPEN, uintptr(hostPID)),
		"pidfd_getfd":          call(unix.SYS_PIDFD_GETFD, file),
		"kill parent":          call(unix.SYS_KILL, uintptr(hostPID), 0),
		"kill all":             call(unix.SYS_KILL, neg1, 0),
		"kill group":           call(unix.SYS_KILL, 0, 0),
		"tgkill parent":        call(unix.SYS_TGKILL, uintptr(hostPID), uintptr(hostPID), 0),
		"tkill":                call(unix.SYS_TKILL, uintptr(hostPID), 0),
		"rt_sigqueueinfo":      call(unix.SYS_RT_SIGQUEUEINFO, uintptr(hostPID)),
		"keyctl":               call(unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID),
		"add_key":              call(unix.SYS_ADD_KEY),
		"request_key":          call(unix.SYS_REQUEST_KEY),
		"mount":                func() error { return unix.Mount("none", "/", "tmpfs", 0, "") },
		"umount2":              func() error { return unix.Unmount("/", unix.MNT_DETACH) },
		"fsopen":               call(unix.SYS_FSOPEN),
		"open_tree":            call(unix.SYS_OPEN_TREE),
		"pivot_root":           func() error { return unix.PivotRoot("/", "/") },
		"chroot":               func() error { return unix.Chroot("/") },
		"bpf":                  call(unix.SYS_BPF),
		"io_uring_setup":       call(unix.SYS_IO_URING_SETUP, 8),
		"io_uring_enter":       call(unix.SYS_IO_URING_ENTER, file),
		"userfaultfd":          call(unix.SYS_USERFAULTFD),
		"perf_event_open":      call(unix.SYS_PERF_EVENT_OPEN),
		"init_module":          call(unix.SYS_INIT_MODULE),
		"finit_module":         call(unix.SYS_FINIT_MODULE, file),
		"reboot":               call(unix.SYS_REBOOT),
		"seccomp":              call(unix.SYS_SECCOMP, 0),
		"setuid":               call(unix.SYS_SETUID, 0),
		"setgroups":            call(unix.SYS_SETGROUPS),
		"capset":               call(unix.SYS_CAPSET),
		"prlimit64":            call(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE),
		"sched_setscheduler":   call(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_FIFO),
		"affinity of other":    call(unix.SYS_SCHED_SETAFFINITY, uintptr(hostPID)),
		"prctl dumpable":       call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1),
		"prctl name":           call(unix.SYS_PRCTL, unix.PR_SET_NAME),
		"prctl mm":             call(unix.SYS_PRCTL, unix.PR_SET_MM),
		"prctl upper half":     call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE|1<<32, 1),
		"ioctl type":           call(unix.SYS_IOCTL, 0, unix.TIOCSTI),
		"ioctl tty":            call(unix.SYS_IOCTL, 0, unix.TCSETS),
		"ioctl nonblock":       call(unix.SYS_IOCTL, 0, 0x5421),
		"futex requeue":        call(unix.SYS_FUTEX, 0, 3),
		"futex lock pi":        call(unix.SYS_FUTEX, 0, 6),
		"futex requeue pi":     call(unix.SYS_FUTEX, 0, 12|futexPrivate),
		"mmap exec":            func() error { return mapErr(unix.Mmap(-1, 0, 4096, rx, unix.MAP_ANON|unix.MAP_PRIVATE)) },
		"mmap file":            func() error { return mapErr(unix.Mmap(heldFile, 0, 4096, rw, unix.MAP_SHARED)) },
		"mmap file, full":      call(unix.SYS_MMAP, 0, 4096, unix.PROT_READ, shared, file|1<<32),
		"mmap allowed exec":    func() error { return mapErr(unix.Mmap(heldMap, 0, 4096, rx, unix.MAP_SHARED)) },
		"mmap allowed private": func() error { return mapErr(unix.Mmap(heldMap, 0, 4096, rw, unix.MAP_PRIVATE)) },
		"mmap anonymous low":   call(unix.SYS_MMAP, 0, 4096, uintptr(rw), uintptr(unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_LOCKED), neg1),
		"mprotect exec":        func() error { return unix.Mprotect(heldAnon, rx) },
		"mprotect write":       func() error { return unix.Mprotect(heldAnon, rw) },
		"pkey_mprotect":        call(unix.SYS_PKEY_MPROTECT, 0, 4096, uintptr(rx)),
		"mremap":               call(unix.SYS_MREMAP, 0, 0, 4096),
		"remap_file_pages":     call(unix.SYS_REMAP_FILE_PAGES),
		"madvise remove":       func() error { return unix.Madvise(heldAnon, unix.MADV_REMOVE) },
		"personality":          call(unix.SYS_PERSONALITY, 0x0040000),
		"shmget":               call(unix.SYS_SHMGET, 0, 4096, 0o1777),
		"mq_open":              call(unix.SYS_MQ_OPEN),
		"timer_create":         call(unix.SYS_TIMER_CREATE),
		"getdents64":           call(unix.SYS_GETDENTS64, file),
		"no such call":         call(100000),
	}
	maps.Copy(m, archAttacks())
	return m
}

// libcMay says whether the attack is no attack in a binary that is linked with cgo; see libcRules.
func libcMay(attack string) bool {
	return cgoLinked && (attack == "clone3" || attack == "mprotect write" || attack == "open")
}

// Every attack is refused by the filter itself: EPERM is its answer, and hardly ever the kernel's to arguments like these.
func TestAttacksAreRefused(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			var got map[string]string
			if err := json.Unmarshal([]byte(run(t, who, "attacks", "")), &got); err != nil {
				t.Fatal(err)
			}
			if len(got) != len(attacks()) {
				t.Errorf("%d results for %d attacks", len(got), len(attacks()))
			}
			for attack, result := range got {
				if result != unix.EPERM.Error() && !libcMay(attack) {
					t.Errorf("%s: %s", attack, result)
				}
			}
		})
	}
}

// The same, each in its own process, with the action of production: the process is dead before the call returns.
func TestAttacksAreDeadly(t *testing.T) {
	us := slices.Sorted(maps.Keys(users()))
	for i, attack := range slices.Sorted(maps.Keys(attacks())) {
		if libcMay(attack) {
			continue
		}
		c := start(t, users()[us[i%len(us)]], "attack", attack)
		ws := c.wait(t)
		if out := c.out.String(); ws.ExitStatus() != 128+int(unix.SIGSYS) || out != "entered\n" || !strings.Contains(c.err.String(), "killed by its sandbox") {
			t.Errorf("%s as %s: exit %d\n%s%s", attack, us[i%len(us)], ws.ExitStatus(), out, c.err.String())
		}
	}
}

// With the filter opened for files and sockets the other layers must hold by themselves.
func TestOtherLayersHoldAlone(t *testing.T) {
	abstract := fmt.Sprintf("sandbox-test-%d", os.Getpid())
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(l) }()
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: "@" + abstract}), unix.Listen(l, 1)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SANDBOX_TEST_ABSTRACT", abstract)
	for name, who := range users() {
		for _, mode := range []string{"", "disable"} {
			if mode == "disable" && len(without(all)) < len(all) {
				continue // there is no other layer, and the attacks would hit the host
			}
			t.Run(name+mode, func(t *testing.T) {
				var got struct {
					Results map[string]string
					Report  *Report
				}
				if err := json.Unmarshal([]byte(run(t, who, "weakened", mode)), &got); err != nil {
					t.Fatal(err)
				}
				landlock, ns := got.Report.Has(Landlock), got.Report.Has(MountNS)
				if ns != (mode == "") {
					t.Fatalf("report:\n%s", got.Report)
				}
				for what, result := range got.Results {
					holds := landlock || ns
					switch what {
					case "list", "listen":
						holds = landlock // an empty directory may be listed, and a loopback that is down bound
					case "mount", "chroot", "unshare":
						holds = got.Report.Has(Capabilities)
					}
					if holds && result == "<nil>" {
						t.Errorf("%s worked", what)
					}
				}
			})
		}
	}
}
