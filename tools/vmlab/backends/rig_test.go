package backends

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { os.Exit(withHost(m)) }

// shared is the machine of all tests, and where its files are: in memory, so that no disk is waited for.
var shared struct {
	sync.Mutex
	vm  *vmlab.VM
	dir string
	n   int // names that were given
}

func withHost(m *testing.M) (code int) {
	code = m.Run()
	if shared.vm != nil {
		if err := shared.vm.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
	if code != 0 {
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// host is the machine that plays the host.
type host struct {
	*vmlab.VM
	dir       string // of images, on this machine
	traceFrom int64  // where in the trace file the last call of traced began
}

const traceFile = "qemu.trace"

// open returns the host, booted if it is not up: a test that made QEMU or the kernel crash has failed, and the next one gets another.
func open(t *testing.T) *host {
	t.Helper()
	lab := vmlab.Open(t)
	shared.Lock()
	defer shared.Unlock()
	if shared.dir == "" {
		dir, err := os.MkdirTemp(tmpfs(), "backends-")
		if err != nil {
			t.Fatal(err)
		}
		shared.dir = dir
	}
	if shared.vm != nil && shared.vm.Ended() {
		if err := shared.vm.Close(); err != nil {
			t.Error(err)
		}
		shared.vm = nil
	}
	if shared.vm == nil {
		vm, err := lab.Start(context.WithoutCancel(t.Context()), vmlab.Config{
			MemoryMiB: 1536, VIOMMU: true, Ports: 12, Programs: []string{"hostmed", "guestdrv", guestProgram, "conformance"},
			Append: "intel_iommu=on iommu=pt nvme.poll_queues=1",
			Args:   append([]string{"-D", filepath.Join(shared.dir, traceFile)}, twins(t, shared.dir)...),
		})
		if err != nil {
			t.Fatal(err)
		}
		shared.vm = vm
		t.Logf("booted in %.1f s", vm.BootTime().Seconds())
	}
	h := &host{VM: shared.vm, dir: shared.dir}
	h.Run(t, "dmesg -c >/dev/null") // what earlier tests did to the kernel is theirs to look at
	h.tellIfFailed(t)
	return h
}

// tellIfFailed shows what the host said at the end of a test that has failed.
func (h *host) tellIfFailed(t *testing.T) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the console:\n%s", tail(h.Console(), 60))
			if !h.Ended() {
				if r, err := h.Exec(context.Background(), "dmesg | tail -40"); err == nil {
					t.Logf("end of the kernel's log:\n%s", r.Stdout)
				}
			}
		}
	})
}

func tmpfs() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// name returns a name that no other thing of these tests has.
func (h *host) name(kind string) string {
	shared.Lock()
	defer shared.Unlock()
	shared.n++
	return fmt.Sprintf("%s%d", kind, shared.n)
}

// atEnd runs a command when t has ended, if the host still runs.
func (h *host) atEnd(t *testing.T, command string) {
	t.Cleanup(func() {
		if h.Ended() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if r, err := h.Exec(ctx, command); err != nil {
			t.Error(err)
		} else if r.Exit != 0 {
			t.Errorf("%s: exit %d: %s%s", command, r.Exit, r.Stdout, r.Stderr)
		}
	})
}

// patience is for what takes a moment on an idle machine.
const patience = 40 * time.Second

