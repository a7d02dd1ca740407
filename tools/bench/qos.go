package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

// tenant is a guest: a `guestdrv bench` that goes on until it is ended, and that can be stopped for a while, as a VM is.
type tenant struct {
	cmd    *exec.Cmd
	stderr strings.Builder
	done   chan error
	began  chan struct{}

	mu   sync.Mutex
	seen load.Progress // the last that it told
}

// startTenant starts one with everything on the load's core. It is measuring when startTenant returns.
func startTenant(ctx context.Context, b *bench, guestdrv, socket string, args ...string) (*tenant, error) {
	t := &tenant{done: make(chan error, 1), began: make(chan struct{})}
	t.cmd = exec.Command(guestdrv, append([]string{"bench", "vfio-user:" + socket, "--jobs", "1", "--cpus", fmt.Sprint(b.loadCPU), "--runtime", "1h", "--every", "20ms", "--json"}, args...)...)
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its sandbox is a process of its own, and all are stopped together
	t.cmd.Stderr = &t.stderr
	out, err := t.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := t.cmd.Start(); err != nil {
		return nil, err
	}
	go t.read(out)
	select {
	case <-t.began:
		return t, nil
	case err = <-t.done:
		if err == nil {
			err = errors.New("it ended")
		}
		return nil, fmt.Errorf("a guest: %w: %s", err, t.stderr.String())
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(20 * time.Second):
		err = fmt.Errorf("a guest has done nothing in 20 s: %s", t.stderr.String())
	}
	return nil, errors.Join(err, t.end())
}

// read takes what the guest tells, and its result.
func (t *tenant) read(out io.Reader) {
	var result load.Result
	lines := json.NewDecoder(out)
	for first := true; ; {
		var raw json.RawMessage
		if lines.Decode(&raw) != nil {
			break
		}
		var p load.Progress
		if json.Unmarshal(raw, &p) != nil { // it has no phase
			_ = json.Unmarshal(raw, &result)
			continue
		}
		if p.Phase != load.PhaseMeasure || p.IOs == 0 {
			continue
		}
		t.mu.Lock()
		t.seen = p
		t.mu.Unlock()
		if first {
			close(t.began)
			first = false
		}
	}
	err := t.cmd.Wait()
	if err == nil && result.Errors > 0 {
		err = fmt.Errorf("%d commands of a guest failed: %v", result.Errors, result.Problems)
	}
	t.done <- err
}

func (t *tenant) signal(s syscall.Signal) error { return syscall.Kill(-t.cmd.Process.Pid, s) }

// run lets the guest run, or stops it.
func (t *tenant) run(on bool) error {
	if on {
		return t.signal(syscall.SIGCONT)
	}
	return t.signal(syscall.SIGSTOP)
}

// end ends the guest.
func (t *tenant) end() error {
	_ = t.run(true) // what has ended is told nothing
	_ = syscall.Kill(t.cmd.Process.Pid, syscall.SIGINT)
	select {
	case err := <-t.done:
		return err
	case <-time.After(20 * time.Second):
		_ = t.signal(syscall.SIGKILL)
		return fmt.Errorf("a guest did not end: %w: %s", <-t.done, t.stderr.String())
	}
}

func (t *tenant) progress() load.Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.seen
}

// span is what a tenant did in a time by its own clock.
type span struct {
	seconds float64
	ios     uint64
}

func (s span) rate() float64 { return float64(s.ios) / s.seconds }

// window returns what ts do in the next d.
func window(ctx context.Context, d time.Duration, ts ...*tenant) ([]span, error) {
	before := make([]load.Progress, len(ts))
	for i, t := range ts {
		before[i] = t.progress()
	}
	if err := sleep(ctx, d); err != nil {
		return nil, err
	}
	spans := make([]span, len(ts))
	for i, t := range ts {
		after := t.progress()
		spans[i] = span{(after.Elapsed - before[i].Elapsed).Seconds(), after.IOs - before[i].IOs}
		if spans[i].seconds <= 0 {
			return nil, fmt.Errorf("a guest has told nothing in %v: %s", d, t.stderr.String())
		}
	}
	return spans, nil
}

