package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var roles = map[string]func(arg string){
	"report":    roleReport,
	"refused":   roleRefused,
	"initramfs": roleInitramfs,
	"exit":      roleExit,
	"echo":      roleEcho,
	"atend":     roleAtEnd,
	"tick":      roleTick,
	"catch":     roleCatch,
	"sleep":     roleSleep,
	"ignorehup": roleIgnoreHUP,
	"countint":  roleCountINT,
	"attack":    roleAttack,
	"attacks":   roleAttacks,
	"weakened":  roleWeakened,
	"work":      roleWork,
	"limits":    roleLimits,
	"memory":    roleMemory,
	"threads":   roleThreads,
	"trapped":   roleTrapped,
	"server":    roleServer,
	"ring":      roleRing,
	"device":    roleDevice,
	"yes":       roleYes,
}

func die(args ...any) {
	fmt.Fprintln(os.Stderr, args...)
	os.Exit(3)
}

func must[T any](v T, err error) T {
	if err != nil {
		die(err)
	}
	return v
}

// box goes through Reexec and Enter and demands every layer that this binary can have.
func box(p Policy) {
	Reexec(Options{})
	enterAll(p)
}

func enterAll(p Policy) {
	p.RequireNamespaces = true
	r := must(Enter(p))
	for _, m := range without(all) {
		if !r.Has(m) {
			die("not in force:", m, "\n"+r.String())
		}
	}
}

func roleReport(arg string) {
	Reexec(Options{Disable: arg == "disable", KeepUser: arg == "keepuser"})
	var p Policy
	switch arg {
	case "dirfd":
		must(unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0))
	case "require":
		p.RequireNamespaces = true
	case "landlock":
		p.RequireLandlock = true
	}
	r := must(Enter(p))
	if _, err := Enter(p); err == nil {
		die("entered twice")
	}
	_ = must(0, json.NewEncoder(os.Stdout).Encode(r))
}

// roleRefused forbids itself more namespaces and becomes roleReport.
func roleRefused(arg string) {
	if m := must(readIDMap("/proc/self/uid_map")); m[0].Size > nobody+1 {
		die("this is the host's user namespace")
	}
	kinds := []string{"user", "mnt", "net", "ipc", "uts", "pid"}
	if rest, ok := strings.CutPrefix(arg, "pid:"); ok {
		kinds, arg = []string{"pid"}, rest
	}
	for _, k := range kinds {
		_ = must(0, os.WriteFile("/proc/sys/user/max_"+k+"_namespaces", []byte("0"), 0))
	}
	if user, require, _ := strings.Cut(arg, ":"); true {
		arg = require
		if user == "nobody" {
			_ = must(0, errors.Join(syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody)))
		}
	}
	become("report", arg)
}

func become(role, arg string) {
	_ = must(0, errors.Join(os.Setenv(roleEnv, role), os.Setenv(argEnv, arg)))
	die(syscall.Exec(os.Args[0], os.Args, os.Environ()))
}

// roleInitramfs empties the root as it must be done where pivot_root is refused.
func roleInitramfs(string) {
	Reexec(Options{})
	_ = must(0, namespacesMissing())
	how := must(emptyRoot(func(string, string) error { return unix.EINVAL }))
	_ = must(0, checkRootEmpty())
	fmt.Println(how)
}

func roleExit(arg string) {
	box(Policy{})
	os.Exit(must(strconv.Atoi(arg)))
}

func roleEcho(string) {
	Reexec(Options{})
	_, marked := os.LookupEnv(markerEnv)
	in := must(io.ReadAll(os.Stdin))
	extra := must(io.ReadAll(os.NewFile(3, "extra")))
	comm := must(os.ReadFile("/proc/self/comm"))
	fmt.Printf("%q %q %q marker=%v %s", os.Args[1:], in, extra, marked, comm)
}

// roleAtEnd removes a file when it ends, which it could not do from inside.
func roleAtEnd(path string) {
	Reexec(Options{AtEnd: func() {
		if err := os.Remove(path); err != nil {
			die(err)
		}
	}})
	_ = must(0, os.WriteFile(path, nil, 0o600))
	enterAll(Policy{})
	os.Exit(7)
}

// roleTick says something every few milliseconds.
func roleTick(string) {
	Reexec(Options{})
	pid := ownPID()
	enterAll(Policy{})
	for fmt.Println(pid); ; time.Sleep(5 * time.Millisecond) {
		fmt.Println()
	}
}

// ownPID is this process's number in the namespace of the test, as long as /proc is there.
func ownPID() string { return must(os.Readlink("/proc/self")) }

