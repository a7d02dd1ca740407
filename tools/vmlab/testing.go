package vmlab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// Open returns the lab, set up if need be. A test that cannot have it fails; with -short it is
// skipped, since a machine takes seconds to boot, and so it is on a developer's machine that is no x86-64.
func Open(t testing.TB) *Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines: not with -short")
	}
	if runtime.GOARCH != "amd64" && os.Getenv("CI") != "true" {
		t.Skip("the lab needs an x86-64 machine")
	}
	l, err := Setup(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Boot is Start for a test: the machine is killed at its end, and the end of its console shown if it failed.
func (l *Lab) Boot(t testing.TB, c Config) *VM {
	t.Helper()
	vm, err := l.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the console:\n%s", lastLines(vm.Console(), tailLines))
		}
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return vm
}

// runWithin is the limit of Run; commands that take longer go through Exec with a deadline.
const runWithin = time.Minute

// Run runs a shell command in the guest and returns what it wrote to standard output, without
// the last line end. The test ends if it exits with anything but 0, or takes more than a minute.
func (vm *VM) Run(t testing.TB, command string) string {
	t.Helper()
	return vm.RunWithin(t, runWithin, command)
}

// RunWithin is Run with a limit of its own.
func (vm *VM) RunWithin(t testing.TB, limit time.Duration, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	r, err := vm.Exec(ctx, command)
	if err != nil {
		t.Fatal(err)
	}
	if r.Exit != 0 {
		t.Fatalf("guest: %s: exit %d\n%s", command, r.Exit, lastLines(r.Stdout+"\n"+r.Stderr, 40))
	}
	return strings.TrimSuffix(r.Stdout, "\n")
}

// Try runs a command that may fail and returns everything; the test ends only if the guest does not answer.
func (vm *VM) Try(t testing.TB, command string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runWithin)
	defer cancel()
	r, err := vm.Exec(ctx, command)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Dmesg returns the guest's kernel log.
func (vm *VM) Dmesg(t testing.TB) string {
	t.Helper()
	return vm.Run(t, "dmesg")
}

// CheckDmesg fails the test for each line of the kernel log that complains. Lines that match one of allowed are expected.
func (vm *VM) CheckDmesg(t testing.TB, allowed ...string) {
	t.Helper()
	for _, line := range complaints(vm.Run(t, "dmesg -r"), allowed) {
		t.Errorf("the guest's kernel complains: %s", line)
	}
}

var (
	// logLine is a line of dmesg -r: facility*8 + level, then the text.
	logLine = regexp.MustCompile(`^<(\d+)>(.*)$`)
	// drive is what a line about a drive has in it.
	drive = regexp.MustCompile(`(?i)nvme|vfio`)
	// unhappy is what is wrong at any level, in a line about a drive: the kernel tells of some quirks and resets as mere information.
	unhappy = regexp.MustCompile(`(?i)quirk|time(d )?out|abort|reset|fail|error|invalid|unexpected|warn|ignor|missing|mismatch|duplicate|globally|bogus|broken|corrupt` +
		`|unable|disabl|not ready|can't|cannot|could not|don't match|not supported|removing|down\b|stuck|bug\b`)
	// broken is what is wrong whatever it is about.
	broken = regexp.MustCompile(`(?i)I/O error|blk_update_request|medium error|could not locate request|EXT4-fs (error|warning)|JBD2: .*(error|abort)|hung task|blocked for more than|soft lockup|rcu.*detected stall|irq \d+: nobody cared|\bspurious` +
		`|(?-i:WARNING:|BUG:|\bOops\b|Call Trace)`)
)

const levelWarning = 4