// qosRig is one hostmed and its configuration file, which changes while it runs.
type qosRig struct {
	b        *bench
	guestdrv string
	file     string
	sockets  []string
	limits   []string
	h        *process.Daemon
	tenants  []*tenant
}

// newQoSRig starts hostmed with a controller for each of limits, which are lines of the file.
func newQoSRig(ctx context.Context, b *bench, limits ...string) (*qosRig, error) {
	q := &qosRig{b: b, file: filepath.Join(b.dir, "qos.toml"), limits: limits}
	var err error
	if q.guestdrv, err = process.Binary(ctx, "guestdrv", b.bin, b.dir); err != nil {
		return nil, err
	}
	for range limits {
		b.sockets++
		q.sockets = append(q.sockets, filepath.Join(b.dir, fmt.Sprintf("%d.sock", b.sockets)))
	}
	if err := q.write(); err != nil {
		return nil, err
	}
	q.h, err = process.StartHostmed(ctx, b.hostmed, nil, "--config", q.file, "--log-level", "info")
	return q, err
}

func (q *qosRig) write() error {
	doc := fmt.Sprintf("cpus = [%d]\n", q.b.hostCPU)
	for i, l := range q.limits {
		doc += fmt.Sprintf("[[subsystem]]\n[[subsystem.controller]]\nsocket = %q\n%s\n[[subsystem.namespace]]\nspec = %q\n", q.sockets[i], l, nullSpec)
	}
	return os.WriteFile(q.file, []byte(doc), 0o600)
}

// set changes the limits, by SIGHUP, and waits until bursts are over.
func (q *qosRig) set(ctx context.Context, limits ...string) error {
	copy(q.limits, limits)
	if err := q.write(); err != nil {
		return err
	}
	if err := syscall.Kill(q.h.PID(), syscall.SIGHUP); err != nil {
		return err
	}
	return sleep(ctx, time.Second)
}

func (q *qosRig) start(ctx context.Context, controller int, args ...string) (*tenant, error) {
	t, err := startTenant(ctx, q.b, q.guestdrv, q.sockets[controller], args...)
	if err == nil {
		q.tenants = append(q.tenants, t)
	}
	return t, err
}

func (q *qosRig) close() (err error) {
	for _, t := range q.tenants {
		err = errors.Join(err, t.end())
	}
	return errors.Join(err, q.h.Stop())
}

// The limits of two guests, and what they come to in commands of 4 KiB a second. The third has none.
var limitsInTurn = []struct {
	limits [2]string
	want   [2]float64
}{
	{[2]string{"limits = { iops = 1000 }", `limits = { bandwidth = "2000KiB" }`}, [2]float64{1000, 500}},
	{[2]string{"limits = { read_iops = 500, iops = 600 }", `limits = { read_bandwidth = "20000KiB", bandwidth = "25000KiB" }`}, [2]float64{500, 5000}},
	{[2]string{"limits = { iops = 20000 }", `limits = { bandwidth = "1000KiB" }`}, [2]float64{20000, 250}},
}

// limits has three guests, each a process, on one hostmed: how near two of them come to their limits, which change while they run; their bursts; and what the
// third keeps, which has no limit.
func limits(ctx context.Context, b *bench) (r caseResult, err error) {
	// The last two are for guests without limits that pace themselves.
	q, err := newQoSRig(ctx, b, limitsInTurn[0].limits[0], limitsInTurn[0].limits[1], "", "", "")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	var guests [3]*tenant
	for i := range guests {
		if guests[i], err = q.start(ctx, i); err != nil {
			return r, err
		}
	}
	for _, x := range limitsInTurn {
		b.note("three guests, limits %v", x.want)
		if err := q.set(ctx, x.limits[:]...); err != nil {
			return r, err
		}
		spans, err := window(ctx, b.pick(5*time.Second, 500*time.Millisecond), guests[:]...)
		if err != nil {
			return r, err
		}
		for i, want := range x.want {
			name := strings.TrimSuffix(strings.TrimPrefix(x.limits[i], "limits = { "), " }")
			r.figure(fmt.Sprintf("%s: IOPS in %.1f s, limit %.0f", name, spans[i].seconds, want), spans[i].rate())
			r.aim("  off its limit, parts of it", math.Abs(spans[i].rate()/want-1), atMost, 0.05)
		}
	}
	if err := q.set(ctx, limitsInTurn[0].limits[:]...); err != nil {
		return r, err
	}
	if err := neighbour(ctx, q, &r, guests); err != nil {
		return r, err
	}
	return r, bursts(ctx, b, &r)
}

