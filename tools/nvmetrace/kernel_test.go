package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/charmbracelet/x/ansi"

	"github.com/shadowbell/shadowbell/tools/testrig"
)

// The tests in this file run the program as a process, on this machine's kernel, whatever that has: giving up privileges is for good.

// asProgram makes the test's executable the program.
const asProgram = "NVMETRACE_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

const patience = time.Minute

// nvmetrace is the program with args.
func nvmetrace(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "TERM=xterm")
	return cmd
}

// start runs it and returns its exit code.
func start(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := nvmetrace(t, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("nvmetrace %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// machine is what check says of this machine.
func machine(t *testing.T) (c checkJSON) {
	t.Helper()
	code, stdout, stderr := start(t, "check", "--json")
	if err := json.Unmarshal([]byte(stdout), &c); err != nil || c.Works != (code == 0) || code > 1 {
		t.Fatalf("exit %d, %v: %s%s", code, err, stdout, stderr)
	}
	if os.Geteuid() == 0 && os.Getenv("CI") == "true" && !c.Works {
		t.Fatalf("nothing can be traced, and CI must not skip: %s", stdout)
	}
	return c
}

// works says how much of a command does here.
func (c checkJSON) works(command string) string {
	i := slices.IndexFunc(c.Commands, func(x commandJSON) bool { return x.Name == command })
	if i < 0 {
		return ""
	}
	return c.Commands[i].Works
}

// TestCheckTellsTheTruth: what check says that works does, and the rest is one line and exit 2.
func TestCheckTellsTheTruth(t *testing.T) {
	c := machine(t)
	for _, args := range []string{"top --duration 50ms --interval 20ms", "latency --duration 50ms", "snoop --duration 50ms"} {
		command, _, _ := strings.Cut(args, " ")
		code, stdout, stderr := start(t, strings.Fields(args)...)
		if c.works(command) != "no" {
			if code != 0 {
				t.Errorf("%s: exit %d: %s%s", args, code, stdout, stderr)
			}
			continue
		}
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "nvmetrace: ") {
			t.Errorf("%s: exit %d: %s%s", args, code, stdout, stderr)
		}
	}
}

// TestRefusedRecordLeavesNoFile: what could not begin leaves nothing.
func TestRefusedRecordLeavesNoFile(t *testing.T) {
	c := machine(t)
	file := filepath.Join(t.TempDir(), "record")
	code, _, stderr := start(t, "snoop", "--duration", "50ms", "--write", file)
	_, err := os.Stat(file)
	if works := c.works("snoop") != "no"; works != (code == 0) || works != (err == nil) {
		t.Errorf("exit %d, %v: %s", code, err, stderr)
	}
}

// TestPrivilegesAreGivenUp: once it traces, the program has no capability left.
func TestPrivilegesAreGivenUp(t *testing.T) {
	if machine(t).works("top") == "no" {
		return // TestCheckTellsTheTruth
	}
	cmd := nvmetrace(t, "top", "--interval", "20ms")
	out := new(testrig.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); !strings.Contains(out.String(), "IOPS"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it shows nothing: %s", out.String())
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	kept := strings.Contains(out.String(), "privileges are kept: drop privileges: the binary is linked with cgo") // the race detector is
	if !kept && !strings.Contains(string(status), "CapEff:\t0000000000000000\n") {
		t.Errorf("%s\n%s", out.String(), status)
	}
	// Ctrl-C ends it, with totals.
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "totals") {
		t.Errorf("%v: %s", err, out.String())
	}
}

// pty returns both ends of a terminal of 24 lines.
func pty(t *testing.T) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	if err := unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	if err := unix.IoctlSetWinsize(int(ours.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100}); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// TestTopOnATerminal: it takes the screen, hears keys, gives the screen back and prints the totals.
func TestTopOnATerminal(t *testing.T) {
	if machine(t).works("top") == "no" {
		return // TestCheckTellsTheTruth
	}
	ours, theirs := pty(t)
	cmd := nvmetrace(t, "top", "--interval", "50ms")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	screen := new(testrig.Buffer)
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, 4096)
		for {
			n, err := ours.Read(b)
			_, _ = screen.Write(b[:n])
			if err != nil { // EIO: nobody has the other end
				return
			}
		}
	}()
	press := func(key, until string) {
		t.Helper()
		if _, err := ours.WriteString(key); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(patience); !strings.Contains(ansi.Strip(screen.String()), until); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q does not bring %q: %q", key, until, screen.String())
			}
		}
	}
	press("", "nvmetrace top")
	press("p", "PAUSED")
	press("?", "select a line")
	press("q", "totals")
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, screen.String())
	}
	<-read
	const enter, leave = "\x1b[?1049h", "\x1b[?1049l"
	if s := screen.String(); strings.Count(s, enter) != 1 || strings.Count(s, leave) != 1 || strings.LastIndex(s, leave) > strings.LastIndex(s, "totals") {
		t.Errorf("the screen is not given back: %q", s)
	}
}