// until waits until a shell condition holds in the host.
func (h *host) until(t *testing.T, what, condition string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := h.Exec(ctx, "until "+condition+"; do sleep 0.05; done"); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// conformance asks a controller for what the specification demands, with flags that choose cases, and returns how many passed. It takes a minute on a slow machine.
func (h *host) conformance(t *testing.T, device, flags string) (passed int) {
	t.Helper()
	var out struct {
		Passed, Failed, Skipped int
		Cases                   []struct{ ID, Result, Seen string }
	}
	command := "conformance run " + device + " --json --nsid 1 " + flags
	r := h.start(t, command).result()
	if err := json.Unmarshal([]byte(r.Stdout), &out); err != nil {
		t.Fatalf("%s: %v: exit %d\n%s\n%s", command, err, r.Exit, r.Stdout, r.Stderr)
	}
	t.Logf("%s: %d passed, %d failed, %d skipped", command, out.Passed, out.Failed, out.Skipped)
	for _, c := range out.Cases {
		if c.Result == "fail" {
			t.Errorf("%s: %s: %s", command, c.ID, c.Seen)
		}
	}
	if (r.Exit == 0) != (out.Failed == 0) {
		t.Errorf("%s: exit %d: %s", command, r.Exit, r.Stderr)
	}
	return out.Passed
}

// job is a command that runs in the background.
type job struct {
	t       *testing.T
	command string
	done    chan struct{}
	r       vmlab.Result
	err     error
}

// start runs a command in the background, for two minutes at the most. The test waits for its end.
func (h *host) start(t *testing.T, command string) *job {
	t.Helper()
	j := &job{t: t, command: command, done: make(chan struct{})}
	go func() {
		defer close(j.done)
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		j.r, j.err = h.Exec(ctx, command)
	}()
	t.Cleanup(func() { <-j.done })
	return j
}

// ended says whether the command has ended.
func (j *job) ended() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

// result waits for the command's end, however it ended.
func (j *job) result() vmlab.Result {
	j.t.Helper()
	<-j.done
	if j.err != nil {
		j.t.Fatal(j.err)
	}
	return j.r
}

// wait waits until the command has ended well, and returns what it printed.
func (j *job) wait() string {
	j.t.Helper()
	if r := j.result(); r.Exit != 0 {
		j.t.Fatalf("%s: exit %d\n%s\n%s", j.command, r.Exit, tail(r.Stdout, 40), tail(r.Stderr, 40))
	}
	return j.r.Stdout
}

// figures are what guestdrv bench --json prints, as far as it is looked at here.
type figures struct {
	IOPS    float64 `json:"iops"`
	MMIO    float64 `json:"mmio_per_io"`
	Errors  uint64  `json:"errors"`
	Wrong   uint64  `json:"verify_errors"`
	Seconds float64 `json:"seconds"`
	Latency struct {
		P50  float64 `json:"p50"`
		P99  float64 `json:"p99"`
		Max  float64 `json:"max"`
		Mean float64 `json:"mean"`
	} `json:"lat_ns"`
	Trouble *struct {
		Timeouts uint64 `json:"timeouts"`
		Aborts   uint64 `json:"aborts"`
		Resets   uint64 `json:"resets"`
	} `json:"trouble"`
}

func parseFigures(t *testing.T, out string) (f figures) {
	t.Helper()
	if err := json.Unmarshal([]byte(out[max(0, strings.Index(out, "{")):]), &f); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	return f
}

const verifyCommand = "guestdrv bench %s --json --verify --rw randrw %s"

// startVerify puts a checked load on a device that guestdrv takes. flags say the rest: --span, --qd, --jobs, --runtime, ...
func (h *host) startVerify(t *testing.T, device, flags string) *job {
	t.Helper()
	return h.start(t, fmt.Sprintf(verifyCommand, device, flags))
}

// verified waits for a checked load, in which nothing may have gone wrong.
func (j *job) verified() figures {
	j.t.Helper()
	f := parseFigures(j.t, j.wait())
	if f.Errors != 0 || f.Wrong != 0 || f.IOPS == 0 || f.Trouble != nil {
		j.t.Fatalf("%s: %s", j.command, j.r.Stdout)
	}
	return f
}

// verify is startVerify and verified.
func (h *host) verify(t *testing.T, device, flags string) figures {
	t.Helper()
	return h.startVerify(t, device, flags).verified()
}

// sum is a checksum of a range of a block device of the host, read by its kernel's driver past its cache. It is in units of 4 KiB.
func (h *host) sum(t *testing.T, dev string, offset, length int) string {
	t.Helper()
	if offset%4096 != 0 || length%4096 != 0 {
		t.Fatalf("a range of %d at %d is not in 4 KiB", length, offset)
	}
	out := h.Run(t, fmt.Sprintf("dd if=%s bs=64k iflag=direct,skip_bytes,count_bytes skip=%d count=%d 2>/tmp/dd.err | sha256sum; grep -q ' bytes' /tmp/dd.err || cat /tmp/dd.err >&2", dev, offset, length))
	return strings.Fields(out)[0]
}

// random writes a file of random bytes in the host and returns its path, and its checksum.
func (h *host) random(t *testing.T, bytes int) (path, sum string) {
	t.Helper()
	path = "/tmp/" + h.name("random")
	out := h.Run(t, fmt.Sprintf("head -c %d /dev/urandom > %s && sha256sum %s", bytes, path, path))
	h.atEnd(t, "rm -f "+path)
	return path, strings.Fields(out)[0]
}

// traced returns the lines that QEMU traced of events, which may have wildcards, while do ran. It waits for nothing: what the
// host has seen done has been traced.
func (h *host) traced(t *testing.T, events string, do func()) []string {
	t.Helper()
	file := filepath.Join(h.dir, traceFile)
	h.traceFrom = 0
	if st, err := os.Stat(file); err == nil {
		h.traceFrom = st.Size()
	} else if !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	set := func(on bool) {
		for _, e := range strings.Fields(events) {
			if _, err := h.QMP(context.WithoutCancel(t.Context()), "trace-event-set-state", map[string]any{"name": e, "enable": on}); err != nil {
				t.Error(err)
			}
		}
	}
	set(true)
	func() {
		defer set(false)
		do()
	}()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b[min(h.traceFrom, int64(len(b))):])), "\n")
}