// neighbour compares what the unlimited guest does beside the two others while hostmed holds them back, beside two that pace themselves at the same rates, which hostmed does not
// hold back, and beside none. All guests share a core here, so that the last ratio has what their own processes need of that core in it; the first has not. Machines
// drift by more than what is looked for, so each round has all three.
func neighbour(ctx context.Context, q *qosRig, r *caseResult, guests [3]*tenant) error {
	var limited, paced []*tenant
	limited = guests[:2]
	for i, want := range limitsInTurn[0].want {
		t, err := q.start(ctx, 3+i, "--rate", fmt.Sprintf("%.0f", want))
		if err != nil {
			return err
		}
		paced = append(paced, t)
	}
	situations := [][]*tenant{limited, paced, nil}
	var toPaced, toNone []float64
	var pace, held [2]float64
	for round := range 7 {
		var rates [3]float64
		for i, at := range []int{round % 3, (round + 1) % 3, (round + 2) % 3} {
			q.b.note("the guest without limits, %d of 7, %d of 3", round+1, i+1)
			running := situations[at]
			for _, t := range slices.Concat(limited, paced) {
				if err := t.run(slices.Contains(running, t)); err != nil {
					return err
				}
			}
			if err := sleep(ctx, time.Second); err != nil { // bursts are over
				return err
			}
			spans, err := window(ctx, q.b.pick(1500*time.Millisecond, 100*time.Millisecond), append(slices.Clone(running), guests[2])...)
			if err != nil {
				return err
			}
			rates[at] = spans[len(running)].rate()
			for k := range running {
				if at == 0 {
					held[k] += spans[k].rate() / 7
				} else {
					pace[k] += spans[k].rate() / 7
				}
			}
		}
		toPaced, toNone = append(toPaced, rates[0]/rates[1]), append(toNone, rates[0]/rates[2])
	}
	median := func(x []float64) float64 { slices.Sort(x); return x[len(x)/2] }
	r.figure(fmt.Sprintf("beside a guest without limits: IOPS of those held back, %.0f and", held[0]), held[1])
	r.figure(fmt.Sprintf("beside the same: IOPS of those that pace themselves, %.0f and", pace[0]), pace[1])
	r.aim("  its rate beside those held back, to that beside those that pace themselves", median(toPaced), atLeast, 0.95)
	r.figure("  its rate beside those held back, to that beside none: they share its core", median(toNone))
	for _, t := range slices.Concat(limited, paced) {
		if err := t.run(false); err != nil {
			return err
		}
	}
	return nil
}

// bursts has a guest come twice, after its bucket had time to fill: what it does in a second is the burst and a second of its rate.
func bursts(ctx context.Context, b *bench, r *caseResult) (err error) {
	const rate, burst = 1000, 2000
	q, err := newQoSRig(ctx, b, fmt.Sprintf("limits = { iops = %d, iops_burst = %d }", rate, burst))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	for _, when := range []string{"at first", "after a time of nothing"} {
		b.note("a burst, %s", when)
		out, err := exec.CommandContext(ctx, q.guestdrv, "bench", "vfio-user:"+q.sockets[0], "--jobs", "1", "--cpus", fmt.Sprint(b.loadCPU), "--runtime", "1s", "--json").Output()
		if err != nil {
			return fmt.Errorf("a guest: %w", err)
		}
		var x load.Result
		if err := json.Unmarshal(out, &x); err != nil {
			return err
		}
		got, want := x.IOPS*x.Seconds, burst+rate*x.Seconds
		r.figure(fmt.Sprintf("iops = %d, iops_burst = %d, %s: commands in %.2f s, limit %.0f", rate, burst, when, x.Seconds, want), got)
		r.aim("  off its limit, parts of it", math.Abs(got/want-1), atMost, 0.05)
		if err := sleep(ctx, burst*time.Second/rate+time.Second/2); err != nil {
			return err
		}
	}
	return nil
}
