package load

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
)

// Phase is what a Load is doing.
type Phase int32

// The phases in order. Fill and ReadBack are of Config.Fill and Verify, and are not measured.
const (
	PhaseReady Phase = iota
	PhaseFill
	PhaseMeasure
	PhaseReadBack
	PhaseDone
)

func (p Phase) String() string {
	return [...]string{"ready", "filling", "measuring", "reading back", "done"}[p]
}

// Observer is what Run tells and asks while it runs. The zero Observer is fine.
type Observer struct {
	// HostCPU returns the CPU time that the other side has used so far; false: not known.
	HostCPU func() (time.Duration, bool)
	// Progress is called a few times a second from a goroutine of its own.
	Progress func(Progress)
	// Every is the time between two calls of Progress; default 250 ms.
	Every time.Duration
}

// Progress is how far a phase is.
type Progress struct {
	Phase   Phase
	Elapsed time.Duration // in this phase
	Total   time.Duration // of this phase, 0: until it is done
	IOs     uint64        // in this phase
	Bytes   uint64
	Errors  uint64 // of commands and of data
}

// progressJSON is Progress as JSON.
type progressJSON struct {
	Phase   string  `json:"phase"`
	Elapsed float64 `json:"elapsed_s"`
	IOs     uint64  `json:"ios"`
	Bytes   uint64  `json:"bytes"`
	Errors  uint64  `json:"errors"`
}

// MarshalJSON gives it the names of `guestdrv bench --every`.
func (p Progress) MarshalJSON() ([]byte, error) {
	return json.Marshal(progressJSON{p.Phase.String(), p.Elapsed.Seconds(), p.IOs, p.Bytes, p.Errors})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (p *Progress) UnmarshalJSON(data []byte) error {
	var x progressJSON
	if err := json.Unmarshal(data, &x); err != nil {
		return err
	}
	for ph := PhaseReady; ph <= PhaseDone; ph++ {
		if ph.String() == x.Phase {
			*p = Progress{Phase: ph, Elapsed: time.Duration(x.Elapsed * float64(time.Second)), IOs: x.IOs, Bytes: x.Bytes, Errors: x.Errors}
			return nil
		}
	}
	return fmt.Errorf("there is no phase %q", x.Phase)
}

// stage is a running phase, for Progress.
type stage struct {
	phase atomic.Int32
	begin atomic.Int64 // ns since the Load's start
}

// Run carries the load out and returns what it measured. When ctx ends the measurement stops early and the result says
// so. With an error of a queue, which is fatal to the load, the result holds what was measured until then.
func (l *Load) Run(ctx context.Context, o Observer) (*Result, error) {
	if o.HostCPU == nil {
		o.HostCPU = func() (time.Duration, bool) { return 0, false }
	}
	// A job's thread is locked and never blocks in the scheduler's sight, so each needs a P of its own, and so does
	// the rest; the kernel, not the Go scheduler, divides the cores among them.
	if want := len(l.jobs) + 2; runtime.GOMAXPROCS(0) < want {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(want))
	}
	var at stage
	origin := time.Now()
	defer l.report(&at, origin, o)()

	phase := func(ph Phase, limit time.Duration) (time.Duration, error) {
		at.begin.Store(int64(time.Since(origin)))
		at.phase.Store(int32(ph))
		return l.abreast(ctx, limit)
	}
	sweep := func(ph Phase, write bool) error {
		for i, j := range l.jobs {
			start, blocks := j.plan.share(i)
			j.pick, j.left = newSweep(write, slices.Max(j.plan.sizes), start, blocks)
			j.count = counters{}
		}
		_, err := phase(ph, 0)
		return err
	}

	if l.cfg.Verify || l.cfg.Fill {
		if err := sweep(PhaseFill, true); err != nil {
			return l.result(time.Second, sample{}, sample{}), fmt.Errorf("%v: %w", PhaseFill, err)
		}
	}
	var outside counters // what the phases that are not measured found
	for _, j := range l.jobs {
		outside.errors += j.count.errors
		outside.verifyErrors += j.count.verifyErrors
		j.reset()
	}
	before := l.sample(o)
	elapsed, err := phase(PhaseMeasure, l.cfg.Runtime)
	r := l.result(elapsed, before, l.sample(o))
	if err == nil && l.cfg.Verify && ctx.Err() == nil {
		if err = sweep(PhaseReadBack, false); err != nil {
			err = fmt.Errorf("%v: %w", PhaseReadBack, err)
		}
		for _, j := range l.jobs {
			outside.errors += j.count.errors
			outside.verifyErrors += j.count.verifyErrors
		}
	}
	r.Errors += outside.errors
	r.VerifyErrors += outside.verifyErrors
	r.Interrupted = ctx.Err() != nil
	for i, j := range l.jobs {
		for _, p := range j.problems {
			r.Problems = append(r.Problems, fmt.Sprintf("job %d: %s", i, p))
		}
	}
	at.phase.Store(int32(PhaseDone))
	return r, err
}

