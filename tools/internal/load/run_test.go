package load

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRunMeasures(t *testing.T) {
	for _, kind := range Kinds() {
		d := newDisk(1 << 20)
		var reads, writes int
		d.spoil = func(io *guestdrv.IO, _ []byte) (bool, nvme.Status) {
			if io.Op == nvme.IOWrite {
				writes++
			} else {
				reads++
			}
			if io.NSID != 1 || io.LBA%8 != 0 || io.Blocks != 8 {
				t.Errorf("%s: %+v", kind, io)
			}
			return false, 0
		}
		l := newTestLoad(t, Config{Kind: kind, Depth: 40, Jobs: 2, Runtime: 30 * time.Millisecond}, d)
		r, err := l.Run(context.Background(), Observer{HostCPU: func() (time.Duration, bool) { return 0, true }})
		if err != nil {
			t.Fatal(err)
		}
		if (reads > 0) != kind.reads() || (writes > 0) != kind.writes() || uint64(reads+writes) != r.IOs {
			t.Errorf("%s: %d reads, %d writes, result %d", kind, reads, writes, r.IOs)
		}
		if r.IOPS < 1 || r.Seconds < 0.03 || r.Latency.P50 < 1000 || r.Latency.Max > 2050 || r.MMIOPerIO <= 0 || r.CPU.Guest == nil || r.CPU.Host == nil {
			t.Errorf("%s: %+v", kind, r)
		}
		for _, j := range l.jobs {
			if most := j.q.(*fakeQueue).most; most != 40 {
				t.Errorf("%s: %d commands under way at most, want 40", kind, most)
			}
		}
	}
}

func TestRandomAddressesCoverTheSpan(t *testing.T) {
	d := newDisk(64 << 10)
	seen := map[uint64]int{}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	d.spoil = func(io *guestdrv.IO, _ []byte) (bool, nvme.Status) {
		if seen[io.LBA]++; len(seen) == 16 {
			cancel()
		}
		return false, 0
	}
	l := newTestLoad(t, Config{Depth: 8, Runtime: 20 * time.Second}, d)
	if _, err := l.Run(ctx, Observer{}); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 16 {
		t.Errorf("%d of 16 places were read: %v", len(seen), seen)
	}
}

func TestFillWritesEveryBlockOnce(t *testing.T) {
	d := newDisk(1000 * testBlock) // neither a multiple of the transfers nor of the jobs
	written := make([]int, 1000)
	d.spoil = func(io *guestdrv.IO, _ []byte) (bool, nvme.Status) {
		if io.Op == nvme.IOWrite {
			for i := range io.Blocks {
				written[io.LBA+uint64(i)]++
			}
		}
		return false, 0
	}
	l := newTestLoad(t, Config{Fill: true, Jobs: 3, Runtime: time.Millisecond}, d)
	if _, err := l.Run(context.Background(), Observer{}); err != nil {
		t.Fatal(err)
	}
	for lba, n := range written {
		if n != 1 {
			t.Fatalf("block %d was written %d times", lba, n)
		}
	}
}

func TestBatchBoundsOneDoorbell(t *testing.T) {
	l := newTestLoad(t, Config{Batch: 1, Runtime: 10 * time.Millisecond}, newDisk(1<<20))
	r, err := l.Run(context.Background(), Observer{})
	if err != nil || r.MMIOPerIO != 1 {
		t.Errorf("%v doorbells for an I/O, %v", r.MMIOPerIO, err)
	}
}

func TestKindsOfCommandAreToldApart(t *testing.T) {
	d := newDisk(1 << 20)
	failures := uint64(0)
	d.spoil = func(io *guestdrv.IO, _ []byte) (bool, nvme.Status) {
		if io.Op == nvme.IOWrite && failures < 3 {
			failures++
			return true, nvme.StatusWriteFault
		}
		return false, 0
	}
	l := newTestLoad(t, Config{Kind: RandRW, Jobs: 2, Runtime: 20 * time.Millisecond}, d)
	r, err := l.Run(context.Background(), Observer{})
	if err != nil || len(r.Ops) != 2 || r.Ops[0].Op != "read" || r.Ops[1].Op != "write" {
		t.Fatalf("%+v, %v", r.Ops, err)
	}
	if n := r.Ops[0].IOs + r.Ops[1].IOs; n != r.IOs || r.Ops[0].Errors != 0 || r.Ops[1].Errors != 3 {
		t.Errorf("%d of %d commands: %+v", n, r.IOs, r.Ops)
	}
	for _, o := range r.Ops {
		if l := o.Latency; l.P50 < 1000 || l.P50 > 2200 || l.Max > 2000 || l.Mean < 1000 || l.Mean > 2000 {
			t.Errorf("%s: latencies from 1 to 2 us are %+v", o.Op, l)
		}
	}
}

