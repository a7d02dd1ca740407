package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/doctor"
	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/guestdrv/device/faulty"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// doctorRig is a hostmed with a control socket, as programs at a shell, and a guest whose doorbells can be lost on their way.
type doctorRig struct {
	*testing.T
	bin     string
	control string
	socket  string
	guest   *guestdrv.Controller
	lose    atomic.Bool
}

func newDoctorRig(t *testing.T) *doctorRig {
	t.Helper()
	dir := t.TempDir()
	r := &doctorRig{T: t, control: filepath.Join(dir, "control"), socket: filepath.Join(dir, "guest")}
	hostmed, err := process.Binary(t.Context(), "hostmed", "", dir)
	r.must(err)
	r.bin, err = process.Binary(t.Context(), "nvmetrace", "", dir)
	r.must(err)
	var log testrig.Buffer
	d, err := process.StartHostmed(t.Context(), hostmed, &log, "--socket", r.socket, "--namespace", "mem:size=16MiB", "--control", r.control)
	r.must(err)
	t.Cleanup(func() { r.must(d.Stop()) })
	dev, err := devices.Open(t.Context(), "vfio-user:"+r.socket)
	r.must(err)
	bad := faulty.Wrap(dev)
	bad.SetHooks(faulty.Hooks{Ring: func(off, _ uint32) bool { return off == nvme.SQTailDoorbell(0, 0) || !r.lose.Load() }})
	r.guest, err = guestdrv.OpenDevice(t.Context(), bad, guestdrv.Options{Queues: 1})
	r.must(err)
	t.Cleanup(func() { r.must(r.guest.Close()) })
	return r
}

func (r *doctorRig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *doctorRig) run(args ...string) (code int, stdout, stderr string) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.bin, append([]string{"doctor"}, args...)...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		r.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// hang returns what says when a read, whose doorbell was lost, ends after all.
func (r *doctorRig) hang() chan error {
	r.Helper()
	ns, err := r.guest.Namespace(1)
	r.must(err)
	for range 100 {
		time.Sleep(20 * time.Millisecond) // for the device to fall asleep
		r.lose.Store(true)
		done := make(chan error, 1)
		go func() {
			_, err := ns.ReadAt(make([]byte, 4096), 0)
			done <- err
		}()
		select {
		case err := <-done: // it was awake, and so was not to be rung
			r.must(err)
			r.lose.Store(false)
		case <-time.After(300 * time.Millisecond):
			return done
		}
	}
	r.Fatal("no doorbell was lost")
	return nil
}

// TestDoctor is the doctor at a shell: a guest is well, hangs, is found out, woken, and well again.
func TestDoctor(t *testing.T) {
	r := newDoctorRig(t)
	code, out, stderr := r.run("--control", r.control, "--for", "400ms")
	if code != 0 || stderr != "" || !strings.Contains(out, "2 idle") || !strings.Contains(out, r.socket) {
		t.Errorf("well: exit %d\n%s%s", code, out, stderr)
	}
	done := r.hang()
	const sentence = "the driver stored its tail and did not ring although "
	file := filepath.Join(t.TempDir(), "hang.jsonl")
	code, out, stderr = r.run("--control", r.control, "--for", "400ms", "--record", file)
	if code != 1 || stderr != "nvmetrace: 1 broken\n" || !strings.Contains(out, sentence) || !strings.Contains(out, ": R1 in the guest's driver") || !strings.Contains(out, "--fix kick") {
		t.Errorf("hangs: exit %d\n%s%s", code, out, stderr)
	}
	if code, again, _ := r.run("--replay", file); code != 1 || again != out {
		t.Errorf("replayed: exit %d\n%s", code, again)
	}
	code, out, _ = r.run("--control", r.control, "--controller", r.socket, "--for", "400ms", "--json")
	var d diagnosis
	if err := json.Unmarshal([]byte(out), &d); err != nil || code != 1 || d.Samples < 4 || len(d.Findings) != 2 || d.Findings[1].Rule != "R1" || d.Findings[1].Side != doctor.Driver {
		t.Errorf("JSON: exit %d, %v\n%s", code, err, out)
	}
	select {
	case err := <-done:
		t.Fatalf("the doctor looked, and the read ended: %v", err)
	default:
	}
	r.lose.Store(false)
	code, out, stderr = r.run("--control", r.control, "--for", "400ms", "--fix", "kick")
	if code != 0 || stderr != "" || !strings.Contains(out, "queue 1 was kicked: it slept, and 1 in the SQ waited for it; consumed went from ") || !strings.Contains(out, "and it is idle") {
		t.Errorf("kicked: exit %d\n%s%s", code, out, stderr)
	}
	r.must(<-done)
}

// TestDoctorErrors: what it cannot look at is one line, and exit 2.
func TestDoctorErrors(t *testing.T) {
	r := &doctorRig{T: t}
	dir := t.TempDir()
	var err error
	r.bin, err = process.Binary(t.Context(), "nvmetrace", "", dir)
	r.must(err)
	bad := filepath.Join(dir, "bad")
	r.must(os.WriteFile(bad, []byte("{\n"), 0o600))
	hostile := filepath.Join(dir, "hostile")
	r.must(os.WriteFile(hostile, []byte(`{"version":1,"taken_ns":1,"controllers":[{"socket":"\u001b[2J","queues":[{"qid":1,"state":"\u001b[0m"}]}]}`+"\n"), 0o600))
	for _, x := range []struct {
		args []string
		want string
	}{
		{nil, "--control=PATH"},
		{[]string{"--control", "a", "--replay", "b"}, "give one of them"},
		{[]string{"--replay", "b", "--fix", "kick"}, "need a running hostmed"},
		{[]string{"--control", "a", "--for", "1ms"}, "50ms to 10m"},
		{[]string{"--control", filepath.Join(dir, "none")}, "start hostmed with --control"},
		{[]string{"--replay", filepath.Join(dir, "none")}, "no such file"},
		{[]string{"--replay", bad}, "line 1 is no sample"},
		{[]string{"--control", "a", "--record", filepath.Join(dir, "none", "x")}, "no such file"},
	} {
		code, out, stderr := r.run(x.args...)
		if code != 2 || out != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, x.want) {
			t.Errorf("%v: exit %d, %q, %q", x.args, code, out, stderr)
		}
	}
	busy := filepath.Join(dir, "busy")
	r.must(os.WriteFile(busy, []byte(`{"version":1,"taken_ns":1,"controllers":[{"socket":"s","busy_workers":[3],"queues":[]}],"views":[{"socket":"s","qid":2,"worker":3,"doorbells":true,"tail":17,"tail_event":9}]}`+"\n"), 0o600))
	if code, out, stderr := r.run("--replay", busy); code != 2 || !strings.Contains(out, "worker 3 has not answered") || !strings.Contains(out, "queue 2: tail 17 in the page, event index 9") || !strings.Contains(stderr, "could not look") {
		t.Errorf("exit %d, %q, %q", code, out, stderr)
	}
	if code, out, _ := r.run("--replay", hostile); code != 0 || strings.Contains(out, "\x1b") {
		t.Errorf("exit %d, %q", code, out)
	}
}
