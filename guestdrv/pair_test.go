package guestdrv_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// drain publishes and reaps until nothing is outstanding.
func drain(t *testing.T, p *guestdrv.QueuePair, each func(guestdrv.Result)) {
	t.Helper()
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	var out [16]guestdrv.Result
	for p.Outstanding() > 0 {
		if err := p.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		n, err := p.Reap(out[:])
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range out[:n] {
			each(r)
		}
	}
}

func ok(t *testing.T) func(guestdrv.Result) {
	return func(r guestdrv.Result) {
		t.Helper()
		if !r.Status.OK() || r.Latency <= 0 {
			t.Errorf("tag %d: %v after %v", r.Tag, r.Status, r.Latency)
		}
	}
}

// TestPairRoundTrips writes and reads in batches, over many laps of the rings.
func TestPairRoundTrips(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		for _, poll := range []bool{false, true} {
			cfg := v.cfg
			cfg.CAP = nvme.CAP(0).WithMQES(6).WithTO(2).WithCSS(nvme.CAPCSSNVM)
			c := v.open(t, cfg, testOptions())
			if cfg.Vectors > 0 && !poll { // without any the pair polls by itself
				if _, err := c.NewQueuePair(guestdrv.QueuePairOptions{}); err == nil || !strings.Contains(err.Error(), "Poll") {
					t.Fatalf("a pair with an interrupt where none is free: %v", err)
				}
				continue
			}
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: poll})
			if err != nil {
				t.Fatal(err)
			}
			if p.Depth() != 6 {
				t.Fatalf("depth %d", p.Depth())
			}
			buf, err := c.Alloc(8 * 4096)
			if err != nil {
				t.Fatal(err)
			}
			copy(buf.Bytes(), randomBytes(8*4096))
			want := append([]byte(nil), buf.Bytes()...)
			for lap := range 20 {
				op := uint8(nvme.IOWrite)
				if lap%2 == 1 {
					op = nvme.IORead
					clear(buf.Bytes())
				}
				var ios []guestdrv.IO
				for i := range uint64(8) {
					ios = append(ios, guestdrv.IO{Op: op, NSID: 1, LBA: i * 8, Blocks: 8, IOVA: buf.IOVA() + i*4096, Tag: i, FUA: i == 3})
				}
				for len(ios) > 0 {
					n, err := p.Submit(ios)
					if err != nil || n == 0 {
						t.Fatalf("%d, %v", n, err)
					}
					ios = ios[n:]
					drain(t, p, ok(t))
				}
				mustEqual(t, buf.Bytes(), want)
			}
			st := p.Stats()
			if st.Commands != 160 || st.QID != p.QID() {
				t.Errorf("stats %+v", st)
			}
			if v.want == "mmap" && st.MMIOWrites != 0 {
				t.Errorf("%d MMIO writes to a mapped page", st.MMIOWrites)
			}
			if v.want == "mmio" && st.MMIOWrites < 27 {
				t.Errorf("%d MMIO writes", st.MMIOWrites)
			}
			if all := c.Stats(); all.Commands < 160 || len(all.Queues) < 3 {
				t.Errorf("stats %+v", all)
			}
			buf.Free()
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if _, err := p.Submit([]guestdrv.IO{{}}); !errors.Is(err, guestdrv.ErrClosed) {
				t.Errorf("submit after close: %v", err)
			}
			if c.Stats().Commands < 160 {
				t.Error("a closed pair is not counted any more")
			}
			c.Close()
		}
	})
}