func TestSequentialAddressesRiseAndWrap(t *testing.T) {
	d := newDisk(64 << 10)
	p, err := makePlan(Config{Kind: SeqRead, Jobs: 2}.Defaults(), geometry{blockSize: testBlock, size: uint64(len(d.data)), maxEntries: 64})
	if err != nil {
		t.Fatal(err)
	}
	start, blocks := p.region(1)
	pick := newPicker(SeqRead, p.sizes, p.align, start, blocks)
	for lap := range 3 {
		for i := range uint64(8) {
			write, lba, n := pick.peek()
			if write || lba != 64+i*8 || n != 8 {
				t.Fatalf("lap %d, transfer %d: write %v, lba %d, %d blocks", lap, i, write, lba, n)
			}
			pick.advance(n)
		}
	}
}

func TestErrorsAreCountedAndNamed(t *testing.T) {
	d := newDisk(1 << 20)
	k := 0
	d.spoil = func(*guestdrv.IO, []byte) (bool, nvme.Status) {
		k++
		return k%10 == 0, nvme.StatusLBAOutOfRange
	}
	r, err := newTestLoad(t, Config{Runtime: 20 * time.Millisecond}, d).Run(context.Background(), Observer{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Errors != r.IOs/10 || len(r.Problems) == 0 || !strings.Contains(r.Problems[0], "job 0: read of 8 blocks at lba ") || !strings.Contains(r.Problems[0], "(0/80h)") {
		t.Errorf("%d errors of %d: %v", r.Errors, r.IOs, r.Problems)
	}
}

func TestADeadQueueEndsTheLoad(t *testing.T) {
	l := newTestLoad(t, Config{Jobs: 3, Runtime: time.Minute}, newDisk(1<<20))
	dead := errors.New("the device is gone")
	l.jobs[1].q.(*fakeQueue).fail = dead
	r, err := l.Run(context.Background(), Observer{})
	if !errors.Is(err, dead) || !strings.Contains(err.Error(), "job 1") || r == nil {
		t.Errorf("%v, %v", r, err)
	}
}

func TestCancelEndsTheMeasurementEarly(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(20*time.Millisecond, cancel)
	r, err := newTestLoad(t, Config{Runtime: time.Minute, Verify: true}, newDisk(1<<20)).Run(ctx, Observer{})
	if err != nil || !r.Interrupted || r.Seconds > 30 || r.VerifyErrors != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestProgress(t *testing.T) {
	const runtime = 20 * time.Second
	var calls []Progress
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l := newTestLoad(t, Config{Runtime: runtime}, newDisk(1<<20))
	_, err := l.Run(ctx, Observer{Every: 10 * time.Millisecond, Progress: func(p Progress) {
		if calls = append(calls, p); p.IOs > 0 {
			cancel()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	shown := false
	for _, p := range calls {
		if p.Phase == PhaseReady && p.IOs == 0 && p.Total == 0 && !shown {
			continue // the machine was too busy to begin before the first call
		}
		if p.Phase != PhaseMeasure || p.Total != runtime || p.Elapsed > runtime {
			t.Fatalf("%+v", calls)
		}
		shown = shown || p.IOs > 0 && p.Bytes == p.IOs*4096
	}
	if !shown {
		t.Errorf("no I/Os are shown: %+v", calls)
	}
}

func TestNothingIsAllocatedForAnIO(t *testing.T) {
	q := &instantQueue{}
	j := instantJob(q)
	if n := testing.AllocsPerRun(100, func() { q.rounds(t, j, 100) }); n != 0 {
		t.Errorf("%v allocations in 100 batches", n)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for want, c := range map[string]Config{
		"rw \"hop\"":       {Kind: "hop"},
		"queue depth 5000": {Depth: 5000},
		"batch of 17":      {Batch: 17},
		"2000 jobs":        {Jobs: 2000},
		"runtime":          {Runtime: -1},
		"buffers":          {Jobs: 64, Depth: 4000, Sizes: size.List{128 << 10}},
		"exclude":          {Poll: true, NoSpin: true},
	} {
		err := c.Defaults().Check()
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v; want one line that says %q", c, err, want)
		}
	}
}

func TestPlanSaysWhatDoesNotFit(t *testing.T) {
	g := geometry{blockSize: 4096, size: 1 << 20, maxTransfer: 128 << 10, maxEntries: 64}
	for want, c := range map[string]Config{
		"has blocks of 4 KiB":    {Sizes: size.List{512}},
		"at most 128 KiB":        {Sizes: size.List{256 << 10}},
		"at most 63 commands":    {Depth: 64},
		"namespace 1 has 1 MiB":  {Span: 2 << 20},
		"use fewer jobs":         {Jobs: 300, Kind: SeqRead},
		"smaller blocks or a la": {Span: 4096, Sizes: size.List{8192}},
	} {
		_, err := makePlan(c.Defaults(), g)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v; want one line that says %q", c, err, want)
		}
	}
	p, err := makePlan(Config{Verify: true, Jobs: 4}.Defaults(), geometry{blockSize: 512, size: 100 << 30, maxEntries: 4096})
	if err != nil || p.span*512 != defaultSpan || p.perJob*4 != p.span {
		t.Errorf("%+v, %v", p, err)
	}
}

// TestResultJSON holds the names that scripts rely on.
func TestResultJSON(t *testing.T) {
	guest := 0.5
	r := Result{
		IOPS: 1, BandwidthMiB: 2, Latency: Latency{Mean: 3, P50: 4, P99: 5, P999: 6, Max: 7}, MMIOPerIO: 0.25, WakeupsPerIO: 0.125,
		CPU: CPU{Guest: &guest}, Errors: 8, VerifyErrors: 9, Doorbells: "shadow", Kind: RandRead, BlockSize: 4096, Depth: 32, Jobs: 4, Seconds: 10,
	}
	const want = `{"iops":1,"bw_mib":2,"lat_ns":{"mean":3,"p50":4,"p99":5,"p999":6,"max":7},"mmio_per_io":0.25,"wakeups_per_io":0.125,` +
		`"cpu_s_per_mio":{"guest":0.5,"host":null},"errors":8,"verify_errors":9,"doorbells":"shadow","rw":"randread","bs":4096,"qd":32,"jobs":4,"seconds":10}`
	got, err := json.Marshal(r)
	if err != nil || string(got) != want {
		t.Errorf("%s, %v\nwant %s", got, err, want)
	}
}

// instantQueue completes in order, at once, and does nothing else: what is left is the cost of the loop.
type instantQueue struct {
	tags    [256]uint64
	in, out uint32
}

func (q *instantQueue) Submit(ios []guestdrv.IO) (int, error) {
	for i := range ios {
		q.tags[q.in%256] = ios[i].Tag
		q.in++
	}
	return len(ios), nil
}

func (q *instantQueue) Publish() error { return nil }

func (q *instantQueue) Reap(out []guestdrv.Result) (int, error) {
	n := min(len(out), int(q.in-q.out))
	for i := range n {
		out[i] = guestdrv.Result{Tag: q.tags[q.out%256], Latency: time.Duration(1000 + q.out&1023)}
		q.out++
	}
	return n, nil
}

func (q *instantQueue) Wait(context.Context) error { return nil }
func (q *instantQueue) Stats() guestdrv.QueueStats { return guestdrv.QueueStats{} }
func (q *instantQueue) Ops() []guestdrv.OpStats    { return nil }

func instantJob(q *instantQueue) *job {
	p, err := makePlan(Config{}.Defaults(), geometry{blockSize: 512, size: 1 << 30, maxEntries: 4096})
	if err != nil {
		panic(err)
	}
	j := newJob(p, 0, q, slotsIn(p, make([]byte, p.slotSize*32), 0))
	j.left = noEnd
	return j
}

func (q *instantQueue) rounds(t testing.TB, j *job, n int) {
	for range n {
		if err := j.refill(); err != nil {
			t.Fatal(err)
		}
		got, err := q.Reap(j.results[:])
		if err == nil {
			err = j.account(j.results[:got])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// BenchmarkLoop is the cost of one I/O in the loop, without the driver: each has a latency of its own, the worst case.
func BenchmarkLoop(b *testing.B) {
	q := &instantQueue{}
	j := instantJob(q)
	b.ReportAllocs()
	b.ResetTimer()
	q.rounds(b, j, b.N/maxBatch+1)
}
