package doctor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// herd is guests that do at random what guests may do.
type herd struct {
	*testing.T
	m    *hostmed.Mediator
	stop context.Context
}

// TestNoFalseAlarm diagnoses honest guests a thousand times at random moments: in every doorbell mode, with all depths and batches, busy, idle, with
// commands that are written and not published, with completions that are not taken, held back by limits, with queues and controllers that come and go.
func TestNoFalseAlarm(t *testing.T) {
	diagnoses, differ := 1000, 1000
	if testing.Short() {
		diagnoses, differ = 300, 500
	}
	dir := t.TempDir()
	config := hostmed.Config{CPUs: []int{-1, -1}, Logger: testrig.Log(t)}
	for name, c := range map[string]hostmed.ControllerConfig{
		"shadow":  {Doorbells: hostmed.Shadow, Namespaces: []string{"mem:size=16MiB"}},
		"stride":  {Doorbells: hostmed.Shadow, DSTRD: 4, Namespaces: []string{"null:size=1GiB"}},
		"slow":    {Doorbells: hostmed.Shadow, Namespaces: []string{"fault:delay=500ms@read@rate=1/300,over=mem:size=19MiB"}},
		"blocked": {Doorbells: hostmed.Shadow, Namespaces: []string{"mem:size=20MiB"}},
		"limited": {Doorbells: hostmed.Shadow, Namespaces: []string{"mem:size=17MiB"}, Limits: hostmed.Limits{IOPS: hostmed.Limit{Rate: 500, Burst: 50}}},
		"trap":    {Doorbells: hostmed.Trap, Namespaces: []string{"file:" + filepath.Join(dir, "disk") + ",size=16MiB"}},
		"mmap":    {Doorbells: hostmed.Mmap, Namespaces: []string{"mem:size=18MiB"}},
	} {
		c.Socket = filepath.Join(dir, name)
		config.Controllers = append(config.Controllers, c)
	}
	m, err := hostmed.New(config)
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	stop, end := context.WithCancel(t.Context())
	defer end()
	h := &herd{T: t, m: m, stop: stop}
	var guests sync.WaitGroup
	for _, c := range config.Controllers {
		guests.Go(func() {
			if filepath.Base(c.Socket) == "blocked" {
				h.bare(connect(t, m, c.Socket))
			} else {
				h.guest(c.Socket)
			}
		})
	}
	guests.Go(func() { h.limits(filepath.Join(dir, "limited")) })

	look := NewLooker()
	defer look.Close()
	var window []Sample
	seen := map[Verdict]int{}
	states := map[string]bool{}
	n := 0
	for n < diagnoses || len(states) < differ {
		if t.Failed() {
			break
		}
		s, files, err := m.InspectMemory(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		window = append(window, look.Look(s, files))
		for _, f := range files {
			f.Close()
		}
		window = slices.DeleteFunc(window, func(old Sample) bool { return s.Taken-old.Taken > int64(600*time.Millisecond) })
		time.Sleep(time.Duration(rand.IntN(15)) * time.Millisecond)
		if len(window) < 4 {
			continue
		}
		n++
		for _, f := range (Options{Samples: 3, Still: 200 * time.Millisecond}).Diagnose(window) {
			seen[f.Verdict]++
			states[fmt.Sprint(f.Controller, f.Queue, f.Values["tail"], f.Values["consumed"], f.Values["inflight"], f.Values["kicks"], f.Values["cq_tail"], f.Values["head"], f.Verdict)] = true
			if f.Verdict == Broken {
				t.Errorf("a false alarm: %+v\n%+v", f, window[len(window)-1])
			}
		}
	}
	end()
	guests.Wait()
	t.Logf("%d diagnoses, %d different states: %v", n, len(states), seen)
	if seen[Idle] == 0 || seen[Busy] == 0 || seen[Slow] == 0 {
		t.Errorf("%v", seen)
	}
}

func (h *herd) over() bool { return h.stop.Err() != nil }

// rest waits up to a random time.
func (h *herd) rest(most time.Duration) {
	select {
	case <-time.After(time.Duration(rand.Int64N(int64(most)))):
	case <-h.stop.Done():
	}
}

func (h *herd) fail(err error) bool {
	if err != nil && !errors.Is(err, context.Canceled) {
		h.Error(err)
	}
	return err != nil
}

// guest connects, works, and goes, again and again.
func (h *herd) guest(socket string) {
	for !h.over() {
		c, err := guestdrv.Open(context.Background(), "vfio-user:"+socket, guestdrv.Options{Queues: 1, DMASize: 16 << 20, Vendor2014: rand.IntN(4) == 0})
		if h.fail(err) {
			return
		}
		var pairs sync.WaitGroup
		end := time.Now().Add(time.Duration(rand.IntN(3000)) * time.Millisecond)
		for range 1 + rand.IntN(3) {
			pairs.Go(func() {
				for !h.over() && time.Now().Before(end) {
					h.pair(c)
				}
			})
		}
		pairs.Wait()
		if h.fail(c.Close()) {
			return
		}
		h.rest(100 * time.Millisecond)
	}
}

// pair is the life of one queue pair.
func (h *herd) pair(c *guestdrv.Controller) {
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: []uint32{2, 3, 8, 33, 128}[rand.IntN(5)], Poll: rand.IntN(3) == 0, NoSpin: rand.IntN(2) == 0})
	if h.fail(err) {
		return
	}
	defer func() { h.fail(p.Close()) }()
	b, err := c.Alloc(4096)
	if h.fail(err) {
		return
	}
	defer b.Free()
	out := make([]guestdrv.Result, 16)
	for range 1 + rand.IntN(60) {
		if h.over() {
			break
		}
		ios := make([]guestdrv.IO, 1+rand.IntN(p.Depth()))
		for i := range ios {
			ios[i] = guestdrv.IO{Op: nvme.IORead, NSID: 1, LBA: rand.Uint64N(1000), Blocks: 8, IOVA: b.IOVA()}
		}
		if _, err := p.Submit(ios); h.fail(err) {
			return
		}
		if rand.IntN(40) == 0 {
			h.rest(500 * time.Millisecond) // written, not published
		}
		if h.fail(p.Publish()) {
			return
		}
		if rand.IntN(40) == 0 {
			h.rest(500 * time.Millisecond) // completions are not taken
		}
		for left := rand.IntN(1 + p.Outstanding()/2); p.Outstanding() > left; {
			if h.fail(p.Wait(context.Background())) {
				return
			}
			n, err := p.Reap(out[:1+rand.IntN(len(out))])
			if h.fail(err) {
				return
			}
			for _, r := range out[:n] {
				if !r.Status.OK() {
					h.Errorf("%v", r.Status)
				}
			}
		}
		switch rand.IntN(12) {
		case 0:
			h.rest(700 * time.Millisecond)
		case 1, 2, 3:
			h.rest(time.Millisecond)
		}
	}
	for p.Outstanding() > 0 {
		if h.fail(p.Wait(context.Background())) {
			return
		}
		if _, err := p.Reap(out); h.fail(err) {
			return
		}
	}
}

