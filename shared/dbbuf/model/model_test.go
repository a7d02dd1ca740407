package model

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Bounds of one run of the checker. A search that hits one is a failure, never a pass.
const (
	memLimitMiB = 512
	maxDepth    = 1_000_000
	runTimeout  = 2 * time.Minute
)

// Violations as pan reports them.
const (
	lostWakeup    = "asleep&&"     // a monitor: somebody sleeps on work that nobody will tell of
	lostInterrupt = "((drvasleep&" // the same on the completion side: the driver
	lostKick      = "((devasleep&" // and the device
	staleEntry    = "==lap)"       // an entry read before the driver's store to it
	foreignWrite  = "lent"         // the device wrote to memory that it no longer has
	phantomWork   = "(unread>0)"   // a command consumed that nobody published
	stuck         = "invalid end state"
)

func TestModelHolds(t *testing.T) {
	need(t, "spin", "spin")
	need(t, "gcc", "gcc")
	for _, c := range []struct {
		file string
		n    int
		long bool
	}{
		{"doorbell.pml", 2, false},
		{"doorbell.pml", 3, false},
		{"doorbell.pml", 4, true},
		{"quiet.pml", 2, false},
		{"quiet.pml", 3, false},
		{"quiet.pml", 4, true},
		{"reset.pml", 2, false},
		{"reset.pml", 3, true},
	} {
		t.Run(fmt.Sprintf("%s/N=%d", c.file, c.n), func(t *testing.T) {
			if c.long && testing.Short() {
				t.Skip("short: smaller rings only")
			}
			t.Parallel()
			out := check(t, c.file, "-O1", fmt.Sprintf("-DN=%d", c.n))
			if !strings.Contains(out, "errors: 0\n") {
				t.Fatalf("violated:\n%s", out)
			}
			for _, incomplete := range []string{"Search not completed", "max search depth too small", "MEMLIM", "truncated"} {
				if strings.Contains(out, incomplete) {
					t.Fatalf("search is incomplete (%s):\n%s", incomplete, out)
				}
			}
			// A step that no execution takes would make the result empty.
			for _, line := range unreached(out) {
				t.Errorf("never executed: %s", line)
			}
		})
	}
}

func TestMutationCaught(t *testing.T) {
	if testing.Short() {
		t.Skip("short: the models alone")
	}
	need(t, "spin", "spin")
	need(t, "gcc", "gcc")
	for _, c := range []struct{ file, mutation, want string }{
		{"doorbell.pml", "NO_DRIVER_BARRIER", lostWakeup},
		{"doorbell.pml", "NO_ARM_BARRIER", lostWakeup},
		{"doorbell.pml", "IGNORE_ARM", lostWakeup},
		{"doorbell.pml", "CLEAR_KICK_LATE", lostWakeup},
		{"doorbell.pml", "SLEEP_ON_MARKER", lostWakeup},
		{"doorbell.pml", "TAIL_BEFORE_ENTRY", staleEntry},

		{"quiet.pml", "NO_QUIET_BARRIER", lostInterrupt},
		{"quiet.pml", "NO_CQE_BARRIER", lostInterrupt},
		{"quiet.pml", "NO_RECHECK", lostInterrupt},
		{"quiet.pml", "CLEAR_IRQ_LATE", lostInterrupt},
		{"quiet.pml", "NO_DRIVER_BARRIER", lostKick},
		{"quiet.pml", "NO_ARM_BARRIER", lostKick},
		{"quiet.pml", "IGNORE_ARM", lostKick},
		{"quiet.pml", "ARM_AT_TAIL", lostKick},
		{"quiet.pml", "CLEAR_KICK_LATE", lostKick},

		{"reset.pml", "NO_REARM_AFTER_RESET", lostWakeup},
		{"reset.pml", "NO_RECONFIG", lostWakeup},
		{"reset.pml", "NO_DRAIN", foreignWrite},
		{"reset.pml", "KEEP_PAGE", foreignWrite},
		{"reset.pml", "NO_SEED", phantomWork},
		{"reset.pml", "STALE_QUEUE", phantomWork},
		{"reset.pml", "STOP_NOT_PROBED", stuck},
	} {
		t.Run(c.file+"/"+c.mutation, func(t *testing.T) {
			t.Parallel()
			src, err := os.ReadFile(c.file)
			if err != nil {
				t.Fatal(err)
			}
			if !regexp.MustCompile(`(?m)^#(el)?if.*\b` + c.mutation + `\b`).Match(src) {
				t.Fatalf("%s has no mutation %s", c.file, c.mutation)
			}
			out := check(t, c.file, "-O0", "-DN=3", "-D"+c.mutation) // found within thousands of states: compiling is what takes time
			if !strings.Contains(out, "errors: 1\n") {
				t.Fatalf("not caught:\n%s", out)
			}
			violation := regexp.MustCompile(`(?m)^pan:1: .*$`).FindString(out)
			if !strings.Contains(violation, c.want) {
				t.Fatalf("caught as %q, want a violation with %q", violation, c.want)
			}
		})
	}
}

// check generates, compiles and runs the checker of one model and returns what it printed.
func check(t *testing.T, file, optimize string, defines ...string) string {
	t.Helper()
	dir := t.TempDir()
	// Copied by this process, so that go test's cache knows what the result stands on.
	for _, name := range []string{"tso.pml", file} {
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), src, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run(t, dir, "spin", append(append([]string{"-a"}, defines...), file)...)
	// Without -DCOLLAPSE, which halves the memory and doubles the time: the largest of the models has 400 MiB.
	run(t, dir, "gcc", optimize, "-w", "-DSAFETY", "-DSFH", fmt.Sprintf("-DMEMLIM=%d", memLimitMiB), "-o", "pan", "pan.c")
	// -w22: a hash table of 32 MiB, enough for the largest of the models.
	return run(t, dir, filepath.Join(dir, "pan"), fmt.Sprintf("-m%d", maxDepth), "-w22")
}

func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), errors.Join(err, ctx.Err()), out)
	}
	return string(out)
}

// unreached returns pan's list of statements that no execution took, without the ends of endless processes.
func unreached(out string) []string {
	var lines []string
	for _, line := range regexp.MustCompile(`(?m)^\t\S+\.pml:\d+, state \d+, .*$`).FindAllString(out, -1) {
		if !strings.HasSuffix(line, `"-end-"`) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// need skips the test where a tool is missing, except in CI, where that is a failure.
func need(t *testing.T, tool, pkg string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing and CI must not skip: apt-get install %s", tool, pkg)
	}
	t.Skipf("%s is missing: apt-get install %s (Debian), or make deps", tool, pkg)
}