// complaints returns the lines of a raw kernel log that say of a drive, or of the kernel, that something is wrong: of a
// drive everything from a warning on, and what sounds like one.
func complaints(log string, allowed []string) []string {
	var bad []string
	for line := range strings.Lines(log) {
		level, text := levelWarning, strings.TrimSpace(line)
		if m := logLine.FindStringSubmatch(text); m != nil {
			n, _ := strconv.Atoi(m[1])
			level, text = n&7, m[2]
		}
		if strings.Contains(text, "ommand line: ") {
			continue // it has the names of parameters
		}
		if ofDrive := drive.MatchString(text); broken.MatchString(text) || ofDrive && (level <= levelWarning || unhappy.MatchString(text)) {
			if !matchesAny(text, allowed) {
				bad = append(bad, text)
			}
		}
	}
	return bad
}

func matchesAny(line string, expressions []string) bool {
	for _, e := range expressions {
		if regexp.MustCompile(e).MatchString(line) {
			return true
		}
	}
	return false
}

// Disk is DiskAt for a test.
func (vm *VM) Disk(t testing.TB, i int) Disk {
	t.Helper()
	d, err := vm.DiskAt(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Plug is HotAdd for a test. At the end of t, which may be a subtest of the one that booted, the guest lets go of
// the disk; its server must live until then: start it before, or with the outer t.
func (vm *VM) Plug(t testing.TB, d Device) Disk {
	t.Helper()
	disk, err := vm.HotAdd(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if vm.Ended() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := vm.Forget(ctx, disk); err != nil {
			t.Error(err)
		}
	})
	return disk
}

// Hostmed is Serve for a configuration that says no subsystems, and returns the sockets of its controllers.
func Hostmed(t testing.TB, c hostmed.Config) []string {
	t.Helper()
	Serve(t, &c)
	var sockets []string
	for _, cc := range c.Controllers {
		sockets = append(sockets, cc.Socket)
	}
	return sockets
}

// Serve runs what c says in this process until the end of the test, and returns it. Controllers without a socket get one, which is put into
// c. What hostmed logged is shown if the test failed.
//
// QEMU may abort when a server goes under a running guest, so start it before the machine: what is started first ends last.
func Serve(t testing.TB, c *hostmed.Config) *hostmed.Mediator {
	t.Helper()
	log := &testrig.Buffer{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of hostmed's log:\n%s", lastLines(log.String(), tailLines))
		}
	})
	if c.Logger == nil {
		c.Logger = hclog.New(&hclog.LoggerOptions{Name: "hostmed", Level: hclog.Debug, Output: log})
	}
	dir, n := shortDir(t), 0
	place := func(list []hostmed.ControllerConfig) {
		for i := range list {
			if list[i].Socket == "" {
				list[i].Socket = filepath.Join(dir, fmt.Sprintf("%d.sock", n))
				n++
			}
		}
	}
	place(c.Controllers)
	for _, s := range c.Subsystems {
		place(s.Controllers)
	}
	m, err := hostmed.New(*c)
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	return m
}

// Controller is Hostmed with one controller, and returns it as a device.
func Controller(t testing.TB, doorbells hostmed.DoorbellMode, namespaces ...string) Device {
	t.Helper()
	return VFIOUser(Hostmed(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{Namespaces: namespaces, Doorbells: doorbells}}})[0])
}

// HostmedProcess runs `hostmed serve` with args as a process of its own, for tests that kill it or that measure it. It has ended
// at the end of the test; if the test ended it in order before (Stop), that is fine too.
func HostmedProcess(t testing.TB, args ...string) *process.Daemon {
	t.Helper()
	b, err := buildProgram(t.Context(), "hostmed")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "hostmed")
	if err := os.WriteFile(bin, b, 0o755); err != nil {
		t.Fatal(err)
	}
	log := &testrig.Buffer{}
	d, err := process.StartHostmed(t.Context(), bin, log, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := d.Stop()
		if t.Failed() {
			t.Logf("hostmed: %v; end of its log:\n%s", err, lastLines(log.String(), tailLines))
		}
	})
	return d
}

// shortDir is a directory whose sockets have names that are short enough, which those in t.TempDir need not have.
func shortDir(t testing.TB) string {
	t.Helper()
	s, err := newScratch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.remove(); err != nil {
			t.Error(err)
		}
	})
	return s.path
}
