package guestbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/doorbells"
)

// MeasureBackends is the other half: what hostmed costs between a guest and an NVMe device. One stock guest is the host, with QEMU's own NVMe
// controllers behind an IOMMU; hostmed and guestdrv, its guest, run in it. Each backend is compared with the way to the same device without hostmed.

// Backend is a way to a device: with hostmed, or without it.
type Backend string

// The backends, each behind the way that it is compared with.
const (
	BareVFIO  Backend = "guestdrv on the device"
	ViaVFIO   Backend = "guestdrv, hostmed vfio:"
	BareChar  Backend = "fio io_uring_cmd"
	ViaChar   Backend = "guestdrv, hostmed nvme:"
	BareBlock Backend = "fio io_uring"
	ViaBlock  Backend = "guestdrv, hostmed block:"
)

// Backends lists them.
var Backends = []Backend{BareVFIO, ViaVFIO, BareChar, ViaChar, BareBlock, ViaBlock}

// BackendJobs are the loads.
var BackendJobs = []Job{{"randread", "4k", 1}, {"randread", "4k", 32}, {"randwrite", "4k", 32}}

// BackendFigure is one measurement.
type BackendFigure struct {
	IOPS    float64 `json:"iops"`
	P50     float64 `json:"p50_us"`
	PerCore float64 `json:"iops_per_core"` // by the time that the host's CPUs were busy, with whatever
	// CPU time for a command, in us: of guestdrv's process, of that what was not polling in vain, and of hostmed's process. 0: not known.
	Guest     float64 `json:"guestdrv_us,omitempty"`
	GuestBusy float64 `json:"guestdrv_busy_us,omitempty"`
	Hostmed   float64 `json:"hostmed_us,omitempty"`
	MMIO      float64 `json:"device_mmio_per_io"` // doorbell writes to the device, by guestdrv or hostmed; of the kernel's driver they are not known
	Costs     *Costs  `json:"costs_ns,omitempty"`
}

// Costs is what hostmed's own samples say of a command, in ns.
type Costs struct {
	Translate float64 `json:"translate"`
	Submit    float64 `json:"submit"`
	Complete  float64 `json:"complete"`
	Interrupt float64 `json:"interrupt"`
}

// Busy is all of them: what hostmed's worker does for a command, without what it polls in vain.
func (c *Costs) Busy() float64 { return c.Translate + c.Submit + c.Complete + c.Interrupt }

// BackendResult is one job on all backends: by round, then in the order of Backends.
type BackendResult struct {
	Job    Job               `json:"job"`
	Rounds [][]BackendFigure `json:"rounds"`
}

// BackendReport is what MeasureBackends has found. Its JSON form is that of `vmlab backendbench --json`.
type BackendReport struct {
	Accel   string          `json:"accel"`
	CPUs    int             `json:"host_cpus"`
	Rounds  int             `json:"rounds"`
	Seconds float64         `json:"seconds"`
	Poll    string          `json:"hostmed_poll"`
	Results []BackendResult `json:"results"`
}

type backendRig struct {
	cfg  Config
	vm   *vmlab.VM
	poll time.Duration
	disk vmlab.Disk // the kernel's
	pci  string     // of the device that VFIO has
}

