package main

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := "[[subsystem]]\n[[subsystem.controller]]\nsocket = \"" + dir + "/s\"\n[[subsystem.namespace]]\nspec = \"mem:size=1MiB\"\n"
	code, stdout, stderr := run(t, "check", write("good", good))
	if code != 0 || !strings.Contains(stdout, "1 controllers") || stderr != "" {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
	bad := write("bad", good+"spek = 1\n")
	for _, args := range [][]string{{"check", bad}, {"serve", "--config", bad}} {
		code, stdout, stderr := run(t, args...)
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, bad+":6:1: subsystem.namespace.spek") || !strings.Contains(stderr, "did you mean spec?") {
			t.Errorf("%v: exit %d, %q, %q", args, code, stdout, stderr)
		}
	}
	for _, args := range [][]string{
		{"serve", "--config", bad, "--socket", dir + "/s"}, {"serve", "--config", bad, "--namespace", "mem:size=1MiB"}, {"serve", "--config", bad, "--doorbells", "trap"},
	} {
		if code, _, stderr := run(t, args...); code != 2 || !strings.Contains(stderr, "--config") {
			t.Errorf("%v: exit %d, %q", args, code, stderr)
		}
	}
	if code, _, stderr := run(t, "check", dir+"/none"); code != 2 || !strings.Contains(stderr, dir+"/none") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

// TestReloadOnSIGHUP: the file is read again; one that is wrong is logged, and the service goes on. SIGUSR1 has it say its counters.
func TestReloadOnSIGHUP(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "hostmed.toml")
	write := func(sockets ...string) {
		text := "state = \"" + dir + "/state\"\n"
		for _, s := range sockets {
			text += "[[subsystem]]\n[[subsystem.controller]]\nsocket = \"" + dir + "/" + s + "\"\n[[subsystem.namespace]]\nspec = \"mem:size=1MiB\"\n"
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a")
	cmd := exec.Command(hostmedBin, "serve", "--config", file)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			lines <- s.Text()
		}
		_, _ = io.Copy(io.Discard, stderr)
	}()
	says := func(want string) {
		t.Helper()
		end := time.After(20 * time.Second)
		for {
			select {
			case l, ok := <-lines:
				if !ok {
					t.Fatalf("it ended before it said %q", want)
				}
				if strings.Contains(l, want) {
					return
				}
			case <-end:
				t.Fatalf("it did not say %q", want)
			}
		}
	}
	exists := func(name string) bool {
		_, err := os.Lstat(filepath.Join(dir, name))
		return err == nil
	}
	send := func(s syscall.Signal) {
		t.Helper()
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	hup := func() { send(syscall.SIGHUP) }
	says("listening")
	send(syscall.SIGUSR1)
	says("counters: subsystem=")
	write("a", "b")
	hup()
	says("reloaded")
	if !exists("a") || !exists("b") {
		t.Error("the new socket is missing")
	}
	if err := os.WriteFile(file, []byte("stat = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hup()
	says("did you mean state?")
	write("b")
	hup()
	says("reloaded")
	if exists("a") || !exists("b") {
		t.Error("the old socket is still there, or the new one is not")
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	says("shutting down")
	for range lines { // to the end
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if exists("b") {
		t.Error("the socket is left behind")
	}
}
