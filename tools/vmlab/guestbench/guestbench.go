// Package guestbench measures in one stock Linux guest what the ways to an NVMe disk cost that are open to a program there: the kernel's own
// driver, guestdrv as a block device (ublk), guestdrv behind the kernel's NBD client, and guestdrv as a library.
//
// Each way has a controller of hostmed's for itself, all alike, and they take turns: every way once in a round, in an order that
// changes from round to round. What is compared is compared within a round, so that what else the machine does falls on all.
package guestbench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/doorbells"
)

// Job is a load, which is the same for all ways.
type Job struct {
	RW    string `json:"rw"` // as fio has it
	BS    string `json:"bs"`
	Depth int    `json:"qd"`
}

// Name is "randread 4k qd32".
func (j Job) Name() string { return fmt.Sprintf("%s %s qd%d", j.RW, j.BS, j.Depth) }

// Jobs are the loads that are measured.
var Jobs = []Job{{"randread", "4k", 1}, {"randread", "4k", 32}, {"randwrite", "4k", 32}, {"read", "128k", 8}}

// Way is a way to the disk.
type Way string

// The ways. What the others are compared with comes first.
const (
	Kernel  Way = "kernel nvme"
	Ublk    Way = "guestdrv, ublk"
	NBD     Way = "guestdrv, NBD"
	Library Way = "guestdrv, library"
)

// Ways lists them.
var Ways = []Way{Kernel, Ublk, NBD, Library}

// Config says what to measure. All its fields must be set.
type Config struct {
	Jobs    []Job
	Rounds  int
	Runtime time.Duration // of each job of each way of each round, in whole seconds
	CPUs    int           // of the guest
}

// Figure is one measurement. CPU is of the whole guest, its kernel and all programs.
type Figure struct {
	IOPS float64 `json:"iops"`
	P50  float64 `json:"p50_us"`
	P99  float64 `json:"p99_us"`
	CPU  float64 `json:"cpu_us_per_io"` // busy time of the guest's CPUs
	MMIO float64 `json:"mmio_per_io"`   // doorbells that came to hostmed as messages, for each NVMe command
}

// diskBytes is the size of each disk.
const diskBytes = 64 << 20

type rig struct {
	cfg    Config
	vm     *vmlab.VM
	m      *hostmed.Mediator
	socket map[Way]string
	target map[Way]string // what fio, or guestdrv bench, is given
}

// Measure boots a guest and measures. say is told what is being done. The report has what was measured until an error, too.
func Measure(ctx context.Context, lab *vmlab.Lab, cfg Config, say func(string)) (_ *Report, err error) {
	dir, err := os.MkdirTemp(tmpfs(), "guestbench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	accel, _, err := lab.Accel(ctx)
	if err != nil {
		return nil, err
	}
	r := &rig{cfg: cfg, socket: map[Way]string{}, target: map[Way]string{}}
	c := hostmed.Config{Poll: doorbells.Poll(accel)}
	guest := vmlab.Config{
		CPUs: cfg.CPUs, MemoryMiB: 1024, Programs: []string{"guestdrv"},
		// The kernel's driver maps nothing for an I/O, as it would not without an IOMMU; what belongs to VFIO is translated all the same.
		VIOMMU: true, Append: "intel_iommu=on iommu=pt",
	}
	for i, way := range Ways {
		image, socket := filepath.Join(dir, fmt.Sprintf("%d.img", i)), filepath.Join(dir, fmt.Sprintf("%d.sock", i))
		if err := writeImage(image, uint64(i)); err != nil {
			return nil, err
		}
		c.Controllers = append(c.Controllers, hostmed.ControllerConfig{Socket: socket, Namespaces: []string{"file:" + image}, Doorbells: hostmed.Shadow})
		guest.Devices = append(guest.Devices, vmlab.VFIOUser(socket))
		r.socket[way] = socket
	}
	if r.m, err = hostmed.New(c); err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- r.m.Run(run) }()
	defer func() {
		stop()
		err = errors.Join(err, <-ended)
	}()
	say("booting a guest")
	if r.vm, err = lab.Start(ctx, guest); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.vm.Close()) }()
	if err := r.open(ctx, say); err != nil {
		return nil, err
	}
	report := &Report{Accel: accel, CPUs: cfg.CPUs, Rounds: cfg.Rounds, Seconds: cfg.Runtime.Seconds(), Doorbells: hostmed.Shadow.String(), Poll: c.Poll.String()}
	return report, r.measure(ctx, report, say)
}

// writeImage makes a disk with random data, of which nothing is a hole.
func writeImage(path string, seed uint64) error {
	data := make([]byte, diskBytes)
	var key [32]byte
	key[0] = byte(seed)
	rand.NewChaCha8(key).Read(data)
	return os.WriteFile(path, data, 0o600)
}

// tmpfs is where memory is, so that no disk of the host is measured; "" is the usual place.
func tmpfs() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}

// measure goes through the rounds.
func (r *rig) measure(ctx context.Context, report *Report, say func(string)) error {
	for _, job := range r.cfg.Jobs {
		result := JobResult{Job: job}
		for round := range r.cfg.Rounds {
			figures := make([]Figure, len(Ways))
			for k := range Ways {
				// Nobody comes always first, or always behind the same one.
				i := (k + round) % len(Ways)
				if round%2 == 1 {
					i = (len(Ways) - 1 - k + round) % len(Ways)
				}
				say(fmt.Sprintf("%s: round %d of %d, %s", job.Name(), round+1, r.cfg.Rounds, Ways[i]))
				f, err := r.one(ctx, Ways[i], job)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", job.Name(), Ways[i], err)
				}
				figures[i] = f
			}
			result.Rounds = append(result.Rounds, figures)
		}
		report.Results = append(report.Results, result)
	}
	return nil
}
