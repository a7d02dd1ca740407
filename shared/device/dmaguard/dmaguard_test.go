package dmaguard

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// driven makes the test program a driver that is guarded, until it is killed.
const driven = "SHADOWBELL_TEST_DRIVEN"

// nowhere is a function that no machine has.
const nowhere = "fffe:1f:1f.7"

func TestMain(m *testing.M) {
	if os.Getenv(driven) != "" {
		drive()
	}
	goleak.VerifyTestMain(m)
}

// drive starts a guard that holds the pipe at descriptor 3, and says which process it is.
func drive() {
	hold := os.NewFile(3, "held")
	g, err := Start(nowhere, hold, func(err error) { fmt.Println("lost:", err) })
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	hold.Close()
	fmt.Println(g.cmd.Process.Pid)
	select {}
}

func held(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}

// TestGuardOfAKilledProcess: its end is seen, whatever signals the guard has got, the function is stopped, and only then what it holds is let go of.
func TestGuardOfAKilledProcess(t *testing.T) {
	r, w := held(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), driven+"=1")
	cmd.ExtraFiles = []*os.File{w}
	var said strings.Builder
	errs, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	cmd.Stderr = theirs
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	w.Close()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	var pid int
	if _, err := fmt.Sscan(line, &pid); err != nil {
		t.Fatalf("%q", line)
	}
	for _, s := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT} {
		if err := unix.Kill(pid, s); err != nil {
			t.Error(err)
		}
	}
	_ = r.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody holds the file: %v", err)
	}
	if sid, err := unix.Getsid(pid); sid != pid || err != nil {
		t.Errorf("the guard is in session %d: %v", sid, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	_ = r.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := r.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the guard goes on holding the file: %v", err)
	}
	if _, err := bufio.NewReader(errs).WriteTo(&said); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said.String(), nowhere+": whoever drove it is gone, and it may go on writing to memory") {
		t.Errorf("the guard says %q", said.String())
	}
}

// TestReleasedGuard does nothing to the function.
func TestReleasedGuard(t *testing.T) {
	r, w := held(t)
	g, err := Start(nowhere, w, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := errors.Join(g.Release(true), g.Release(true)); err != nil {
		t.Error(err)
	}
	if !g.cmd.ProcessState.Success() {
		t.Errorf("the guard: %v", g.cmd.ProcessState)
	}
	_ = r.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := r.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("somebody holds the file: %v", err)
	}

	// It is told that the function was not stopped: it does that, which for this one fails.
	_, w = held(t)
	if g, err = Start(nowhere, w, func(err error) { t.Error(err) }); err != nil {
		t.Fatal(err)
	}
	if err := g.Release(false); err != nil || g.cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("the guard: %v, %v", g.cmd.ProcessState, err)
	}
}

// TestGuardThatIsKilled is told of, and released all the same.
func TestGuardThatIsKilled(t *testing.T) {
	_, w := held(t)
	lost := make(chan error, 1)
	g, err := Start(nowhere, w, func(err error) { lost <- err })
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-lost:
		if !strings.Contains(err.Error(), nowhere) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("nobody was told")
	}
	if err := g.Release(true); err != nil {
		t.Error(err)
	}
}