// MeasureBackends boots a guest and measures. say is told what is being done.
func MeasureBackends(ctx context.Context, lab *vmlab.Lab, cfg Config, say func(string)) (_ *BackendReport, err error) {
	dir, err := os.MkdirTemp(tmpfs(), "backendbench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	accel, _, err := lab.Accel(ctx)
	if err != nil {
		return nil, err
	}
	r := &backendRig{cfg: cfg, poll: doorbells.Poll(accel)}
	guest := vmlab.Config{CPUs: cfg.CPUs, MemoryMiB: 1024, Programs: []string{"guestdrv", "hostmed"}, VIOMMU: true, Append: "intel_iommu=on iommu=pt"}
	for i := range 2 {
		image := filepath.Join(dir, fmt.Sprintf("%d.img", i))
		if err := writeImage(image, uint64(i)); err != nil {
			return nil, err
		}
		guest.Devices = append(guest.Devices, vmlab.QEMUNVMe(image, fmt.Sprintf("bench%d", i)))
	}
	say("booting a host")
	if r.vm, err = lab.Start(ctx, guest); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.vm.Close()) }()
	if r.disk, err = r.vm.DiskAt(ctx, 0); err != nil {
		return nil, err
	}
	vfio, err := r.vm.DiskAt(ctx, 1)
	if err != nil {
		return nil, err
	}
	r.pci = vfio.PCI
	res, err := r.vm.Exec(ctx, "modprobe -a vfio_iommu_type1 vfio-pci && guestdrv bind "+r.pci+" --driver vfio-pci")
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("binding %s: %s", r.pci, res.Stderr)
	}
	if err != nil {
		return nil, err
	}
	report := &BackendReport{Accel: accel, CPUs: cfg.CPUs, Rounds: cfg.Rounds, Seconds: cfg.Runtime.Seconds(), Poll: r.poll.String()}
	for _, job := range cfg.Jobs {
		result := BackendResult{Job: job}
		for round := range cfg.Rounds {
			figures := make([]BackendFigure, len(Backends))
			for k := range Backends {
				i := (k + round) % len(Backends) // nobody comes always first
				say(fmt.Sprintf("%s: round %d of %d, %s", job.Name(), round+1, cfg.Rounds, Backends[i]))
				if figures[i], err = r.one(ctx, Backends[i], job); err != nil {
					return report, fmt.Errorf("%s, %s: %w", job.Name(), Backends[i], err)
				}
			}
			result.Rounds = append(result.Rounds, figures)
		}
		report.Results = append(report.Results, result)
	}
	return report, nil
}

// load is the command that makes the load, and what hostmed serves for it, if anything.
func (r *backendRig) load(b Backend, job Job, seconds int) (command, spec string) {
	block := r.disk.Namespace(1)
	char := strings.Replace(block, "/dev/nvme", "/dev/ng", 1)
	command = libraryCommand("vfio-user:/tmp/bench.sock", job, seconds)
	switch b {
	case BareVFIO:
		return libraryCommand("vfio:"+r.pci, job, seconds), ""
	case ViaVFIO:
		return command, "vfio:" + r.pci
	case BareChar:
		return strings.Replace(fioCommand(char, job, seconds), "--ioengine=libaio --direct=1", "--ioengine=io_uring_cmd --cmd_type=nvme", 1), ""
	case ViaChar:
		return command, "nvme:" + char
	case BareBlock:
		return strings.Replace(fioCommand(block, job, seconds), "libaio", "io_uring", 1), ""
	default:
		return command, "block:" + block
	}
}

