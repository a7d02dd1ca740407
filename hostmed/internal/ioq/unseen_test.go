package ioq

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// unseen says whether queue qid is neither polled nor armed.
func (l *limited) unseen(qid uint16) (is bool) {
	g := l.ctl.cqs[qid].Load()
	g.w.Call(func() { is = g.unseen && g.state == Armed && !g.listed })
	return is
}

// TestNobodyRingsForWhatHasToWait: while everything in a queue waits for the same limit its driver does not ring, and what came meanwhile is there at the
// next turn.
func TestNobodyRingsForWhatHasToWait(t *testing.T) {
	for name, x := range map[string]struct {
		limits qos.Limits
		of     int // as in limit
	}{
		"commands of the namespace":  {qos.Limits{IOPS: qos.Limit{Rate: 400, Burst: 1}}, 1},
		"commands of the controller": {qos.Limits{IOPS: qos.Limit{Rate: 400, Burst: 1}}, 0},
		"bytes":                      {qos.Limits{Bandwidth: qos.Limit{Rate: 400 * 512, Burst: 512}}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=1MiB"))
			l.limit(x.of, x.limits)
			p := l.pair(1, 64, false)
			p.pushAll(3, aRead)
			l.awaitWaiting(2)
			l.eventually("the queue to be left alone", func() bool { return l.unseen(1) })
			for i := range 20 {
				rings, waiting := p.rings.Load(), l.waiting()
				cids := p.pushAll(1, aRead)
				if p.rings.Load() != rings || l.waiting() != waiting {
					t.Fatalf("command %d: the driver has rung, or it was fetched", i)
				}
				completions := 1
				if i == 7 {
					if !l.ctl.Abort(1, cids[0]) {
						t.Error("a command that nobody has looked at was not aborted")
					}
					p.pushAll(1, aRead)
					completions++
				}
				l.advance(2500 * time.Microsecond) // 400 a second
				p.reap(completions)
				l.eventually("what has come to be fetched, and the queue to be left alone again", func() bool { return l.waiting() == waiting && l.unseen(1) })
			}
			// A limit that makes the next turn a distant one.
			x.limits.IOPS.Rate, x.limits.Bandwidth.Rate = x.limits.IOPS.Rate/400, x.limits.Bandwidth.Rate/40
			l.limit(x.of, x.limits)
			l.eventually("the queue to be armed", func() bool { return l.state(1) == Armed && !l.unseen(1) })
			p.pushAll(1, aRead)
			l.awaitWaiting(3)
			l.limit(x.of, qos.Limits{})
			for l.waiting() > 0 {
				l.advance(0)
			}
			l.eventually("all to be complete", func() bool { p.reapSome(); return p.sq.Free() == 63 })
			if st := p.do(aRead); !st.OK() {
				t.Error(st)
			}
			l.empty()
			l.noError()
		})
	}
}

// TestSomeQueuesAreSeenAllTheSame: those that may bring what need not wait.
func TestSomeQueuesAreSeenAllTheSame(t *testing.T) {
	one := qos.Limit{Rate: 400, Burst: 1}
	for name, x := range map[string]struct {
		limits qos.Limits
		of     int
		free   nvme.Command
	}{
		"writes where reads are limited":             {qos.Limits{ReadIOPS: one}, 1, aWrite},
		"another namespace":                          {qos.Limits{IOPS: one}, 1, inNS(2, aRead)},
		"writes where the controller's reads are":    {qos.Limits{ReadIOPS: one}, 0, aWrite},
		"writes, of both the reads are what is held": {qos.Limits{ReadIOPS: one, IOPS: qos.Limit{Rate: 1_000_000}}, 0, aWrite},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=1MiB"), openBackend(t, "mem:size=1MiB"))
			l.limit(x.of, x.limits)
			p := l.pair(1, 64, false)
			p.pushAll(5, aRead)
			l.awaitWaiting(4)
			p.reap(1)
			for i := range 20 {
				l.eventually("the queue to be armed", func() bool { return l.state(1) == Armed })
				if l.unseen(1) {
					t.Fatal("the queue is left alone")
				}
				if st := p.do(x.free); !st.OK() { // the clock stands still
					t.Fatalf("command %d: %v", i, st)
				}
			}
			l.limit(x.of, qos.Limits{})
			p.reap(4)
			l.empty()
			l.noError()
		})
	}
}