// bare is a guest that resets its controller, has CQs smaller than SQs, and gives CQ entries back late.
func (h *herd) bare(g *guest) {
	for !h.over() {
		g.enable(rand.IntN(4) != 0)
		for qid := uint16(1); qid < 4; qid++ {
			p := g.pair(qid, 2+rand.Uint32N(30), 2+rand.Uint32N(15))
			for range 1 + rand.IntN(8) {
				n := 1 + rand.IntN(int(p.size)-1)
				p.flush(n)
				g.must(p.tail.Publish(p.sq.Tail()))
				for left := n; left > 0; {
					if rand.IntN(20) == 0 {
						h.rest(600 * time.Millisecond)
					}
					got := min(left, 1+rand.IntN(int(p.cqSize)-1))
					p.reap(got)
					left -= got
					if rand.IntN(10) == 0 {
						h.rest(400 * time.Millisecond)
					}
					g.must(p.head.Publish(p.cq.Head()))
				}
			}
		}
	}
}

// limits changes what a guest may.
func (h *herd) limits(socket string) {
	for !h.over() {
		h.fail(h.m.SetControllerLimits(socket, hostmed.Limits{IOPS: hostmed.Limit{Rate: 2 << rand.IntN(14)}}))
		h.rest(500 * time.Millisecond)
	}
}
