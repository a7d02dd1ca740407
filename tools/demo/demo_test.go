package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

var bin string // the directory of all three programs

func TestMain(m *testing.M) { os.Exit(withBinaries(m)) }

func withBinaries(m *testing.M) int {
	dir, err := os.MkdirTemp("", "demo-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"hostmed", "guestdrv", "demo"} {
		if _, err := process.Binary(context.Background(), name, "", dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	bin = dir
	return m.Run()
}

func results() []row {
	host := 0.04
	r := func(name string, iops float64, p50 int64, mmio float64) row {
		return row{name, load.Result{IOPS: iops, Latency: load.Latency{P50: p50}, MMIOPerIO: mmio, Idle: &load.Idle{Guest: 0.02, Host: &host}}}
	}
	return []row{r("trap", 200_000, 600_000, 1.02), r("shadow", 8_000_000, 4_000, 0.000002)}
}

func TestTable(t *testing.T) {
	const want = "" +
		"  doorbells       IOPS      p50  MMIO per I/O  CPU at idle\n" +
		"  --------------------------------------------------------\n" +
		"  trap         200,000   600 us          1.02        0.1 %\n" +
		"  shadow     8,000,000  4.00 us     0.0000020        0.1 %\n"
	if got := table(results()); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	const drawn = "" +
		"  trap    # 200,000 IOPS\n" +
		"  shadow  ######################################## 8,000,000 IOPS\n" +
		"\n  shadow is 40.0 times as fast as trap.\n"
	if got := chart(results(), 80, false); got != drawn {
		t.Errorf("got\n%swant\n%s", got, drawn)
	}
	unknown := results()[:1]
	unknown[0].result.Idle = nil
	if got := table(unknown); !strings.Contains(got, "unknown") {
		t.Error(got)
	}
}

func TestSandboxLines(t *testing.T) {
	locked, missing := sandboxLines("seccomp: 47 system calls\nlandlock: NOT in force: this kernel has no Landlock (Linux 5.13)\nguestdrv: wrote 3 bytes\n\n")
	if len(locked) != 1 || locked[0] != "seccomp" || len(missing) != 1 || missing[0] != "landlock: this kernel has no Landlock (Linux 5.13)" {
		t.Errorf("%q, %q", locked, missing)
	}
}

// demoIn prepares the program with a temporary directory of its own, to see what it leaves there.
func demoIn(t *testing.T, args ...string) (cmd *exec.Cmd, tmp string, stdout, stderr *testrig.Buffer) {
	t.Helper()
	tmp = t.TempDir()
	cmd = exec.CommandContext(t.Context(), filepath.Join(bin, "demo"), append([]string{"--bin", bin}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	stdout, stderr = &testrig.Buffer{}, &testrig.Buffer{}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, tmp, stdout, stderr
}

func checkLeftovers(t *testing.T, tmp string) {
	t.Helper()
	left, err := os.ReadDir(tmp)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		line, err := os.ReadFile(p)
		if err == nil && bytes.Contains(line, []byte(tmp)) {
			t.Errorf("still running: %s %q", p, line)
		}
	}
}

func TestDemo(t *testing.T) {
	cmd, tmp, stdout, stderr := demoIn(t, "--runtime", "200ms")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	for _, s := range []string{"locked up by seccomp", "is the same", "\n  trap ", "\n  shadow ", "MMIO per I/O", "times as fast"} {
		if !strings.Contains(stdout.String(), s) {
			t.Errorf("%q is missing in\n%s", s, stdout)
		}
	}
	if strings.Contains(stdout.String(), "\x1b") || stderr.String() != "" {
		t.Errorf("control characters, or something on stderr: %q", stderr.String())
	}
	checkLeftovers(t, tmp)
}

func TestInterruptedDemoCleansUp(t *testing.T) {
	for when, begun := range map[string]func(tmp, stdout string) bool{
		"as soon as there is something to clean up": func(tmp, _ string) bool {
			left, err := os.ReadDir(tmp)
			return err == nil && len(left) > 0
		},
		"in a measurement": func(_, stdout string) bool { return strings.Contains(stdout, "The experiment of 2014") },
	} {
		cmd, tmp, stdout, stderr := demoIn(t, "--runtime", "100s")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for begin := time.Now(); !begun(tmp, stdout.String()); time.Sleep(time.Millisecond) {
			if time.Since(begin) > time.Minute {
				_ = cmd.Process.Kill()
				t.Fatalf("%s: it does not come to that: %s", when, stdout)
			}
		}
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		err := cmd.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || stderr.String() != "demo: interrupted\n" {
			t.Errorf("%s: %v, %q", when, err, stderr.String())
		}
		checkLeftovers(t, tmp)
	}
}

func TestFailedDemoCleansUp(t *testing.T) {
	cmd, tmp, _, stderr := demoIn(t, "--file", filepath.Join(t.TempDir(), "missing"))
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(stderr.String(), "missing") || strings.Count(stderr.String(), "\n") != 1 {
		t.Errorf("%v, %q", err, stderr.String())
	}
	checkLeftovers(t, tmp)
}
