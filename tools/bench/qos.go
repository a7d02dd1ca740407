package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

// tenant is a guest with a load that goes on until it is stopped.
type tenant struct {
	name string
	c    *guestdrv.Controller
	l    *load.Load

	mu   sync.Mutex
	at   time.Duration // into the run
	ios  uint64        // up to then
	stop context.CancelFunc
	done chan error
}

func newTenant(ctx context.Context, b *bench, name, device string) (_ *tenant, err error) {
	t := &tenant{name: name, done: make(chan error, 1)}
	// Those that wait sleep: on the one core that all loads have, polling would be at the neighbour's cost.
	cfg := load.Config{Depth: 32, Runtime: time.Hour, CPUs: []int{b.loadCPU}, NoSpin: name != "unlimited"}
	if t.c, err = guestdrv.Open(ctx, device, cfg.Options(guestdrv.Options{})); err != nil {
		return nil, err
	}
	if t.l, err = load.Open(t.c, cfg); err != nil {
		return nil, errors.Join(err, t.c.Close())
	}
	return t, nil
}

func (t *tenant) start(ctx context.Context) {
	ctx, t.stop = context.WithCancel(ctx)
	var first atomic.Bool
	began := make(chan struct{})
	go func() {
		r, err := t.l.Run(ctx, load.Observer{Every: 20 * time.Millisecond, Progress: func(p load.Progress) {
			t.mu.Lock()
			t.at, t.ios = p.Elapsed, p.IOs
			t.mu.Unlock()
			if p.IOs > 0 && first.CompareAndSwap(false, true) {
				close(began)
			}
		}})
		if err == nil && r.Errors > 0 {
			err = fmt.Errorf("%s: %d commands failed: %v", t.name, r.Errors, r.Problems)
		}
		t.done <- err
	}()
	select {
	case <-began:
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
	}
}

func (t *tenant) seen() (time.Duration, uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.at, t.ios
}

// end stops the load and gives everything back.
func (t *tenant) end() (err error) {
	if t.stop != nil {
		t.stop()
		err = <-t.done
	}
	return errors.Join(err, t.l.Close(), t.c.Close())
}

// window returns the rates of ts in the next d.
func window(ctx context.Context, d time.Duration, ts ...*tenant) ([]float64, error) {
	at, ios := make([]time.Duration, len(ts)), make([]uint64, len(ts))
	for i, t := range ts {
		at[i], ios[i] = t.seen()
	}
	if err := sleep(ctx, d); err != nil {
		return nil, err
	}
	rates := make([]float64, len(ts))
	for i, t := range ts {
		until, n := t.seen()
		rates[i] = float64(n-ios[i]) / (until - at[i]).Seconds()
	}
	return rates, nil
}

// limits has three guests on one hostmed, two of them limited, and changes the limits while they work.
func limits(ctx context.Context, b *bench) (r caseResult, err error) {
	var sockets []string
	for i := range 3 {
		sockets = append(sockets, filepath.Join(b.dir, fmt.Sprintf("qos%d.sock", i)))
	}
	file := filepath.Join(b.dir, "qos.toml")
	write := func(first, second string) error {
		doc := fmt.Sprintf("cpus = [%d]\n", b.hostCPU)
		for i, l := range []string{first, second, ""} {
			doc += fmt.Sprintf("[[subsystem]]\n[[subsystem.controller]]\nsocket = %q\n%s\n[[subsystem.namespace]]\nspec = %q\n", sockets[i], l, nullSpec)
		}
		return os.WriteFile(file, []byte(doc), 0o600)
	}
	if err := write("limits = { iops = 1000 }", `limits = { bandwidth = "2000KiB" }`); err != nil {
		return r, err
	}
	h, err := process.StartHostmed(ctx, b.hostmed, nil, "--config", file)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, h.Stop()) }()
	var ts []*tenant
	defer func() {
		for _, t := range ts {
			err = errors.Join(err, t.end())
		}
	}()
	for i, name := range []string{"unlimited", "limited by IOPS", "limited by bandwidth"} {
		t, err := newTenant(ctx, b, name, "vfio-user:"+sockets[(i+2)%3])
		if err != nil {
			return r, err
		}
		ts = append(ts, t)
	}
	for _, t := range ts {
		t.start(ctx)
	}
	set := func(first, second string) error {
		err := write(first, second)
		if err == nil {
			err = syscall.Kill(h.PID(), syscall.SIGHUP)
		}
		if err == nil {
			err = sleep(ctx, time.Second) // bursts are over
		}
		return err
	}
	worst := 0.0
	for _, x := range []struct {
		first, second string
		want          [2]float64
	}{
		{"limits = { iops = 1000 }", `limits = { bandwidth = "2000KiB" }`, [2]float64{1000, 500}},
		{"limits = { read_iops = 500, iops = 600 }", `limits = { read_bandwidth = "4000KiB", bandwidth = "5000KiB" }`, [2]float64{500, 1000}},
	} {
		b.note("three guests, limits %v", x.want)
		if err := set(x.first, x.second); err != nil {
			return r, err
		}
		rates, err := window(ctx, b.pick(5*time.Second, 500*time.Millisecond), ts...)
		if err != nil {
			return r, err
		}
		for i, want := range x.want {
			worst = max(worst, math.Abs(rates[i+1]/want-1))
			r.figure(fmt.Sprintf("%s, IOPS with a limit of %.0f", ts[i+1].name, want), rates[i+1])
		}
	}
	r.aim("farthest from its limit, parts of it", worst, atMost, 0.05)

	// Machines drift by more than what is looked for, so the neighbour's rate is compared second by second.
	var ratios []float64
	for round := range 7 {
		b.note("the unlimited guest, %d of 7", round+1)
		var rates [2]float64
		for busy, x := range [][2]string{{"limits = { iops = 1 }", `limits = { bandwidth = "4KiB" }`}, {"limits = { iops = 1000 }", `limits = { bandwidth = "2000KiB" }`}} {
			if err := set(x[0], x[1]); err != nil {
				return r, err
			}
			w, err := window(ctx, b.pick(time.Second, 100*time.Millisecond), ts[0])
			if err != nil {
				return r, err
			}
			rates[busy] = w[0]
		}
		ratios = append(ratios, rates[1]/rates[0])
	}
	slices.Sort(ratios)
	r.aim("unlimited guest, part of its rate beside two that do nothing, median", ratios[len(ratios)/2], atLeast, 0.95)
	return r, nil
}
