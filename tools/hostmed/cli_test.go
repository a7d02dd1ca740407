package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

var hostmedBin string

func TestMain(m *testing.M) { os.Exit(withBinary(m)) }

func withBinary(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shadowbell-cli-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if hostmedBin, err = process.Binary(context.Background(), "hostmed", "", dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, hostmedBin, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatalf("hostmed %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// TestErrorsAreOneLine: what the user can put right is one line that names the thing and the remedy, and exit 2.
func TestErrorsAreOneLine(t *testing.T) {
	dir := t.TempDir()
	odd := filepath.Join(dir, "odd")
	if err := os.WriteFile(odd, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	used := filepath.Join(dir, "used")
	l, err := net.Listen("unix", used)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	const null = "null:size=1GiB"
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"serve"}, []string{"--socket", "--namespace"}},
		{[]string{"serve", "--socket", dir + "/s"}, []string{"--namespace"}},
		{[]string{"serve", "--hop"}, []string{"--hop"}},
		{[]string{"hop"}, []string{"hop"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--doorbells", "bell"}, []string{"shadow", "trap", "mmap"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--doorbell-stride", "12"}, []string{"doorbell-stride", "64"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--limit", "iops=many"}, []string{"iops", "many", "2000"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--limit", "bandwidth=100"}, []string{"bandwidth", "100MiB"}},
		{[]string{"serve", "--config", dir + "/c", "--limit", "iops=5"}, []string{"--config", "--limit"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--poll", "2s"}, []string{"2s", "100ms"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--cpus", "7000"}, []string{"7000", "may run on"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--log-level", "loud"}, []string{"log-level"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", "disk"}, []string{"disk", "it must begin with"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", "mem:size=1000"}, []string{"1000", "multiple"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", "mem:lba=4096"}, []string{"size="}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", "file:" + dir + "/missing"}, []string{"/missing", "size="}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", "file:" + odd}, []string{odd}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", "file:" + dir}, []string{dir}},
		{[]string{"serve", "--socket", used, "--namespace", null}, []string{used, "in use"}},
		{[]string{"serve", "--socket", odd, "--namespace", null}, []string{odd, "not a socket"}},
		{[]string{"serve", "--socket", dir + "/no/s", "--namespace", null}, []string{dir + "/no", "does not exist"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--control", dir + "/no/c"}, []string{dir + "/no/c", "does not exist"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--control", used}, []string{used, "in use"}},
		{[]string{"serve", "--socket", dir + "/s", "--namespace", null, "--control", dir + "/s"}, []string{dir + "/s", "choose another path"}},
		{[]string{"serve", "--socket", dir + "/" + strings.Repeat("x", 120), "--namespace", null}, []string{"107"}},
		{[]string{"serve", "--socket", dir + "/twice", "--socket", dir + "/twice", "--namespace", null}, []string{dir + "/twice"}},
	} {
		code, stdout, stderr := run(t, c.args...)
		if code != 2 || stdout != "" || !strings.HasPrefix(stderr, "hostmed: ") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%v: exit %d, stdout %q, stderr %q; want exit 2 and one line", c.args, code, stdout, stderr)
		}
		for _, s := range c.says {
			if !strings.Contains(stderr, s) {
				t.Errorf("%v: %q does not say %q", c.args, stderr, s)
			}
		}
	}
	if _, err := os.Lstat(dir + "/s"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a socket was left behind (%v)", err)
	}
	if _, err := os.Lstat(dir + "/twice"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a socket was left behind (%v)", err)
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{}, {"--help"}, {"serve", "--help"}, {"version"}} {
		code, stdout, stderr := run(t, args...)
		if code != 0 || stdout == "" || stderr != "" {
			t.Errorf("%v: exit %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
	_, stdout, _ := run(t, "serve", "--help")
	for _, s := range []string{"null:size=SIZE", "mem:size=SIZE", "file:PATH", "readonly", "hostmed serve --socket", "exit 0", "shadow,trap,mmap"} {
		if !strings.Contains(strings.Join(strings.Fields(stdout), " "), s) {
			t.Errorf("the help does not say %q:\n%s", s, stdout)
		}
	}
}

// TestSignalsEndItInOrder: each of the two signals ends it with 0, and its sockets are gone.
func TestSignalsEndItInOrder(t *testing.T) {
	dir := t.TempDir()
	h, err := process.StartHostmed(t.Context(), hostmedBin, nil, "--socket", dir+"/a", "--socket", dir+"/b",
		"--namespace", "file:"+dir+"/disk,size=1MiB", "--namespace", "mem:size=1MiB,lba=4096", "--log-json")
	if err != nil {
		t.Fatal(err)
	}
	if log := h.Log(); !strings.Contains(log, `"@message":"listening"`) || !strings.Contains(log, dir+"/b") {
		t.Errorf("log %s", log)
	}
	for _, s := range []string{"/a", "/b"} {
		c, err := net.Dial("unix", dir+s)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close() // a client that says nothing does not hold up the end
	}
	// timeout(1) sends the signal to the process and to its group: the second must not cut the end short.
	if err := syscall.Kill(h.PID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := h.Stop(); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(dir + "/*")
	if err != nil || len(left) != 1 || left[0] != dir+"/disk" {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestConfig(t *testing.T) {
	g := &grammar{}
	k, err := kong.New(g, kong.Name("hostmed"))
	if err != nil {
		t.Fatal(err)
	}
	args := "serve --socket /a,b --socket /c --namespace null:size=1GiB,lba=4096 --namespace file:/x,,y,readonly --doorbells mmap --doorbell-stride 64 --cpus 0 --spin off --poll 1ms"
	if _, err := k.Parse(strings.Fields(args)); err != nil {
		t.Fatal(err)
	}
	got, err := g.Serve.config(&bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	got.Logger = nil
	specs := []string{"null:size=1GiB,lba=4096", "file:/x,,y,readonly"}
	want := hostmed.Config{CPUs: []int{0}, NoSpin: true, Poll: time.Millisecond, LogLevel: "info", Controllers: []hostmed.ControllerConfig{
		{Socket: "/a,b", Namespaces: specs, Doorbells: hostmed.Mmap, DSTRD: 4}, {Socket: "/c", Namespaces: specs, Doorbells: hostmed.Mmap, DSTRD: 4},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
}
