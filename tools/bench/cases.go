package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// benchCase is one line of the report, or a few.
type benchCase struct {
	name string
	aims string // for people
	run  func(context.Context, *bench) (caseResult, error)
}

const (
	nullSpec = "null:size=64GiB"
	memSpec  = "mem:size=256MiB"
	fileSize = 256 << 20
)

// cases are in the order of the report. The aims are those of the project's first issue; a rate's ratio is to the bare rings.
func cases() []benchCase {
	all := []benchCase{
		rate("null/shadow/qd1", rateCase{spec: nullSpec, qd: 1, iops: 1.3e6, ratio: 0.6}),
		rate("null/shadow/qd32", rateCase{spec: nullSpec, qd: 32, iops: 6e6, ratio: 0.5, mmio: 0.001}),
		rate("null/shadow/qd128", rateCase{spec: nullSpec, qd: 128, iops: 8e6, ratio: 0.5, mmio: 0.001}),
		rate("null/trap/qd32", rateCase{spec: nullSpec, doorbells: "trap", qd: 32}),
		rate("null/shadow/qd32/each", rateCase{spec: nullSpec, qd: 32, batch: 1}),
		rate("null/trap/qd32/each", rateCase{spec: nullSpec, doorbells: "trap", qd: 32, batch: 1}),
		rate("null/mmap/qd1", rateCase{spec: nullSpec, doorbells: "mmap", qd: 1}),
		rate("null/mmap/qd32", rateCase{spec: nullSpec, doorbells: "mmap", qd: 32}),
		rate("null/mmap/qd128", rateCase{spec: nullSpec, doorbells: "mmap", qd: 128}),
		rate("mem/shadow/qd1", rateCase{spec: memSpec, qd: 1, iops: 800e3}),
		rate("mem/shadow/qd32", rateCase{spec: memSpec, qd: 32, iops: 2e6}),
		rate("mem/shadow/seq128k", rateCase{spec: memSpec, qd: 8, kind: load.SeqRead, bs: 128 << 10, copySpeed: 0.8}),
		rate("file/shadow/qd1", rateCase{qd: 1, iops: 300e3}),
		rate("file/shadow/qd32", rateCase{qd: 32, iops: 600e3}),
	}
	return append(all, figures()...)
}

// rateCase is a load that is measured between two runs of the bare rings.
type rateCase struct {
	spec      string // empty: a file on tmpfs
	doorbells string // default shadow
	qd        int
	batch     int // commands that share a doorbell, at most; default load's
	kind      load.Kind
	bs        size.Bytes

	// Aims; 0: none.
	iops, ratio float64 // at least
	mmio        float64 // writes per I/O, at most
	copySpeed   float64 // bandwidth as a part of memory-copy speed, at least
}

func rate(name string, c rateCase) benchCase {
	aims := ""
	add := func(format string, v ...any) {
		if aims != "" {
			aims += ", "
		}
		aims += fmt.Sprintf(format, v...)
	}
	if c.iops > 0 {
		add("%s IOPS", text.Count(c.iops))
	}
	if c.ratio > 0 {
		add("%.1f of the bare rings", c.ratio)
	}
	if c.mmio > 0 {
		add("at most %s MMIO writes per I/O", text.Ratio(c.mmio))
	}
	if c.copySpeed > 0 {
		add("%.1f of memory-copy speed", c.copySpeed)
	}
	return benchCase{name: name, aims: aims, run: c.run}
}

func (c rateCase) run(ctx context.Context, b *bench) (r caseResult, err error) {
	spec := c.spec
	if spec == "" {
		remove := func() error { return nil }
		if spec, remove, err = fileOnTmpfs(); err != nil {
			return r, err
		}
		defer func() {
			if e := remove(); err == nil {
				err = e
			}
		}()
	}
	bare := func() (float64, error) {
		b.note("bare rings")
		return bareRate(b.hostCPU, b.loadCPU, c.qd, b.pick(time.Second, 200*time.Millisecond))
	}
	if r.BareBefore, err = bare(); err != nil {
		return r, fmt.Errorf("bare rings: %w", err)
	}
	doorbells := c.doorbells
	if doorbells == "" {
		doorbells = "shadow"
	}
	cfg := load.Config{Kind: c.kind, Depth: c.qd, Batch: c.batch, Fill: spec == memSpec, Runtime: b.pick(5*time.Second, 500*time.Millisecond), CPUs: []int{b.loadCPU}}
	if c.bs != 0 {
		cfg.Sizes = size.List{c.bs}
	}
	err = b.host(ctx, 1, []string{"--namespace", spec, "--doorbells", doorbells}, func(h *process.Daemon, devices []string) error {
		r.Load, err = b.load(ctx, devices[0], cfg, h)
		return err
	})
	if err != nil {
		return r, err
	}
	r.HostNS = phasesIn(b.hostLog)
	if r.BareAfter, err = bare(); err != nil {
		return r, fmt.Errorf("bare rings: %w", err)
	}
	r.Ratio = r.Load.IOPS / ((r.BareBefore + r.BareAfter) / 2)
	if c.iops > 0 {
		r.aim("IOPS", r.Load.IOPS, atLeast, c.iops)
	}
	if c.ratio > 0 {
		r.aim("ratio to bare rings", r.Ratio, atLeast, c.ratio)
	}
	if c.mmio > 0 {
		r.aim("MMIO writes per I/O", r.Load.MMIOPerIO, atMost, c.mmio)
	}
	if c.copySpeed > 0 {
		speed := copySpeed(b.loadCPU, b.pick(time.Second, 200*time.Millisecond))
		r.figure("memory copy, MiB/s", speed)
		r.aim("part of memory-copy speed", r.Load.BandwidthMiB/speed, atLeast, c.copySpeed)
	}
	return r, nil
}

// load puts cfg on device and returns the result, which must be without errors.
func (b *bench) load(ctx context.Context, device string, cfg load.Config, h *process.Daemon) (r *load.Result, err error) {
	c, err := guestdrv.Open(ctx, device, cfg.Options(guestdrv.Options{}))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	l, err := load.Open(c, cfg)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	o := load.Observer{Every: 500 * time.Millisecond, Progress: func(p load.Progress) {
		b.note("%s IOPS", text.Count(float64(p.IOs)/max(p.Elapsed.Seconds(), 1e-9)))
	}}
	if h != nil {
		o.HostCPU = func() (time.Duration, bool) {
			d, err := process.ThreadTime(h.PID())
			return d, err == nil
		}
	}
	r, err = l.Run(ctx, o)
	if err == nil && r.Errors > 0 {
		err = fmt.Errorf("%d commands failed: %v", r.Errors, r.Problems)
	}
	return r, err
}

// fileOnTmpfs makes a file that is not sparse, and returns its namespace.
func fileOnTmpfs() (spec string, remove func() error, err error) {
	dir, err := os.MkdirTemp("/dev/shm", "shadowbell-bench-")
	if err != nil {
		return "", nil, err
	}
	remove = func() error { return os.RemoveAll(dir) }
	f, err := os.Create(filepath.Join(dir, "disk.img"))
	if err == nil {
		data := make([]byte, 1<<20)
		for i := range data {
			data[i] = byte(i * 7)
		}
		for i := 0; i < fileSize && err == nil; i += len(data) {
			_, err = f.Write(data)
		}
		if e := f.Close(); err == nil {
			err = e
		}
	}
	if err != nil {
		_ = remove()
		return "", nil, err
	}
	return "file:" + f.Name(), remove, nil
}
