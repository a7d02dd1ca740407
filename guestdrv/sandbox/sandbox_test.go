package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The tests start the test binary again in a role (roles_test.go), because the box can only be entered once and never left.

const (
	roleEnv = "SANDBOX_TEST_ROLE"
	argEnv  = "SANDBOX_TEST_ARG"
	nobody  = 65534
)

var testBinary string // a copy that every user may execute

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		f, ok := roles[role]
		if !ok {
			fmt.Fprintf(os.Stderr, "no role %q\n", role)
			os.Exit(99)
		}
		f(os.Getenv(argEnv))
		os.Exit(0)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "sandbox-test-")
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	testBinary = filepath.Join(dir, "sandbox.test")
	b, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), os.WriteFile(testBinary, b, 0o755))
	}
	if err != nil {
		panic(err)
	}
	// What a shell ignores on behalf of a job in the background (POSIX 2.11) is not for the processes of tests: what is caught here is the default there.
	for _, s := range forwarded {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// users are those that a test runs as: this one, and nobody if this one is root.
func users() map[string]*syscall.Credential {
	u := map[string]*syscall.Credential{"self": nil}
	if os.Geteuid() == 0 {
		u["nobody"] = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	return u
}

type child struct {
	*exec.Cmd
	out, err bytes.Buffer
}

func start(t *testing.T, who *syscall.Credential, role, arg string, tune ...func(*exec.Cmd)) *child {
	t.Helper()
	c := &child{Cmd: exec.Command(testBinary)}
	c.Env = append(os.Environ(), roleEnv+"="+role, argEnv+"="+arg, "GORACE=atexit_sleep_ms=0")
	c.Dir = "/"
	c.Stdout, c.Stderr = &c.out, &c.err
	c.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	for _, f := range tune {
		f(c.Cmd)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

// patience is longer than anything takes that works, on a busy machine.
const patience = time.Minute

// wait gives the end of the child, which must come.
func (c *child) wait(t *testing.T) syscall.WaitStatus {
	t.Helper()
	late := time.AfterFunc(patience, func() { _ = c.Process.Signal(unix.SIGQUIT) })
	defer late.Stop()
	_ = c.Wait()
	return c.ProcessState.Sys().(syscall.WaitStatus)
}

// run demands that the role ends well and gives its output.
func run(t *testing.T, who *syscall.Credential, role, arg string, tune ...func(*exec.Cmd)) string {
	t.Helper()
	c := start(t, who, role, arg, tune...)
	if ws := c.wait(t); ws != 0 {
		t.Fatalf("role %s ended with %v (exit %d, signal %v)\n%s%s", role, ws, ws.ExitStatus(), ws.Signal(), c.out.String(), c.err.String())
	}
	return c.out.String()
}

func reportOf(t *testing.T, out string) *Report {
	t.Helper()
	r := &Report{}
	if err := json.Unmarshal([]byte(out), r); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return r
}

var all = []Mechanism{Seccomp, Landlock, MountNS, NetworkNS, IPCNS, PIDNS, NoNewPrivs, Capabilities, Limits}

// Found out at start, because in the box it is too late.
var (
	cgoLinked      = linkedWithCgo()
	landlockABI, _ = landlockQuery(unix.LANDLOCK_CREATE_RULESET_VERSION)
)

// without takes away what a binary linked with cgo cannot have on this kernel.
func without(ms []Mechanism) []Mechanism {
	if !cgoLinked {
		return ms
	}
	var out []Mechanism
	for _, m := range ms {
		if m != Capabilities && (m != Landlock || landlockABI >= 8) {
			out = append(out, m)
		}
	}
	return out
}

func demand(t *testing.T, r *Report, in ...Mechanism) {
	t.Helper()
	want := map[Mechanism]bool{}
	for _, m := range without(in) {
		want[m] = true
	}
	for i, m := range all {
		if i >= len(r.Items) || r.Items[i].Mechanism != m {
			t.Fatalf("item %d is not %s:\n%s", i, m, r)
		}
		if r.Has(m) != want[m] {
			t.Errorf("%s in force: %v, want %v", m, r.Has(m), want[m])
		}
	}
	for _, it := range r.Missing() {
		if it.Detail == "" {
			t.Errorf("%s is missing without a reason", it.Mechanism)
		}
	}
	t.Logf("\n%s", r)
}

func TestEverythingInForce(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			r := reportOf(t, run(t, who, "report", ""))
			demand(t, r, all...)
			if s := r.String(); len(strings.Split(s, "\n")) != len(all) || !strings.Contains(s, "mount ns: empty root") || !strings.Contains(s, "system calls, kill, on all ") {
				t.Errorf("report:\n%s", s)
			}
		})
	}
}

// Without namespaces the other layers stand, and the report names the reason.
func TestNamespacesSwitchedOff(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			r := reportOf(t, run(t, who, "report", "disable"))
			demand(t, r, Seccomp, Landlock, NoNewPrivs, Capabilities, Limits)
			if s := r.String(); !strings.Contains(s, "mount ns: NOT in force: switched off by option") {
				t.Errorf("report:\n%s", s)
			}
		})
	}
}

