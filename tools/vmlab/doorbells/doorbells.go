// Package doorbells measures in a stock Linux guest what doorbells cost: MMIO writes per I/O and IOPS by queue depth, with every doorbell a
// message (trap), with Doorbell Buffer Config (shadow), and on QEMU's own NVMe device, which the kernel gives doorbell buffers too.
//
// The doorbells are counted by the device: by hostmed for its controllers, by QEMU's trace for its own, in a run that is not timed.
package doorbells

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/spin"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// Depths are the queue depths at which QEMU's own patch was measured.
var Depths = []int{1, 2, 4, 8, 32}

// Figure is one measurement.
type Figure struct {
	IOPS float64
	MMIO float64 // doorbell writes per I/O
}

// Row is what the three devices did at one queue depth.
type Row struct {
	Depth              int
	Trap, Shadow, QEMU Figure
}

// diskBytes is the size of each disk, all of which is written once.
const diskBytes = 64 << 20

type rig struct {
	vm      *vmlab.VM
	m       *hostmed.Mediator
	trap    string // sockets
	shadow  string
	trace   string // QEMU's log
	depths  []int
	runtime time.Duration
}

// Measure boots a guest of one CPU with the three disks, each a file on tmpfs where the machine has one, and runs fio on each: 4 KiB random reads, for
// runtime at each of depths. say is told what is being done.
func Measure(ctx context.Context, lab *vmlab.Lab, depths []int, runtime time.Duration, say func(string)) (_ []Row, err error) {
	dir, err := os.MkdirTemp(tmpfs(), "doorbells-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r := &rig{trap: filepath.Join(dir, "trap"), shadow: filepath.Join(dir, "shadow"), trace: filepath.Join(dir, "trace"), depths: depths, runtime: runtime}
	image := filepath.Join(dir, "qemu.img")
	if err := os.WriteFile(image, make([]byte, diskBytes), 0o600); err != nil {
		return nil, err
	}
	spec := func(name string) []string {
		return []string{fmt.Sprintf("file:%s.img,size=%d", filepath.Join(dir, name), diskBytes)}
	}
	accel, _, err := lab.Accel(ctx)
	if err != nil {
		return nil, err
	}
	if r.m, err = hostmed.New(hostmed.Config{Poll: Poll(accel), Controllers: []hostmed.ControllerConfig{
		{Socket: r.trap, Namespaces: spec("trap"), Doorbells: hostmed.Trap},
		{Socket: r.shadow, Namespaces: spec("shadow"), Doorbells: hostmed.Shadow},
	}}); err != nil {
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
	if r.vm, err = lab.Start(ctx, vmlab.Config{
		CPUs: 1, Args: []string{"-D", r.trace},
		Devices: []vmlab.Device{vmlab.VFIOUser(r.trap), vmlab.VFIOUser(r.shadow), vmlab.QEMUNVMe(image, "qemu")},
	}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.vm.Close()) }()
	return r.measure(ctx, say)
}

// Poll is how long hostmed polls an empty queue. An emulated CPU takes ten times as long from one command to the next, and so is given ten times as
// long, or what is measured would be the emulation.
func Poll(accel string) time.Duration {
	if accel == "tcg" {
		return 10 * spin.Max
	}
	return spin.Max
}

// tmpfs is where memory is, so that no disk of the host is measured; "" is the usual place.
func tmpfs() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func (r *rig) measure(ctx context.Context, say func(string)) ([]Row, error) {
	var disks [3]string
	for i := range disks {
		d, err := r.vm.DiskAt(ctx, i)
		if err != nil {
			return nil, err
		}
		disks[i] = d.Namespace(1)
	}
	say("filling the disks")
	for _, d := range disks {
		if _, err := r.fio(ctx, "--filename="+d+" --rw=write --bs=1M --end_fsync=1"); err != nil {
			return nil, err
		}
	}
	var rows []Row
	for _, depth := range r.depths {
		row := Row{Depth: depth}
		for i, x := range []struct {
			name string
			f    *Figure
			do   func(context.Context, string, *Figure) error
		}{
			{"trap", &row.Trap, r.ours(r.trap)},
			{"shadow", &row.Shadow, r.ours(r.shadow)},
			{"QEMU's own device", &row.QEMU, r.qemus},
		} {
			say(fmt.Sprintf("queue depth %d, %s", depth, x.name))
			job := fmt.Sprintf("--filename=%s --rw=randread --bs=4k --iodepth=%d --time_based --runtime=%d", disks[i], depth, max(1, int(r.runtime.Seconds())))
			if err := x.do(ctx, job, x.f); err != nil {
				return nil, fmt.Errorf("queue depth %d, %s: %w", depth, x.name, err)
			}
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// ours measures a disk of hostmed's, which counts its doorbells at all times.
func (r *rig) ours(socket string) func(context.Context, string, *Figure) error {
	return func(ctx context.Context, job string, f *Figure) error {
		before, err := r.m.Stats(socket)
		if err != nil {
			return err
		}
		if f.IOPS, err = r.fio(ctx, job); err != nil {
			return err
		}
		after, err := r.m.Stats(socket)
		if err != nil {
			return err
		}
		d := after.Sub(before)
		if d.Errors != 0 || d.Commands() == 0 {
			return fmt.Errorf("%d commands, %d of them failed", d.Commands(), d.Errors)
		}
		f.MMIO = float64(d.SQDoorbells+d.CQDoorbells) / float64(d.Commands())
		return nil
	}
}

// What QEMU's device calls the events that are counted.
const (
	traceDoorbell = "pci_nvme_mmio_doorbell_*"
	traceCommand  = "pci_nvme_io_cmd"
)

// qemus measures QEMU's disk: once for the time, once with the trace on, which costs time.
func (r *rig) qemus(ctx context.Context, job string, f *Figure) (err error) {
	if f.IOPS, err = r.fio(ctx, job); err != nil {
		return err
	}
	if err := r.tracing(ctx, true); err != nil {
		return err
	}
	_, err = r.fio(ctx, job)
	if err := errors.Join(err, r.tracing(ctx, false)); err != nil {
		return err
	}
	log, err := os.ReadFile(r.trace)
	if err != nil {
		return err
	}
	if err := os.Truncate(r.trace, 0); err != nil {
		return err
	}
	bells, commands := bytes.Count(log, []byte(traceDoorbell[:len(traceDoorbell)-1])), bytes.Count(log, []byte(traceCommand))
	if commands == 0 {
		return errors.New("QEMU traced no command: is its trace backend log?")
	}
	f.MMIO = float64(bells) / float64(commands)
	return nil
}

func (r *rig) tracing(ctx context.Context, on bool) error {
	for _, name := range []string{traceDoorbell, traceCommand} {
		if _, err := r.vm.QMP(ctx, "trace-event-set-state", map[string]any{"name": name, "enable": on}); err != nil {
			return err
		}
	}
	return nil
}

// fio runs a job in the guest and returns its IOPS.
func (r *rig) fio(ctx context.Context, job string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute+3*r.runtime)
	defer cancel()
	res, err := r.vm.Exec(ctx, "fio --name=x --ioengine=libaio --direct=1 --output-format=json "+job)
	if err != nil {
		return 0, err
	}
	var out struct {
		Jobs []struct {
			Error       int
			Read, Write struct{ IOPS float64 }
		}
	}
	if err := json.Unmarshal([]byte(res.Stdout[max(0, bytes.IndexByte([]byte(res.Stdout), '{')):]), &out); err != nil || res.Exit != 0 || len(out.Jobs) != 1 || out.Jobs[0].Error != 0 {
		return 0, fmt.Errorf("fio: exit %d, %v: %s%s", res.Exit, err, res.Stdout, res.Stderr)
	}
	return out.Jobs[0].Read.IOPS + out.Jobs[0].Write.IOPS, nil
}
