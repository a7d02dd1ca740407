package trace

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// This test's binary is its own child, in a role.
const (
	envChild = "SHADOWBELL_TRACE_CHILD"

	holds = "holds" // opens, drops its privileges, and answers each line with a snapshot
	least = "least" // has CAP_BPF and CAP_PERFMON only, and opens
	poor  = "poor"  // has no privileges
)

// answer is a line of the child's.
type answer struct {
	Err      string
	Programs []ebpf.ProgramID
	Links    []link.ID
	Writes   uint64
	Caps     string
	Kernel   *Kernel
}

func child(role string) {
	var a answer
	var err error
	switch role {
	case holds:
		err = hold(&a)
	case least:
		if err = capsetAll(1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON); err == nil {
			err = hold(&a)
		}
	case poor:
		if err = DropPrivileges(); err == nil {
			_, err = Open(context.Background(), Options{Block: true})
			a.Kernel = Probe()
		}
	}
	if err != nil {
		a.Err = err.Error()
		say(a)
	}
	os.Exit(0)
}

func say(a answer) {
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		os.Exit(3)
	}
}

func hold(a *answer) error {
	t, err := Open(context.Background(), Options{Block: true, Events: true})
	if err != nil {
		return err
	}
	for _, p := range t.programs {
		info, err := p.Info()
		if err != nil {
			return err
		}
		id, _ := info.ID()
		a.Programs = append(a.Programs, id)
	}
	for _, l := range t.links {
		info, err := l.Info()
		if err != nil {
			return err
		}
		a.Links = append(a.Links, info.ID)
	}
	if err := DropPrivileges(); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "Cap") || strings.HasPrefix(line, "NoNewPrivs") {
			a.Caps += line
		}
	}
	say(*a)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		s, err := t.Snapshot()
		if err != nil {
			return err
		}
		a.Writes = 0
		for _, c := range s.Block {
			if c.Disk == in.Text() && c.Op == 'W' {
				a.Writes = c.Count
			}
		}
		say(*a)
	}
	return nil
}

// start runs the child. It ends with the test.
func start(t *testing.T, role string) (*exec.Cmd, func() answer, io.Writer) {
	t.Helper()
	needBPF(t)
	if _, _, no := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0); no == syscall.ENOTSUP {
		if os.Getenv("CI") == "true" {
			t.Fatal("linked with cgo, as for -race: privileges cannot be dropped; CI runs this package with CGO_ENABLED=0")
		}
		t.Skip("linked with cgo, as for -race: privileges cannot be dropped")
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envChild+"="+role)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	answers := json.NewDecoder(out)
	return cmd, func() answer {
		t.Helper()
		var a answer
		if err := answers.Decode(&a); err != nil {
			t.Fatal(err)
		}
		return a
	}, in
}

// TestLeastCapabilities opens with the two that are documented, drops them, and counts.
func TestLeastCapabilities(t *testing.T) {
	disk := loopDisk(t, 1<<20)
	_, next, in := start(t, least)
	if a := next(); a.Err != "" || len(a.Programs) < 3 {
		t.Fatalf("%+v", a)
	}
	direct(t, disk, 20, 4096, true)
	if _, err := fmt.Fprintln(in, disk); err != nil {
		t.Fatal(err)
	}
	if a := next(); a.Err != "" || a.Writes != 20 {
		t.Errorf("%d of 20 writes, %s", a.Writes, a.Err)
	}
}

// TestNothingStaysAfterSIGKILL kills a process that traces, after it was shown to count without any privilege.
func TestNothingStaysAfterSIGKILL(t *testing.T) {
	disk := loopDisk(t, 1<<20)
	cmd, next, in := start(t, holds)
	a := next()
	if a.Err != "" || len(a.Programs) < 3 || len(a.Links) < 3 {
		t.Fatalf("%+v", a)
	}
	for line := range strings.Lines(a.Caps) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		if want := map[string]string{"NoNewPrivs": "1"}[name]; value != want && value != "0000000000000000" {
			t.Errorf("after DropPrivileges: %s", line)
		}
	}
	direct(t, disk, 50, 4096, true)
	if _, err := fmt.Fprintln(in, disk); err != nil {
		t.Fatal(err)
	}
	if got := next(); got.Err != "" || got.Writes != 50 {
		t.Errorf("without privileges: %d of 50 writes, %s", got.Writes, got.Err)
	}
	there := func() (n int) {
		for _, id := range a.Programs {
			if p, err := ebpf.NewProgramFromID(id); err == nil {
				n++
				p.Close()
			} else if !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		for _, id := range a.Links {
			if l, err := link.NewFromID(id); err == nil {
				n++
				l.Close()
			} else if !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		return n
	}
	if n := there(); n != len(a.Programs)+len(a.Links) {
		t.Fatalf("%d of %d programs and %d links are there before", n, len(a.Programs), len(a.Links))
	}
	if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for limit := time.Now().Add(20 * time.Second); there() > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) { // the kernel frees them after a grace period
			t.Fatalf("%d programs and links are still there", there())
		}
	}
}

// TestWithoutCapabilities: the error names what is missing and how to get it, in one line; Probe says the same and what follows.
func TestWithoutCapabilities(t *testing.T) {
	_, next, _ := start(t, poor)
	a := next()
	for _, want := range []string{"CAP_BPF", "CAP_PERFMON", "run as root, or: setcap cap_bpf,cap_perfmon+ep "} {
		if !strings.Contains(a.Err, want) || strings.Contains(a.Err, "\n") {
			t.Errorf("%q without %q, or of several lines", a.Err, want)
		}
	}
	k := a.Kernel
	if !slices.Equal(k.Missing, []string{"CAP_BPF", "CAP_PERFMON"}) || len(k.Have) > 0 || !strings.Contains(k.Refused, "CAP_BPF") {
		t.Errorf("have %v, missing %v, refused %q", k.Have, k.Missing, k.Refused)
	}
	for _, c := range k.Commands {
		if needs := len(c.Needs) > 0; c.Works == needs || needs && !strings.Contains(c.Why, "CAP_BPF") {
			t.Errorf("%+v", c)
		}
	}
}

// TestProbe is of this machine, whatever it has: what Probe says is what Open does.
func TestProbe(t *testing.T) {
	needBPF(t)
	k := Probe()
	if k.Refused != "" || k.Release == "" || len(k.Hooks) != len(places) || len(k.Commands) != len(commands) {
		t.Fatalf("%+v", k)
	}
	tr, err := Open(t.Context(), Options{Block: true, KVM: true, Driver: true, Events: true})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	for i, h := range tr.Hooks() {
		h.Hits, h.Missed = 0, 0
		if k.Hooks[i] != h {
			t.Errorf("Probe: %+v\nOpen:  %+v", k.Hooks[i], h)
		}
		if h.Attached == (h.Why != "") || h.Attached != (h.How != "") {
			t.Errorf("%+v", h)
		}
	}
	for _, c := range k.Commands {
		t.Logf("%-10s works %-5v %s", c.Name, c.Works, c.Why)
		if c.Name == "snoop" && c.Works != (tr.Missing(NVMe) == nil) {
			t.Errorf("%+v, but %v", c, tr.Missing(NVMe))
		}
	}
	for _, h := range k.Hooks {
		t.Logf("%-24s %-5v %-10s %s", h.Name, h.Attached, h.How, h.Why)
	}
	t.Logf("BTF %q, modules %v, tracefs %q, lockdown %q, unprivileged %d, have %v, driver %q", k.BTF, k.Modules, k.Tracefs, k.Lockdown, k.Unprivileged, k.Have, k.Driver)
}
