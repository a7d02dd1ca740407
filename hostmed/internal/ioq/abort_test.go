package ioq

import (
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// statuses reaps n completions, by CID.
func (p *pair) statuses(n int) map[uint16]nvme.Status {
	p.r.t.Helper()
	m := map[uint16]nvme.Status{}
	for _, e := range p.reap(n) {
		m[e.CID()] = e.Status().Code()
	}
	return m
}

// TestAbortOfWhatIsNotFetched has a CQ so small that most commands stay in their SQ. It wraps around.
func TestAbortOfWhatIsNotFetched(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
		c.backend = dev
		r := newRig(t, c)
		p := r.pairOf(1, 8, 4)
		for round := range 5 {
			var cids []uint16
			for range 7 {
				cids = append(cids, p.push(rw(nvme.IORead, 0, 1, base+dataOff)))
			}
			p.publish()
			r.eventually("as many to begin as there is room for", func() bool { return dev.held() == 3 })
			if r.ctl.Abort(1, cids[0]) || r.ctl.Abort(1, 60000) || r.ctl.Abort(2, cids[5]) {
				t.Error("aborted what cannot be")
			}
			for _, i := range []int{4, 6, 4} {
				if !r.ctl.Abort(1, cids[i]) {
					t.Errorf("round %d: command %d was not aborted", round, i)
				}
			}
			done := map[uint16]nvme.Status{}
			for len(done) < 7 {
				dev.finish(1)
				for p.cq.Ready() {
					for cid, st := range p.statuses(1) {
						done[cid] = st
					}
				}
			}
			for i, cid := range cids {
				want := nvme.StatusSuccess
				if i == 4 || i == 6 {
					want = nvme.StatusAbortRequested
				}
				if st, ok := done[cid]; !ok || st != want {
					t.Errorf("round %d: command %d: %v, want %v", round, i, st, want)
				}
			}
			s := r.ctl.sqs[1].Load()
			s.g.w.Call(func() {
				if len(s.aborts) != 0 {
					t.Errorf("%v is still to be aborted", s.aborts)
				}
			})
		}
		r.noError()
	})
}

// TestAbortedEntryChanges has the guest put another command where one waits to be aborted: that one is not.
func TestAbortedEntryChanges(t *testing.T) {
	dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: dev})
	p := r.pairOf(1, 8, 2)
	for range 2 {
		p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	}
	p.publish()
	r.eventually("one to begin", func() bool { return dev.held() == 1 })
	if !r.ctl.Abort(1, 1) {
		t.Fatal("not aborted")
	}
	other := rw(nvme.IORead, 0, 1, base+dataOff)
	other.CID = 77
	r.put(p.sqOff+64, other.Bytes()[:])
	for want := range 2 {
		dev.finish(1)
		e := p.reap(1)[0]
		if e.Status() != nvme.StatusSuccess || (want == 1) != (e.CID() == 77) {
			t.Errorf("%d: %v", e.CID(), e.Status())
		}
		if want == 0 {
			r.eventually("the other to begin", func() bool { return dev.held() == 1 })
		}
	}
}

func TestAbortOfWhatIsHeldBack(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{shadow: true, backend: disk})
	s, n := r.inSubsystem(disk)
	p := r.pair(1, 16, false)
	a, b := fused(8, 1, dataOff, other)
	// A first half alone.
	cid := p.push(a)
	p.publish()
	r.eventually("it to wait", r.heldBack(1))
	if !r.ctl.Abort(1, cid) {
		t.Error("a first half was not aborted")
	}
	if st := p.statuses(1)[cid]; st != nvme.StatusAbortRequested {
		t.Error(st)
	}
	// Before a gate: a plain command, a first half, a second half.
	end := exclusive(s, n)
	defer end()
	var cids []uint16
	for _, c := range []nvme.Command{rw(nvme.IOWrite, 0, 1, base+dataOff), a, b, a, b, rw(nvme.IOWrite, 0, 1, base+dataOff)} {
		cids = append(cids, p.push(c))
	}
	p.publish()
	r.eventually("six to wait", r.heldBack(6))
	for _, i := range []int{0, 1, 4} {
		if !r.ctl.Abort(1, cids[i]) {
			t.Errorf("command %d was not aborted", i)
		}
	}
	got := p.statuses(5)
	for i, want := range []nvme.Status{nvme.StatusAbortRequested, nvme.StatusAbortRequested, nvme.StatusAbortFailedFused, nvme.StatusAbortMissingFused, nvme.StatusAbortRequested} {
		if got[cids[i]] != want {
			t.Errorf("command %d: %v, want %v", i, got[cids[i]], want)
		}
	}
	end()
	if st := p.statuses(1)[cids[5]]; st != nvme.StatusSuccess {
		t.Errorf("the one that was left: %v", st)
	}
	if x, y := p.both(a, b); x.Code() != nvme.StatusSuccess || y != nvme.StatusSuccess {
		t.Errorf("the next pair: %v, %v", x, y)
	}
	r.noError()
}

// TestAbortWakesAQueueWhoseDoorbellIsLost has the tail in the shared page and no doorbell: the host's Abort finds the command there.
func TestAbortWakesAQueueWhoseDoorbellIsLost(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pairOf(1, 8, 8)
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	r.eventually("the queue to sleep", func() bool { return r.state(1) == Armed })
	tail, _, _, _, err := r.ctl.words(r.ctl.shadow, r.ctl.ei, 1)
	if err != nil {
		t.Fatal(err)
	}
	tail.Store(1)
	if !r.ctl.Abort(1, 0) {
		t.Fatal("not aborted")
	}
	if st := p.statuses(1)[0]; st != nvme.StatusAbortRequested {
		t.Errorf("%v, want %v", st, nvme.StatusAbortRequested)
	}
	r.noError()
}
