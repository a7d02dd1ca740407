package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
)

// TestControl is the control socket as somebody at a shell has it.
func TestControl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("curl is missing: apt-get install curl")
		}
		t.Skip("curl is missing")
	}
	dir := t.TempDir()
	socket, control := filepath.Join(dir, "s"), filepath.Join(dir, "control")
	cmd := exec.Command(hostmedBin, "serve", "--socket", socket, "--namespace", "mem:size=1MiB", "--control", control)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(control); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no control socket")
		}
	}
	if st, err := os.Stat(control); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	c, err := guestdrv.Open(t.Context(), "vfio-user:"+socket, guestdrv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(curl, append([]string{"-sS", "--unix-socket", control}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	var s inspect.Snapshot
	if err := json.Unmarshal([]byte(ask("http://hostmed/v1/inspect?controller="+socket)), &s); err != nil || len(s.Controllers) != 1 || s.Controllers[0].Socket != socket || len(s.Controllers[0].Queues) < 2 {
		t.Errorf("%+v, %v", s, err)
	}
	if out := ask("http://hostmed/v1/stats"); !strings.Contains(out, `"bytes_written":0`) {
		t.Error(out)
	}
	trace := s.Controllers[0].Trace
	if out := ask("-X", "POST", fmt.Sprintf("http://hostmed/v1/controllers/%d/queues/1/kick", trace)); !strings.Contains(out, `"found":0`) {
		t.Error(out)
	}
	if out := ask("-X", "POST", fmt.Sprintf("http://hostmed/v1/controllers/%d/queues/77/kick", trace)); !strings.Contains(out, `"code":"no-queue"`) {
		t.Error(out)
	}
	conn, err := attach.New(control).Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, files, err := conn.Inspect(t.Context(), ""); err != nil || len(files) != 1 {
		t.Errorf("%d files, %v", len(files), err)
	} else {
		files[0].Close()
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil { // with a connection open
		t.Errorf("hostmed: %v", err)
	}
	if _, err := os.Stat(control); !os.IsNotExist(err) {
		t.Errorf("the control socket is still there: %v", err)
	}
}