// A kernel that gives no namespaces: the program goes on in its own process, and the report says which sysctl to raise.
func TestNamespacesRefused(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			as := ""
			if who != nil {
				as = "nobody"
			}
			r := reportOf(t, run(t, nil, "refused", as, ownUserNS))
			demand(t, r, Seccomp, Landlock, NoNewPrivs, Capabilities, Limits)
			if s := r.String(); !strings.Contains(s, "no space left on device (raise sysctl user.max_user_namespaces") {
				t.Errorf("report:\n%s", s)
			}
			c := start(t, nil, "refused", as+":require", ownUserNS)
			if ws := c.wait(t); ws.ExitStatus() != 3 || !strings.Contains(c.err.String(), "raise sysctl user.max_user_namespaces") {
				t.Errorf("RequireNamespaces: exit %d\n%s", ws.ExitStatus(), c.err.String())
			}
		})
	}
}

// ownUserNS starts a role where it may set the limits on namespaces below it.
func ownUserNS(c *exec.Cmd) {
	id := func(own, n int) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: 0, HostID: own, Size: n}}
	}
	n := 1
	if os.Geteuid() == 0 {
		n = nobody + 1
	}
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: id(os.Geteuid(), n), GidMappings: id(os.Getegid(), n), GidMappingsEnableSetgroups: n > 1,
	}
}

// KeepUser leaves root in its user namespace; an ordinary user then gets no namespaces at all.
func TestKeepUser(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			r := reportOf(t, run(t, who, "report", "keepuser"))
			if os.Geteuid() == 0 && who == nil {
				demand(t, r, all...)
				return
			}
			demand(t, r, Seccomp, Landlock, NoNewPrivs, Capabilities, Limits)
			if !strings.Contains(r.String(), "KeepUser is set") {
				t.Errorf("report:\n%s", r)
			}
		})
	}
}

// A marker that did not come from Reexec must not make Enter believe in namespaces that it does not have.
func TestForgedMarker(t *testing.T) {
	mine, err := readNamespaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{mine.String(), "", "mnt", "rubbish=1 =2"} {
		out := run(t, nil, "report", "", func(c *exec.Cmd) { c.Env = append(c.Env, markerEnv+"="+v) })
		r := reportOf(t, out)
		demand(t, r, Seccomp, Landlock, NoNewPrivs, Capabilities, Limits)
		if !strings.Contains(r.String(), "unset "+markerEnv) {
			t.Errorf("report:\n%s", r)
		}
	}
}

func TestOpenDirectoryIsReported(t *testing.T) {
	r := reportOf(t, run(t, nil, "report", "dirfd"))
	if r.Has(MountNS) || !strings.Contains(r.String(), "is a directory of the old root (close it before Enter)") {
		t.Errorf("report:\n%s", r)
	}
}

func TestInitramfsRoot(t *testing.T) {
	if out := run(t, nil, "initramfs", ""); !strings.Contains(out, "by chroot") {
		t.Errorf("%q", out)
	}
}

func TestExitStatusPasses(t *testing.T) {
	for name, who := range users() {
		for _, code := range []string{"0", "1", "2", "42", "255"} {
			c := start(t, who, "exit", code)
			if ws := c.wait(t); fmt.Sprint(ws.ExitStatus()) != code {
				t.Errorf("%s: exit %d, want %s: %s", name, ws.ExitStatus(), code, c.err.String())
			}
		}
	}
}

func TestArgumentsStdioAndFdsPass(t *testing.T) {
	extra, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(w, "by fd 3")
	_ = w.Close()
	defer func() { _ = extra.Close() }()
	out := run(t, nil, "echo", "", func(c *exec.Cmd) {
		c.Args = append(c.Args, "one", "two words")
		c.Stdin = strings.NewReader("by stdin")
		c.ExtraFiles = []*os.File{extra}
	})
	if want := `["one" "two words"] "by stdin" "by fd 3" marker=false sandbox.test`; strings.TrimSpace(out) != want {
		t.Errorf("got  %s\nwant %s", out, want)
	}
}

