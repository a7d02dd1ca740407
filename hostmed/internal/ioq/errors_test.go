package ioq

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestFailedCommandsAreKept wants an entry for each command that fails, there before its completion, which says so.
func TestFailedCommandsAreKept(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(3, 16, false)
	r.put(dataOff+0x2000, []byte{1})
	ok := rw(nvme.IORead, 16, 8, base+dataOff)
	with := func(f func(*nvme.Command)) nvme.Command {
		c := ok
		f(&c)
		return c
	}
	for name, x := range map[string]struct {
		c    nvme.Command
		want ctrl.IOError
	}{
		"opcode":              {with(func(c *nvme.Command) { c.Opcode = 0x7f }), ctrl.IOError{Status: nvme.StatusInvalidOpcode, Location: 0, LBA: 16}},
		"namespace":           {with(func(c *nvme.Command) { c.NSID = 7 }), ctrl.IOError{Status: nvme.StatusInvalidNamespace, Location: 4, LBA: 16, NSID: 7}},
		"DSM of no namespace": {nvme.Command{Opcode: nvme.IODSM, NSID: 7}, ctrl.IOError{Status: nvme.StatusInvalidNamespace, Location: 4, NSID: 7}},
		"flags":               {with(func(c *nvme.Command) { c.Flags = 0xc0 }), ctrl.IOError{Status: nvme.StatusInvalidField, Location: 1, LBA: 16}},
		"length":              {with(func(c *nvme.Command) { c.SetNLB(4000) }), ctrl.IOError{Status: nvme.StatusInvalidField, Location: 48, LBA: 16}},
		"range":               {with(func(c *nvme.Command) { c.SetSLBA(1 << 40) }), ctrl.IOError{Status: nvme.StatusLBAOutOfRange, Location: 40, LBA: 1 << 40}},
		"PRP":                 {with(func(c *nvme.Command) { c.PRP1 = 0x1000 }), ctrl.IOError{Status: nvme.StatusDataTransferError, Location: 24, LBA: 16}},
		"compare":             {with(func(c *nvme.Command) { c.Opcode, c.PRP1 = nvme.IOCompare, base+dataOff+0x2000 }), ctrl.IOError{Status: nvme.StatusCompareFailure, Location: nowhere, LBA: 16}},
	} {
		cid := p.push(x.c)
		p.publish()
		e := p.reap(1)[0]
		got, n := r.ctl.TakeIOErrors()
		if n != 1 || len(got) != 1 {
			t.Errorf("%s: %d errors, %d kept", name, n, len(got))
			continue
		}
		if !e.Status().More() || got[0].Status != e.Status() || got[0].Status.Code() != x.want.Status {
			t.Errorf("%s: completed with %v, kept %v, want %v", name, e.Status(), got[0].Status, x.want.Status)
		}
		if x.want.NSID == 0 {
			x.want.NSID = 1
		}
		x.want.SQID, x.want.CID, x.want.Status = 3, cid, e.Status()
		if got[0] != x.want {
			t.Errorf("%s: %+v, want %+v", name, got[0], x.want)
		}
	}
	if st := p.do(ok); st != nvme.StatusSuccess {
		t.Fatal(st)
	}
	if _, n := r.ctl.TakeIOErrors(); n != 0 {
		t.Errorf("%d errors after a good command", n)
	}
}

// TestErrorFlood has a guest fail more commands than anybody wants to know of.
func TestErrorFlood(t *testing.T) {
	for _, fails := range []int{1, maxFailures - 1, maxFailures, maxFailures + 1, 2*maxFailures + 5} {
		r := newRig(t, rigConfig{shadow: true})
		p := r.pair(1, 16, false)
		for i := range fails {
			p.do(rw(nvme.IORead, 1<<32+uint64(i), 8, base+dataOff))
		}
		got, n := r.ctl.TakeIOErrors()
		if n != uint64(fails) || len(got) != min(fails, maxFailures) {
			t.Fatalf("%d errors of %d, %d kept", n, fails, len(got))
		}
		for i, e := range got {
			if want := 1<<32 + uint64(fails-len(got)+i); e.LBA != want {
				t.Fatalf("%d failed: entry %d is of block %#x, want %#x", fails, i, e.LBA, want)
			}
		}
		if s := r.ctl.Stats(); s.Errors != uint64(fails) || s.MediaErrors != 0 {
			t.Errorf("%d failed: stats %+v", fails, s)
		}
	}
}

func TestMediaErrorsAndBusyTime(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	begin := time.Now() // and not when the first command goes: a worker counts from the last time it looked at the clock
	r := newRig(t, rigConfig{shadow: true, backend: b, workers: 2})
	p, q := r.pair(1, 16, false), r.pair(2, 16, false)
	for _, st := range []nvme.Status{nvme.StatusUnrecoveredRead, nvme.StatusWriteFault, nvme.StatusInternalError} {
		b.status = st
		for _, p := range []*pair{p, q} { // both at the same time, which counts once
			p.push(rw(nvme.IORead, 0, 8, base+dataOff))
			p.publish()
		}
		r.eventually("both commands to be begun", func() bool { return b.held() == 2 })
		before := r.ctl.Stats().Busy
		time.Sleep(20 * time.Millisecond) // long enough for the worker to sleep
		// What a worker that is held up in a turn finds done in it is not counted to the last: so before they end.
		r.eventually("20 ms to be counted", func() bool { return r.ctl.Stats().Busy >= before+20*time.Millisecond })
		b.finish(2)
		if e := p.reap(1)[0]; e.Status().Code() != st {
			t.Errorf("%v, want %v", e.Status(), st)
		}
		q.reap(1)
	}
	s := r.ctl.Stats()
	if s.Errors != 6 || s.MediaErrors != 4 {
		t.Errorf("%d errors, %d of the medium", s.Errors, s.MediaErrors)
	}
	// What was counted is real time, and only once.
	if busy := r.ctl.Stats().Busy; busy > time.Since(begin) {
		t.Errorf("busy for %v of %v", busy, time.Since(begin))
	}
	r.eventually("the time without a command not to be counted", func() bool { // the last command's may still be
		before := r.ctl.Stats().Busy
		time.Sleep(20 * time.Millisecond)
		return r.ctl.Stats().Busy-before <= 10*time.Millisecond
	})
}