func roleCatch(string) {
	Reexec(Options{})
	pid := ownPID()
	c := make(chan os.Signal, 8)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1)
	enterAll(Policy{})
	fmt.Println(pid)
	os.Exit(100 + int((<-c).(syscall.Signal)))
}

func roleSleep(string) {
	Reexec(Options{})
	pid := ownPID()
	enterAll(Policy{})
	fmt.Println(pid)
	time.Sleep(2 * patience)
}

// roleIgnoreHUP becomes roleSleep with SIGHUP ignored, as nohup does.
func roleIgnoreHUP(string) {
	signal.Ignore(unix.SIGHUP)
	become("sleep", "")
}

func roleCountINT(string) {
	Reexec(Options{})
	c := make(chan os.Signal, 8)
	signal.Notify(c, unix.SIGINT)
	pid := ownPID()
	enterAll(Policy{})
	fmt.Println(pid)
	<-c
	n := 1
	for quiet := time.After(300 * time.Millisecond); ; {
		select {
		case <-c:
			n++
		case <-quiet:
			fmt.Println(n)
			return
		}
	}
}

// roleAttack makes one attack in a box that kills.
func roleAttack(name string) {
	Reexec(Options{})
	prepareAttacks()
	enterAll(Policy{MapFDs: []int{heldMap}})
	fmt.Println("entered")
	for _, a := range attacks() {
		if a.name == name {
			fmt.Println("survived:", a.do())
		}
	}
}

// roleAttacks makes all attacks in a box that answers EPERM.
func roleAttacks(string) {
	Reexec(Options{})
	prepareAttacks()
	enterAll(Policy{Action: ActionErrno, MapFDs: []int{heldMap}})
	results := map[string]string{}
	for _, a := range attacks() {
		results[a.name] = fmt.Sprint(a.do())
	}
	_ = must(0, json.NewEncoder(os.Stdout).Encode(results))
}

// roleWeakened opens the filter for files and sockets, so that only the other layers are left.
func roleWeakened(arg string) {
	Reexec(Options{Disable: arg == "disable"})
	exe := must(os.Readlink("/proc/self/exe"))
	var extra []Rule
	for name, nr := range map[string]uintptr{
		"openat": unix.SYS_OPENAT, "newfstatat": unix.SYS_NEWFSTATAT, "socket": unix.SYS_SOCKET, "connect": unix.SYS_CONNECT, "bind": unix.SYS_BIND,
		"mount": unix.SYS_MOUNT, "chroot": unix.SYS_CHROOT, "unshare": unix.SYS_UNSHARE, "capset": unix.SYS_CAPSET, "fchdir": unix.SYS_FCHDIR,
	} {
		extra = append(extra, Rule{Name: name, Nr: nr, Why: "test: are the other layers shut?"})
	}
	r := must(Enter(Policy{Extra: extra, MaxFD: 64}))

	results := map[string]string{}
	try := func(name string, err error) { results[name] = fmt.Sprint(err) }
	open := func(p string, flags int) error {
		fd, err := unix.Open(p, flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}
	try("read", open("/etc/passwd", unix.O_RDONLY))
	try("read exe", open(exe, unix.O_RDONLY))
	try("list", open("/", unix.O_RDONLY|unix.O_DIRECTORY))
	try("create", open(filepath.Join("/tmp", "sandbox-test-x"), unix.O_CREAT|unix.O_WRONLY))
	try("up", open("../../../../etc/passwd", unix.O_RDONLY))
	try("proc", open("/proc/self/mem", unix.O_RDWR))
	tcp := must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	try("tcp", unix.Connect(tcp, &unix.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}}))
	try("listen", unix.Bind(tcp, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	un := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	try("abstract", unix.Connect(un, &unix.SockaddrUnix{Name: "@" + os.Getenv("SANDBOX_TEST_ABSTRACT")}))
	if r.Has(MountNS) { // never on the host, should the capabilities not be gone
		try("mount", unix.Mount("none", "/", "tmpfs", 0, ""))
	}
	try("chroot", unix.Chroot("/"))
	try("unshare", unix.Unshare(unix.CLONE_NEWNET))
	_ = must(0, json.NewEncoder(os.Stdout).Encode(map[string]any{"results": results, "report": r}))
}

// roleTrapped must crash with the stack of this function.
func roleTrapped(string) {
	Reexec(Options{})
	enterAll(Policy{Action: ActionTrap})
	_, _ = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
}

// roleYes writes until nobody reads.
func roleYes(string) {
	box(Policy{})
	for {
		fmt.Println("y")
	}
}
