package guestdrv_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// opCounts is the number of commands and of errors by kind.
func opCounts(ops []guestdrv.OpStats) map[guestdrv.Op][2]uint64 {
	m := map[guestdrv.Op][2]uint64{}
	for i := range ops {
		m[ops[i].Op] = [2]uint64{ops[i].Latency.Count(), ops[i].Errors}
	}
	return m
}

func TestStatsTellOpcodesApart(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		c := v.open(t, v.cfg, testOptions())
		ns := namespace(t, c, 1)
		settle(t, c)
		before := c.Stats()
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		block := make([]byte, 4096)
		for i := range int64(5) {
			_, err := ns.WriteAt(block, i*4096)
			must(err)
		}
		for i := range int64(3) {
			_, err := ns.ReadAt(block, i*4096)
			must(err)
		}
		must(ns.Flush(ctx))
		must(ns.Discard(ctx, 0, 4096))
		must(ns.WriteZeroes(ctx, 4096, 4096))
		must(ns.Compare(ctx, make([]byte, 512), 4096))
		if ns.Compare(ctx, []byte{511: 1}, 4096) == nil {
			t.Fatal("compare of other data")
		}
		if _, err := c.Admin(ctx, &nvme.Command{Opcode: 0x7F}, nil); err == nil {
			t.Fatal("admin command 7Fh")
		}
		after := c.Stats()
		s := after.Sub(&before)
		want := map[guestdrv.Op][2]uint64{
			guestdrv.OpRead: {3, 0}, guestdrv.OpWrite: {5, 0}, guestdrv.OpFlush: {1, 0}, guestdrv.OpDiscard: {1, 0}, guestdrv.OpWriteZeroes: {1, 0},
			guestdrv.OpCompare: {2, 1}, guestdrv.OpAdmin: {1, 1},
		}
		got := opCounts(s.Ops)
		// What the driver asks about events comes in its own time.
		admin := got[guestdrv.OpAdmin]
		own := admin[0] - 1
		admin[0] = 1
		got[guestdrv.OpAdmin] = admin
		for op, n := range want {
			if got[op] != n {
				t.Errorf("%v: %d commands and errors, want %d", op, got[op], n)
			}
		}
		if len(got) != len(want) || s.Errors != 2 || s.Commands != 14+own {
			t.Errorf("%v; %d errors in %d commands", got, s.Errors, s.Commands)
		}
		read := s.Op(guestdrv.OpRead)
		if l := &read.Latency; l.Mean() <= 0 || l.Max() > time.Minute || l.Quantile(0.5) > l.Max() {
			t.Errorf("latency: mean %v, median %v, max %v", l.Mean(), l.Quantile(0.5), l.Max())
		}
		if o := s.Op(guestdrv.OpOther); o.Op != guestdrv.OpOther || o.Latency.Count() != 0 {
			t.Errorf("other: %d", o.Latency.Count())
		}
		if per := s.MMIOPerIO(); v.want == "mmio" && per < 1 || per > 3 || v.want == "mmap" && per != 0 {
			t.Errorf("%v MMIO writes for each I/O with doorbells %s", per, v.want)
		}
	})
}

func TestStatsOfPairs(t *testing.T) {
	cfg := failing(false, nvme.IOVerify, nvme.StatusUnrecoveredRead)
	c := openInProc(t, cfg, testOptions())
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 16})
	if err != nil {
		t.Fatal(err)
	}
	// Others look on.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			last := uint64(0)
			for {
				s := c.Stats()
				n := s.Op(guestdrv.OpOther).Latency.Count()
				if n < last {
					t.Errorf("from %d to %d", last, n)
				}
				last = n
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	const rounds = 40
	ios := make([]guestdrv.IO, 8)
	for i := range ios {
		ios[i] = guestdrv.IO{Op: nvme.IOFlush, NSID: 1}
		if i >= 5 {
			ios[i] = guestdrv.IO{Op: nvme.IOVerify, NSID: 1, Blocks: 1}
		}
	}
	results := make([]guestdrv.Result, 16)
	for range rounds {
		if n, err := p.Submit(ios); n != len(ios) || err != nil {
			t.Fatal(n, err)
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		for p.Outstanding() > 0 {
			if err := p.Wait(context.Background()); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Reap(results); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(stop)
	wg.Wait()
	check := func(ops []guestdrv.OpStats) {
		t.Helper()
		got := opCounts(ops)
		if got[guestdrv.OpFlush] != [2]uint64{5 * rounds, 0} || got[guestdrv.OpOther] != [2]uint64{3 * rounds, 3 * rounds} {
			t.Errorf("%v", got)
		}
	}
	check(p.Ops())
	s := c.Stats()
	check(s.Ops)
	p.Close()
	s = c.Stats() // what a closed pair has counted is not forgotten
	check(s.Ops)
	if s.Errors != 3*rounds {
		t.Errorf("%d errors", s.Errors)
	}
}

func TestOpNames(t *testing.T) {
	for op, want := range map[guestdrv.Op]string{guestdrv.OpRead: "read", guestdrv.OpWriteZeroes: "write_zeroes", guestdrv.OpAdmin: "admin", 99: "unknown"} {
		if got := op.String(); got != want {
			t.Errorf("%d is %q", op, got)
		}
	}
}