// one measures one job on one backend, with a hostmed of its own if it has one.
func (r *backendRig) one(ctx context.Context, b Backend, job Job) (f BackendFigure, err error) {
	seconds := max(1, int(r.cfg.Runtime.Seconds()))
	load, spec := r.load(b, job, seconds)
	window := time.Duration(seconds)*time.Second - margin
	script := fmt.Sprintf(`%s >/tmp/load.json 2>/tmp/load.err & load=$!
sleep %.1f
head -1 /proc/stat
sleep %.1f
head -1 /proc/stat
wait $load || { cat /tmp/load.json /tmp/load.err >&2; exit 1; }
[ -z "$hostmed" ] || { kill -USR1 $hostmed; until grep -q 'counters: .*nsid=' /tmp/hostmed.log; do sleep 0.05; done; }
cat /tmp/load.json`, load, settle.Seconds(), window.Seconds())
	if spec != "" {
		script = fmt.Sprintf(`rm -f /tmp/bench.sock
setsid hostmed serve --socket /tmp/bench.sock --namespace %s --poll %v >/tmp/hostmed.log 2>&1 </dev/null & hostmed=$!
until [ -S /tmp/bench.sock ]; do
	kill -0 $hostmed 2>/dev/null || { cat /tmp/hostmed.log >&2; exit 1; }
	sleep 0.05
done
trap 'kill $hostmed; wait $hostmed' EXIT
%s`, spec, r.poll, script)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute+3*r.cfg.Runtime)
	defer cancel()
	res, err := r.vm.Exec(ctx, script)
	if err != nil {
		return f, err
	}
	if res.Exit != 0 {
		return f, fmt.Errorf("exit %d: %s", res.Exit, tail(res.Stderr))
	}
	busy, rest, err := parseBusy(res.Stdout)
	if err != nil {
		return f, err
	}
	parse := parseLibrary
	if strings.HasPrefix(load, "fio ") {
		parse = parseFio
	}
	figure, err := parse([]byte(rest))
	if err != nil {
		return f, err
	}
	f = BackendFigure{IOPS: figure.IOPS, P50: figure.P50, PerCore: figure.IOPS / (busy * float64(r.cfg.CPUs))}
	if strings.HasPrefix(load, "guestdrv ") {
		if err := f.addCPU([]byte(rest), spec == ""); err != nil {
			return f, err
		}
	}
	if spec == "" {
		return f, nil
	}
	log, err := r.vm.ReadFile(ctx, "/tmp/hostmed.log")
	if err != nil {
		return f, err
	}
	if f.MMIO, err = parseCounters(string(log)); err != nil {
		return f, err
	}
	f.Costs, err = parseCosts(string(log))
	return f, err
}

// addCPU takes what guestdrv bench says of CPU time, and, if it has the device itself, of the device's doorbells.
func (f *BackendFigure) addCPU(b []byte, bare bool) error {
	var out struct {
		MMIO float64 `json:"mmio_per_io"`
		CPU  struct {
			Guest   float64
			Host    float64
			Polling float64 `json:"guest_polling"`
		} `json:"cpu_s_per_mio"`
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return fmt.Errorf("guestdrv bench: %w: %s", err, b)
	}
	f.Guest, f.GuestBusy = out.CPU.Guest, max(out.CPU.Guest-out.CPU.Polling, 0) // seconds for a million are us for one
	if bare {
		f.MMIO = out.MMIO
	} else {
		f.Hostmed = out.CPU.Host
	}
	return nil
}

var counters = regexp.MustCompile(`counters: .* nsid=.* commands=(\d+) .* copied=(\d+) .* doorbells=(\d+)`)

// parseCounters finds hostmed's counters of its namespace, and returns the doorbell writes for each of the device's commands. What was copied was not
// the backend as it is meant to be measured.
func parseCounters(log string) (mmio float64, err error) {
	m := counters.FindStringSubmatch(log)
	if m == nil {
		return 0, errors.New("hostmed does not say its counters")
	}
	var n [3]float64
	for i := range n {
		if n[i], err = strconv.ParseFloat(m[i+1], 64); err != nil {
			return 0, fmt.Errorf("hostmed's counters: %w", err)
		}
	}
	if n[0] == 0 || n[1] > n[0]/2 { // a busy machine may begin with copies
		return 0, fmt.Errorf("of %.0f commands %.0f were copied: guest memory was not pinned in time", n[0], n[1])
	}
	return n[2] / n[0], nil
}

// tail is the end of what a program said: fio puts a page of JSON before it.
func tail(s string) string { return s[max(0, len(s)-500):] }

var costs = regexp.MustCompile(`ns_per_io=([0-9.]+)/([0-9.]+)/([0-9.]+)/([0-9.]+)`)

// parseCosts finds what hostmed says of its costs when its client goes; nil if it says nothing.
func parseCosts(log string) (*Costs, error) {
	m := costs.FindStringSubmatch(log)
	if m == nil {
		return nil, nil // it took no sample
	}
	var v [4]float64
	for i := range v {
		var err error
		if v[i], err = strconv.ParseFloat(m[i+1], 64); err != nil {
			return nil, fmt.Errorf("hostmed's costs: %w", err)
		}
	}
	return &Costs{v[0], v[1], v[2], v[3]}, nil
}
