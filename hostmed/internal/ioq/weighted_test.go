package ioq

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// weighed is a limited rig whose controller weighs, with a queue of each class that has n reads, one of which has gone; 100 a second may.
func weighed(t *testing.T, together bool, v nvme.Arbitration, n int) (*limited, *recorder, [classCount]*pair) {
	b := &recorder{Backend: openBackend(t, "null:size=1GiB")}
	l := newLimited(t, rigConfig{shadow: true}, b)
	l.ctl.SetArbitration(true, v)
	pairs := l.weigh(together)
	l.limit(1, iops(100, 1))
	l.ctl.Hold(true)
	for _, p := range pairs {
		for i := range n {
			p.push(rw(nvme.IORead, uint64(p.qid-1)*1000+uint64(i), 1, base+dataOff))
		}
		p.publish()
	}
	l.ctl.Hold(false)
	l.awaitWaiting(classCount*n - 1)
	return l, b, pairs
}

// goOn lets as many commands go, and returns their classes in order.
func (l *limited) goOn(b *recorder, commands int) (order []int) {
	for range commands {
		l.advance(10 * time.Millisecond)
	}
	for _, lba := range b.take() {
		order = append(order, int(lba/1000))
	}
	return order
}

// TestWeightsUnderALimit: what a limit lets go is shared as what is fetched: urgent commands first, then by weight. It is not more for that.
func TestWeightsUnderALimit(t *testing.T) {
	for name, together := range map[string]bool{"a CQ each": false, "one CQ": true} {
		t.Run(name, func(t *testing.T) {
			const n = 40
			l, b, pairs := weighed(t, together, arbitration(7, 2, 4, 8), n)
			order := l.goOn(b, n-1+28)
			if len(order) != n+28 {
				t.Fatalf("%d commands of %d", len(order), n+28)
			}
			if got := counts(order[:n]); got[urgent] != n {
				t.Errorf("of the first %d %v are of each class", n, got)
			}
			if got := counts(order[n:]); got != [classCount]int{0, 16, 8, 4} {
				t.Errorf("of the next 28 %v are of each class", got)
			}
			l.ctl.SetArbitration(true, arbitration(7, 1, 1, 1)) // counts at once
			if got := counts(l.goOn(b, 27)); got[high] < 8 || got[high] > 10 || got[medium] < 8 || got[medium] > 10 || got[low] < 8 || got[low] > 10 {
				t.Errorf("equal weights: %v are of each class", got)
			}
			if !together { // another class of commands has a place of its own
				l.limit(1, qos.Limits{ReadIOPS: qos.Limit{Rate: 100, Burst: 1}})
				p := pairs[low]
				p.reapSome()
				if st := p.do(aWrite); !st.OK() {
					t.Error(st)
				}
				b.take()
			}
			l.limit(1, qos.Limits{})
			for range 10 {
				l.advance(0)
			}
			if l.waiting() != 0 {
				t.Errorf("%d commands wait for no limit", l.waiting())
			}
			l.empty()
			l.noError()
		})
	}
}

// TestTurnsArePassedOn when those that have them end: deleted, aborted, paused.
func TestTurnsArePassedOn(t *testing.T) {
	const n = 10
	l, b, pairs := weighed(t, false, arbitration(7, 2, 4, 8), n)
	turn := func() (class int) {
		l.workers[0].Call(func() {
			if len(l.workers[0].lanes) != 1 {
				t.Errorf("%d lanes have turns", len(l.workers[0].lanes))
			}
			class = int(l.workers[0].lanes[0].sq.prio)
		})
		return class
	}
	if turn() != urgent {
		t.Fatal("it is not an urgent command's turn")
	}
	b.take()
	if !l.ctl.Abort(1, 1) { // the one whose turn it is
		t.Error("not aborted")
	}
	l.ctl.DeleteSQ(1)
	if got := counts(l.goOn(b, 3)); got != [classCount]int{0, 3, 0, 0} {
		t.Errorf("after the urgent queue %v are of each class", got)
	}
	l.ctl.Hold(true)
	l.advance(50 * time.Millisecond)
	if got := b.take(); len(got) != 0 {
		t.Errorf("%d commands of a paused controller", len(got))
	}
	l.ctl.Hold(false)
	l.advance(0)
	l.goOn(b, 2)
	turn()
	l.ctl.DeleteSQ(3)
	if got := counts(l.goOn(b, 20)); got[medium] != 0 || got[high]+got[low] == 0 {
		t.Errorf("without the medium queue %v are of each class", got)
	}
	if l.waiting() != 0 {
		t.Errorf("%d wait", l.waiting())
	}
	if st := pairs[low].statuses(n); len(st) != n {
		t.Errorf("%d completions of low priority", len(st))
	}
	l.empty()
	l.noError()
}