// ready starts a role and waits for its first line, which is its PID.
func ready(t *testing.T, who *syscall.Credential, role, arg string, tune ...func(*exec.Cmd)) (c *child, pid int, rest *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	c = start(t, who, role, arg, append(tune, func(c *exec.Cmd) { c.Stdout = w })...)
	_ = w.Close()
	if _, err := fmt.Fscanln(r, &pid); err != nil {
		t.Fatalf("%v: %s", err, c.err.String())
	}
	return c, pid, r
}

func TestSignalsPass(t *testing.T) {
	for name, who := range users() {
		for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1} {
			c, pid, _ := ready(t, who, "catch", "")
			if pid == c.Process.Pid {
				t.Fatal("no second process")
			}
			_ = c.Process.Signal(sig)
			if ws := c.wait(t); ws.ExitStatus() != 100+int(sig) {
				t.Errorf("%s, %v: exit %d: %s", name, sig, ws.ExitStatus(), c.err.String())
			}
		}
		// A program that does not catch a signal dies of it, and so does the first process.
		for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
			c, _, _ := ready(t, who, "sleep", "")
			_ = c.Process.Signal(sig)
			if ws := c.wait(t); !ws.Signaled() || ws.Signal() != sig {
				t.Errorf("%s, %v not caught: %v: %s", name, sig, ws, c.err.String())
			}
		}
	}
}

// nohup: what was ignored at start stays ignored.
func TestIgnoredSignalStaysIgnored(t *testing.T) {
	c, pid, _ := ready(t, nil, "ignorehup", "")
	_ = c.Process.Signal(unix.SIGHUP)
	_ = unix.Kill(pid, unix.SIGHUP)
	time.Sleep(50 * time.Millisecond)
	_ = c.Process.Signal(unix.SIGTERM)
	if ws := c.wait(t); ws.Signal() != unix.SIGTERM {
		t.Errorf("ended with %v: %s", ws, c.err.String())
	}
}

// ^C on a terminal reaches the second process by itself and must not come twice.
func TestTerminalInterruptComesOnce(t *testing.T) {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ptmx.Close() }()
	raw := int(ptmx.Fd())
	if err := unix.IoctlSetPointerInt(raw, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(raw, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	pts, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, _, rest := ready(t, nil, "countint", "", func(c *exec.Cmd) {
		c.Stdin = pts
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	})
	_ = pts.Close()
	if _, err := ptmx.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(rest)
	if ws := c.wait(t); ws != 0 || strings.TrimSpace(string(out)) != "1" {
		t.Errorf("%v, interrupts: %s %s", ws, out, c.err.String())
	}
}

func TestKilledParentTakesChildAlong(t *testing.T) {
	for name, who := range users() {
		c, pid, rest := ready(t, who, "sleep", "")
		_ = c.Process.Kill()
		c.wait(t)
		// The pipe ends when the last process that holds it is gone.
		_ = rest.SetReadDeadline(time.Now().Add(patience))
		if _, err := rest.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%s: process %d outlived its parent: %v", name, pid, err)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// The action for debugging shows who made the call.
func TestTrapShowsTheCaller(t *testing.T) {
	c := start(t, nil, "trapped", "")
	if ws := c.wait(t); ws.ExitStatus() != 2 || !strings.Contains(c.err.String(), "SIGSYS: bad system call") || !strings.Contains(c.err.String(), "roleTrapped") {
		t.Errorf("%v: %s", ws, c.err.String())
	}
}

func TestRequireLandlock(t *testing.T) {
	c := start(t, nil, "report", "landlock")
	ws, has := c.wait(t), len(without([]Mechanism{Landlock})) == 1
	if (ws == 0) != has || (!has && !strings.Contains(c.err.String(), "sandbox: landlock: the binary is linked with cgo")) {
		t.Errorf("%v: %s", ws, c.err.String())
	}
}

// "guestdrv read | head" ends without a word.
func TestBrokenPipeIsQuiet(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := start(t, nil, "yes", "", func(c *exec.Cmd) { c.Stdout = w })
	_ = w.Close()
	_, _ = r.Read(make([]byte, 1))
	_ = r.Close()
	if ws := c.wait(t); ws.ExitStatus() != 128+int(unix.SIGPIPE) || c.err.Len() != 0 {
		t.Errorf("%v: %s", ws, c.err.String())
	}
}

func TestBadPolicy(t *testing.T) {
	for _, p := range []Policy{{Action: 9}, {Extra: []Rule{{Name: "openat", Nr: unix.SYS_OPENAT}}}, {Extra: []Rule{{Nr: unix.SYS_OPENAT, Why: "x"}}}} {
		if _, err := p.compile(1, false); err == nil {
			t.Errorf("%+v compiles", p)
		}
	}
}
