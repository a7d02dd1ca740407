package process

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseStat(t *testing.T) {
	const line = "4242 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 123 77 0 0 20 0 5 0 100 1 2"
	if d, ok := parseStat([]byte(line)); !ok || d != 2*time.Second {
		t.Errorf("%v, %v", d, ok)
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S 1 2", "1 (x) S 1 2 3 4 5 6 7 8 9 10 -1 7"} {
		if d, ok := parseStat([]byte(bad)); ok {
			t.Errorf("%q was read as %v", bad, d)
		}
	}
}

func TestOwnUsage(t *testing.T) {
	c, err := OpenCPUClock(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before, ok := c.Read()
	if !ok {
		t.Fatal("no CPU time")
	}
	// It is counted in ticks of 10 ms, which on a busy machine take a while to come together.
	after := before
	for end := time.Now().Add(20 * time.Second); ok && after == before && time.Now().Before(end); {
		after, ok = c.Read()
	}
	if !ok || after <= before {
		t.Errorf("CPU time went from %v to %v", before, after)
	}
	if fine, err := ThreadTime(os.Getpid()); err != nil || fine <= 0 {
		t.Errorf("%v, %v", fine, err)
	}
	m, err := ReadMemory(os.Getpid())
	if err != nil || m.Resident < 1<<20 || m.Shared > m.Resident {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestNoSuchProcess(t *testing.T) {
	const pid = 1 << 30
	if _, err := OpenCPUClock(pid); err == nil {
		t.Error("a clock of no process")
	}
	if _, err := OpenCPUClock(0); err == nil || !strings.Contains(err.Error(), "not known") {
		t.Error(err)
	}
	if _, err := ThreadTime(pid); err == nil {
		t.Error("threads of no process")
	}
	if _, err := ReadMemory(pid); err == nil {
		t.Error("memory of no process")
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "hostmed")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDaemonWaitsForEachSocket(t *testing.T) {
	bin := script(t, `trap 'echo bye >&2; exit 0' TERM; echo "$@" >&2; echo listening 1 >&2; sleep 0.05; echo listening 2 >&2; while :; do sleep 0.02; done`)
	d, err := StartHostmed(context.Background(), bin, nil, "--socket", "/a", "--socket=/b")
	if err != nil {
		t.Fatal(err)
	}
	if log := d.Log(); log != "serve --socket /a --socket=/b\nlistening 1\nlistening 2" {
		t.Errorf("log %q", log)
	}
	if err := d.Stop(); err != nil || !strings.HasSuffix(d.Log(), "bye") {
		t.Errorf("%v, log %q", err, d.Log())
	}
}

func TestDaemonThatFails(t *testing.T) {
	_, err := StartHostmed(context.Background(), script(t, `echo "socket /a: in use" >&2; exit 2`), nil, "--socket", "/a")
	if err == nil || !strings.Contains(err.Error(), "socket /a: in use") {
		t.Errorf("%v", err)
	}
	_, err = StartHostmed(context.Background(), filepath.Join(t.TempDir(), "none"), nil)
	if err == nil || !strings.Contains(err.Error(), "starting") {
		t.Errorf("%v", err)
	}
	d, err := StartHostmed(context.Background(), script(t, `trap 'echo oops >&2; exit 3' TERM; echo listening >&2; while :; do sleep 0.02; done`), nil, "--socket", "/a")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(); err == nil || !strings.Contains(err.Error(), "exit status 3: oops") {
		t.Errorf("%v", err)
	}
}

func TestBinaryIsMissing(t *testing.T) {
	if _, err := Binary(context.Background(), "hostmed", t.TempDir(), ""); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("%v", err)
	}
}