// reset makes a job ready to be measured.
func (j *job) reset() {
	start, blocks := j.plan.region(j.index)
	j.pick = newPicker(j.plan.cfg.Kind, j.plan.sizes, j.plan.align, start, blocks)
	j.left = noEnd
	j.count = counters{}
	j.tell()
	j.latency.Reset()
}

// abreast runs the loop of every job on a thread of its own, for limit if it is not 0, and returns how long they
// took from the first command to the last completion.
func (l *Load) abreast(ctx context.Context, limit time.Duration) (time.Duration, error) {
	var (
		stop        atomic.Bool
		ready, done sync.WaitGroup
		start       = make(chan struct{})
		errs        = make([]error, len(l.jobs))
	)
	for i, j := range l.jobs {
		ready.Add(1)
		done.Go(func() {
			// Locked and not unlocked: the thread, whose affinity is changed, ends with the goroutine.
			runtime.LockOSThread()
			var err error
			if n := len(l.cfg.CPUs); n > 0 {
				err = cpus.Pin(l.cfg.CPUs[i%n])
			}
			ready.Done()
			<-start
			if err == nil {
				err = j.loop(&stop)
			}
			if errs[i] = err; err != nil {
				stop.Store(true)
			}
		})
	}
	ready.Wait()
	defer context.AfterFunc(ctx, func() { stop.Store(true) })()
	begin := time.Now()
	if limit > 0 {
		timer := time.AfterFunc(limit, func() { stop.Store(true) })
		defer timer.Stop()
	}
	close(start)
	done.Wait()
	elapsed := time.Since(begin)
	// One cause makes all jobs fail; the first is enough.
	if i := slices.IndexFunc(errs, func(err error) bool { return err != nil }); i >= 0 {
		return elapsed, fmt.Errorf("job %d: %w", i, errs[i])
	}
	return elapsed, nil
}

// sample is a reading of everything that only grows.
type sample struct {
	mmio, wakeups uint64
	ops           []guestdrv.OpStats
	guest, host   time.Duration
	polling       time.Duration // of the guest's
	hostKnown     bool
}

func (l *Load) sample(o Observer) (s sample) {
	for _, j := range l.jobs {
		st := j.q.Stats()
		s.mmio += st.MMIOWrites
		s.wakeups += st.Wakeups
		s.polling += st.Polling
		s.addOps(j.q.Ops())
	}
	s.guest = ownCPU()
	s.host, s.hostKnown = o.HostCPU()
	return s
}

func (s *sample) addOps(ops []guestdrv.OpStats) {
	for i := range ops {
		k := slices.IndexFunc(s.ops, func(o guestdrv.OpStats) bool { return o.Op == ops[i].Op })
		if k < 0 {
			s.ops = append(s.ops, ops[i])
			continue
		}
		s.ops[k].Errors += ops[i].Errors
		s.ops[k].Latency.Merge(&ops[i].Latency)
	}
}

// opsSince returns what each kind of command did between two samples.
func (s *sample) opsSince(before *sample) []Op {
	ops := []Op{}
	was, is := guestdrv.Stats{Ops: before.ops}, guestdrv.Stats{Ops: s.ops}
	d := is.Sub(&was)
	for i := range d.Ops {
		o := &d.Ops[i]
		h := &o.Latency
		ops = append(ops, Op{Op: o.Op.String(), IOs: h.Count(), Errors: o.Errors, Latency: Latency{
			Mean: int64(h.Mean()), P50: int64(h.Quantile(0.5)), P99: int64(h.Quantile(0.99)), P999: int64(h.Quantile(0.999)), Max: int64(h.Max()),
		}})
	}
	slices.SortFunc(ops, func(a, b Op) int { return cmp.Compare(a.Op, b.Op) })
	return ops
}

// trouble returns what the controller has been through, or nil.
func (l *Load) trouble() *Trouble {
	if l.ctrl == nil {
		return nil
	}
	s := l.ctrl.Stats()
	if s.Timeouts+s.Aborts+s.Resets == 0 {
		return nil
	}
	return &Trouble{Timeouts: s.Timeouts, Aborts: s.Aborts, Resets: s.Resets}
}

