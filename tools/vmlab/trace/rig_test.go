package trace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	diskMiB = 64
	// slowIOPS is what the second controller's disk does: 8 at a time take 80 ms each, which hides what fio takes to look at an emulated CPU.
	slowIOPS = 100
)

// guest has two controllers of QEMU's own: a fast one and a slow one.
type guest struct {
	*vmlab.VM
	fast, slow vmlab.Disk
	preempts   bool // its kernel preempts tracepoints
}

func boot(t *testing.T, kernel vmlab.Kernel) *guest {
	t.Helper()
	lab := vmlab.Open(t)
	dir := t.TempDir()
	binary := filepath.Join(dir, "counted")
	build := exec.Command("go", "build", "-o", binary, "./counted")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	images := [2]string{filepath.Join(dir, "fast"), filepath.Join(dir, "slow")}
	for _, name := range images {
		if err := os.WriteFile(name, make([]byte, diskMiB<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	slow := vmlab.Device{Props: map[string]any{"driver": "nvme", "serial": "slow", "max_ioqpairs": 4, "drive": "slow"}}
	vm := lab.Boot(t, vmlab.Config{
		Kernel: kernel, Devices: []vmlab.Device{vmlab.QEMUNVMe(images[0], "fast"), slow}, Files: map[string]string{"/usr/bin/counted": binary},
		Args: []string{"-drive", fmt.Sprintf("file=%s,if=none,id=slow,format=raw,cache=unsafe,throttling.iops-total=%d", images[1], slowIOPS)},
	})
	return &guest{VM: vm, fast: vm.Disk(t, 0), slow: vm.Disk(t, 1), preempts: kernel == vmlab.Backports}
}

// fioJob is what fio's JSON says of one job.
type fioJob struct {
	Read   fioSide `json:"read"`
	Write  fioSide `json:"write"`
	Trim   fioSide `json:"trim"`
	Errors uint64  `json:"total_err"`
	Sync   struct {
		Total uint64 `json:"total_ios"`
	} `json:"sync"`
}

type fioSide struct {
	Total uint64 `json:"total_ios"`
	Bytes uint64 `json:"io_bytes"`
	CLat  struct {
		Mean       float64           `json:"mean"`
		Percentile map[string]uint64 `json:"percentile"`
	} `json:"clat_ns"`
}

// seen is what was counted while a command ran.
type seen struct {
	*trace.Snapshot // what came between before and after
	Events          []trace.Event
	Hooks           map[string]trace.Hook
	Lost            trace.Losses
	Header          trace.Header
	Jobs            []fioJob
	Took            time.Duration
}

// fio runs it with what flags say for counted.
func (g *guest) fio(t *testing.T, flags string, args ...string) *seen {
	t.Helper()
	begin := time.Now()
	out := g.RunWithin(t, 2*time.Minute, fmt.Sprintf("counted %s -file /tmp/record -out /tmp/fio -- fio --output-format=json %s", flags, strings.Join(args, " ")))
	s := &seen{Hooks: map[string]trace.Hook{}, Took: time.Since(begin)}
	var report struct {
		Hooks  []trace.Hook
		Losses trace.Losses
		Events uint64
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.Lost = report.Losses
	for _, h := range report.Hooks {
		s.Hooks[h.Name] = h
	}
	var jobs struct {
		Jobs []fioJob `json:"jobs"`
	}
	printed := g.file(t, "/tmp/fio")
	if err := json.Unmarshal(printed[max(bytes.IndexByte(printed, '{'), 0):], &jobs); err != nil { // notes come before it
		t.Fatalf("%v: %s", err, printed)
	}
	s.Jobs = jobs.Jobs
	s.replay(t, g.file(t, "/tmp/record"))
	if uint64(len(s.Events)) != report.Events {
		t.Errorf("%d events in the record, %d were read", len(s.Events), report.Events)
	}
	return s
}

func (g *guest) file(t *testing.T, name string) []byte {
	t.Helper()
	b, err := g.ReadFile(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// replay reads the record on this side.
func (s *seen) replay(t *testing.T, file []byte) {
	t.Helper()
	r, err := trace.NewReader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	s.Header = r.Header()
	var snapshots []*trace.Snapshot
	for {
		record, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if record.Snapshot != nil {
			snapshots = append(snapshots, record.Snapshot)
		} else {
			s.Events = append(s.Events, record.Event)
		}
	}
	if len(snapshots) != 2 {
		t.Fatalf("%d snapshots", len(snapshots))
	}
	s.Snapshot = snapshots[1].Sub(snapshots[0])
}

// counts are commands by what tells them apart.
func (s *seen) counts() map[trace.Key]uint64 {
	m := map[trace.Key]uint64{}
	for _, c := range s.Cells {
		if c.Count > 0 {
			m[c.Key] = c.Count
		}
	}
	return m
}

// latencyOf puts together the histograms of an opcode of a device.
func (s *seen) latencyOf(device uint16, opcode uint8) *latency.Histogram {
	h := new(latency.Histogram)
	for _, c := range s.Cells {
		if c.Device == device && c.Opcode == opcode {
			h.Merge(c.Latency)
		}
	}
	return h
}

// device is the instance of a disk.
func device(t *testing.T, d vmlab.Disk) (n uint16) {
	t.Helper()
	if _, err := fmt.Sscanf(d.Name, "nvme%d", &n); err != nil {
		t.Fatalf("%+v: %v", d, err)
	}
	return n
}

// queueOf is the queue that a CPU's commands go to.
func (g *guest) queueOf(t *testing.T, disk string, cpu int) uint16 {
	t.Helper()
	var n uint16
	out := g.Run(t, fmt.Sprintf("grep -lw %d /sys/block/%s/mq/*/cpu_list", cpu, filepath.Base(disk)))
	if _, err := fmt.Sscan(filepath.Base(filepath.Dir(out)), &n); err != nil {
		t.Fatalf("the queue of CPU %d: %q", cpu, out)
	}
	return n + 1
}
