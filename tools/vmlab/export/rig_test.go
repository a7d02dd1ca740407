// Package export has the tests of guestdrv's servers with clients that nobody here wrote: those of libnbd and QEMU, fio and Linux.
package export

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/testrig"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

var (
	binDir  string
	binOnce sync.Once
	bin     string
	binErr  error
)

func TestMain(m *testing.M) { os.Exit(withDir(m)) }

func withDir(m *testing.M) (code int) {
	var err error
	if binDir, err = os.MkdirTemp("", "shadowbell-export-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(binDir)
	if code = m.Run(); code != 0 {
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// server is `guestdrv serve --nbd` as a process, in its sandbox.
type server struct {
	*process.Daemon
	lab    *vmlab.Lab
	t      *testing.T
	socket string
	log    *testrig.Buffer
}

// serve gives hostmed's namespaces to NBD clients on this machine.
func serve(t *testing.T, namespaces []string, args ...string) *server {
	t.Helper()
	lab := vmlab.Open(t)
	device := vmlab.Hostmed(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{Namespaces: namespaces}}})[0]
	return serveDevice(t, lab, device, args...)
}

func serveDevice(t *testing.T, lab *vmlab.Lab, device string, args ...string) *server {
	t.Helper()
	binOnce.Do(func() { bin, binErr = process.Binary(context.Background(), "guestdrv", "", binDir) })
	if binErr != nil {
		t.Fatal(binErr)
	}
	log := &testrig.Buffer{}
	s := &server{lab: lab, t: t, log: log, socket: filepath.Join(filepath.Dir(device), "nbd.sock")}
	var err error
	s.Daemon, err = process.StartGuestdrv(t.Context(), bin, log, append([]string{"vfio-user:" + device, "--nbd", "unix:" + s.socket}, args...)...)
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("guestdrv's log:\n%s", log.String())
		}
	})
	return s
}

// stop ends the server in order, which it does once.
func (s *server) stop() {
	s.t.Helper()
	if s.Daemon == nil {
		return
	}
	if err := s.Stop(); err != nil {
		s.t.Error(err)
	}
	s.Daemon = nil
	if _, err := os.Lstat(s.socket); err == nil {
		s.t.Errorf("the socket is still there")
	}
}

// clients is how many clients have come so far and got their export.
func (s *server) clients() int { return strings.Count(s.log.String(), " client: export=") }

// patience is for what takes a moment on an idle machine.
const patience = 40 * time.Second

// start starts a client and waits until it has its export.
func (s *server) start(cmd *exec.Cmd) {
	s.t.Helper()
	before := s.clients()
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for end := time.Now().Add(patience); s.clients() == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			s.t.Fatal("the client does not come")
		}
	}
}

// uri is an export for libnbd's programs and for fio.
func (s *server) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + s.socket }

// qemu is an export for QEMU's programs.
func (s *server) qemu(export string) string { return "nbd:unix:" + s.socket + ":exportname=" + export }

// program makes a program of the lab ready, which is killed with the test.
func (s *server) program(name string, args ...string) (cmd *exec.Cmd, out *bytes.Buffer) {
	cmd = s.lab.Program(name, args...)
	out = &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = s.t.TempDir() // fio leaves files
	return cmd, out
}

// run runs a program of the lab and returns what it printed.
func (s *server) run(name string, args ...string) string {
	s.t.Helper()
	cmd, out := s.program(name, args...)
	timer := time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() })
	err := cmd.Run()
	timer.Stop()
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out.String()
}