func TestPairOtherCommands(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	buf, err := c.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Free()
	copy(buf.Bytes(), randomBytes(4096))
	submit := func(io guestdrv.IO) nvme.Status {
		t.Helper()
		io.NSID = 1
		if n, err := p.Submit([]guestdrv.IO{io}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		var st nvme.Status
		drain(t, p, func(r guestdrv.Result) { st = r.Status })
		return st
	}
	for _, tc := range []struct {
		io   guestdrv.IO
		want nvme.Status
	}{
		{guestdrv.IO{Op: nvme.IOWrite, Blocks: 8, IOVA: buf.IOVA()}, 0},
		{guestdrv.IO{Op: nvme.IOFlush}, 0},
		{guestdrv.IO{Op: nvme.IOCompare, Blocks: 8, IOVA: buf.IOVA()}, 0},
		{guestdrv.IO{Op: nvme.IOWriteZeroes, LBA: 1, Blocks: 1}, 0},
		{guestdrv.IO{Op: nvme.IOCompare, Blocks: 8, IOVA: buf.IOVA()}, nvme.StatusCompareFailure},
		{guestdrv.IO{Op: nvme.IORead, Blocks: 1, LBA: 1 << 40, IOVA: buf.IOVA()}, nvme.StatusLBAOutOfRange},
		{guestdrv.IO{Op: nvme.IOVerify, Blocks: 1}, nvme.StatusInvalidOpcode},
	} {
		if got := submit(tc.io); got.Code() != tc.want {
			t.Errorf("%+v: %v", tc.io, got)
		}
	}
	clear(buf.Bytes())
	buf.Bytes()[4] = 2 // one range of 2 blocks at 0
	if got := submit(guestdrv.IO{Op: nvme.IODSM, Blocks: 1, IOVA: buf.IOVA()}); !got.OK() {
		t.Error(got)
	}
	mustEqual(t, c.dev.Disk(1)[:1024], make([]byte, 1024))
}

func TestPairRefusesNonsense(t *testing.T) {
	c := openInProc(t, nvmetest.Config{MDTS: 1}, testOptions())
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	good := guestdrv.IO{Op: nvme.IORead, NSID: 1, Blocks: 1, IOVA: 1 << 32}
	for _, bad := range []guestdrv.IO{
		{Op: nvme.IORead, NSID: 2, Blocks: 1},
		{Op: nvme.IORead, NSID: 1, Blocks: 0},
		{Op: nvme.IORead, NSID: 1, Blocks: 17},
		{Op: nvme.IORead, NSID: 1, Blocks: 1<<32 - 1},
		{Op: nvme.IORead, NSID: 1, Blocks: 16, IOVA: 1<<32 + 2},
		{Op: nvme.IOCompare, NSID: 1, Blocks: 17},
		{Op: nvme.IOWriteZeroes, NSID: 1, Blocks: 65537},
		{Op: nvme.IODSM, NSID: 1, Blocks: 257},
		{Op: 0x7F, NSID: 1, Blocks: 1},
	} {
		if n, err := p.Submit([]guestdrv.IO{good, bad, good}); n != 1 || err == nil {
			t.Errorf("%+v: %d, %v", bad, n, err)
		}
	}
	if p.Outstanding() != 9 {
		t.Errorf("%d outstanding", p.Outstanding())
	}
	drain(t, p, func(guestdrv.Result) {})
	if err := p.Wait(ctx); err == nil {
		t.Error("waited for nothing")
	}
	if c.Err() != nil {
		t.Errorf("the caller's mistakes failed the controller: %v", c.Err())
	}
	if _, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 5000}); err == nil {
		t.Error("a pair of depth 5000")
	}
}

func TestPairWaitEndsWithContext(t *testing.T) {
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	for _, poll := range []bool{false, true} {
		c := openInProc(t, cfg, testOptions())
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: poll})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
			t.Fatal(err)
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
		if err := p.Wait(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		cancel()
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		c.dev.Release()
		drain(t, p, ok(t))
		p.Close()
	}
}

// TestPairsComeAndGo checks that queue ids, vectors and memory are used again.
func TestPairsComeAndGo(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	for range 10 {
		var pairs []*guestdrv.QueuePair
		for range 4 {
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 1000})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
				t.Fatal(err)
			}
			drain(t, p, ok(t))
			pairs = append(pairs, p)
		}
		if _, err := c.NewQueuePair(guestdrv.QueuePairOptions{}); err == nil || !strings.Contains(err.Error(), "MaxQueuePairs") {
			t.Fatalf("a fifth pair: %v", err)
		}
		for _, p := range pairs {
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestPairOutlivesController(t *testing.T) {
	for _, open := range []opener{openInProc, openSocket} {
		for _, mapped := range []bool{false, true} {
			c := open(t, nvmetest.Config{Mapped: mapped, NoShadow: mapped}, testOptions())
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
			if err != nil {
				t.Fatal(err)
			}
			buf, err := c.Alloc(4096)
			if err != nil {
				t.Fatal(err)
			}
			stop := make(chan struct{})
			done := make(chan error)
			go func() {
				var out [8]guestdrv.Result
				for {
					select {
					case <-stop:
						stop = nil
					default:
					}
					_, err := p.Submit([]guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: 8, IOVA: buf.IOVA()}})
					if err == nil {
						err = p.Publish()
					}
					if err == nil {
						err = p.Wait(ctx)
					}
					if err == nil {
						_, err = p.Reap(out[:])
					}
					if err != nil {
						done <- err
						return
					}
				}
			}()
			time.Sleep(5 * time.Millisecond)
			if err := c.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			close(stop)
			if err := <-done; !errors.Is(err, guestdrv.ErrClosed) {
				t.Errorf("pair after Close: %v", err)
			}
			buf.Bytes()[0] = 1 // still mapped
			buf.Free()
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