// ownCPU returns the user and system time of this process.
func ownCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// result puts together what the jobs counted.
func (l *Load) result(elapsed time.Duration, a, b sample) *Result {
	var sum counters
	latency := hdrhistogram.New(1, maxLatency, sharpness)
	for _, j := range l.jobs {
		sum.ios += j.count.ios
		sum.bytes += j.count.bytes
		sum.errors += j.count.errors
		sum.verifyErrors += j.count.verifyErrors
		latency.Merge(j.latency)
	}
	seconds := max(elapsed, 1).Seconds()
	r := &Result{
		IOs:  sum.ios,
		IOPS: float64(sum.ios) / seconds, BandwidthMiB: float64(sum.bytes) / seconds / (1 << 20),
		Latency: Latency{
			Mean: int64(latency.Mean()), P50: latency.ValueAtQuantile(50), P99: latency.ValueAtQuantile(99),
			P999: latency.ValueAtQuantile(99.9), Max: latency.Max(),
		},
		MMIOPerIO: perIO(b.mmio-a.mmio, sum.ios), WakeupsPerIO: perIO(b.wakeups-a.wakeups, sum.ios),
		Errors: sum.errors, VerifyErrors: sum.verifyErrors, Ops: b.opsSince(&a), Trouble: l.trouble(),
		Kind: l.cfg.Kind, BlockSize: uint64(l.cfg.Sizes.Max()), Depth: l.cfg.Depth, Jobs: l.cfg.Jobs, Seconds: seconds,
	}
	if len(l.cfg.Sizes) > 1 {
		for _, s := range l.cfg.Sizes {
			r.BlockSizes = append(r.BlockSizes, uint64(s))
		}
	}
	if l.ctrl != nil {
		r.Doorbells = l.ctrl.Doorbells()
	}
	r.Priorities = l.shares(seconds)
	if sum.ios > 0 {
		guest := (b.guest - a.guest).Seconds() * 1e6 / float64(sum.ios)
		r.CPU.Guest = &guest
		if polling := (b.polling - a.polling).Seconds() * 1e6 / float64(sum.ios); polling > 0 {
			r.CPU.Polling = &polling
		}
		if a.hostKnown && b.hostKnown {
			host := (b.host - a.host).Seconds() * 1e6 / float64(sum.ios)
			r.CPU.Host = &host
		}
	}
	return r
}

// shares returns what the jobs of each priority did.
func (l *Load) shares(seconds float64) (shares []PriorityShare) {
	if len(l.cfg.Priorities) == 0 {
		return nil
	}
	for p := guestdrv.PriorityDefault; p <= guestdrv.PriorityLow; p++ {
		s := PriorityShare{Priority: p.String()}
		for i, j := range l.jobs {
			if l.cfg.priority(i) == p {
				s.Jobs++
				s.IOPS += float64(j.count.ios) / seconds
			}
		}
		if s.Jobs > 0 {
			shares = append(shares, s)
		}
	}
	return shares
}

func perIO(n, ios uint64) float64 {
	if ios == 0 {
		return 0
	}
	return float64(n) / float64(ios)
}

// report calls o.Progress until the function that it returns is called.
func (l *Load) report(at *stage, origin time.Time, o Observer) (end func()) {
	if o.Progress == nil {
		return func() {}
	}
	if o.Every == 0 {
		o.Every = 250 * time.Millisecond
	}
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(o.Every)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				o.Progress(l.progress(Phase(at.phase.Load()), time.Since(origin)-time.Duration(at.begin.Load())))
			}
		}
	}()
	return func() { close(quit); <-ended }
}

func (l *Load) progress(ph Phase, elapsed time.Duration) Progress {
	p := Progress{Phase: ph, Elapsed: elapsed}
	if ph == PhaseMeasure {
		p.Total = l.cfg.Runtime
	}
	for _, j := range l.jobs {
		p.IOs += j.seen.ios.Load()
		p.Bytes += j.seen.bytes.Load()
		p.Errors += j.seen.errors.Load() + j.seen.verify.Load()
	}
	return p
}

// Idle stays attached for d with no command under way and returns the CPU time that both sides used.
func (l *Load) Idle(ctx context.Context, d time.Duration, o Observer) (*Idle, error) {
	if o.HostCPU == nil {
		return nil, errors.New("idle: the other side's CPU time is not known")
	}
	select { // what the load has left to do, such as going to sleep, is not idling
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(200 * time.Millisecond):
	}
	begin, before := time.Now(), l.sample(o)
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(d):
	}
	seconds, after := time.Since(begin).Seconds(), l.sample(o)
	i := &Idle{Seconds: seconds, Guest: 100 * (after.guest - before.guest).Seconds() / seconds}
	if before.hostKnown && after.hostKnown {
		host := 100 * (after.host - before.host).Seconds() / seconds
		i.Host = &host
	}
	return i, nil
}
