//go:build shadowbell_faults

package hostmed

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Each rule that a build for tests breaks is broken, an honest driver hangs or is harmed by it, and the snapshot has the marks.

func breaks(t *testing.T, rule string) {
	t.Helper()
	if err := Break(rule, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mends(t, rule) })
}

func mends(t *testing.T, rule string) {
	t.Helper()
	if err := Break(rule, false); err != nil {
		t.Fatal(err)
	}
}

// honest puts n flushes in queue i+1 and rings if the event index asks for it. It reports whether it did.
func (g *inspected) honest(i, n int) (rang bool) {
	g.Helper()
	q := &g.life.io[i]
	old := q.sq.Tail()
	for range n {
		q.sq.Push(&nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
	}
	events, err := g.mem.View(g.life.base+eventAt, 4096)
	g.must(err)
	tail, _, err := dbbuf.Slots(g.life.shadow, q.qid, 0)
	g.must(err)
	event, _, err := dbbuf.Slots(events, q.qid, 0)
	g.must(err)
	tail.Store(q.sq.Tail())
	if rang = dbbuf.NeedEvent(event.Load(), q.sq.Tail(), old); rang {
		g.doorbell(nvme.SQTailDoorbell(q.qid, 0), q.sq.Tail())
	}
	return rang
}

// took takes n completions, and gives their entries back without a ring.
func (g *inspected) took(i, n int) {
	g.Helper()
	q := &g.life.io[i]
	for range n {
		g.eventually("a completion", func() bool {
			e, ok := q.cq.Next()
			if ok {
				g.must(q.sq.Released(e.SQHead()))
			}
			return ok
		})
	}
	_, head, err := dbbuf.Slots(g.life.shadow, q.qid, 0)
	g.must(err)
	head.Store(q.cq.Head())
}

// hangs reports whether queue i+1 has completed nothing after a while.
func (g *inspected) hangs(i int) bool {
	time.Sleep(30 * time.Millisecond)
	return !g.life.io[i].cq.Ready()
}

func TestBroken(t *testing.T) {
	asleep := func(q inspect.Queue) bool { return armed(q) && q.SQ.Private == q.ArmIndex }
	for rule, f := range map[string]func(g *inspected) inspect.Queue{
		"sleep-anyway": func(g *inspected) (q inspect.Queue) {
			// The command has to come while the queue is polled and empty, which a busy machine may not grant.
			g.eventually("a command to be slept over", func() bool {
				g.honest(0, 1)
				g.took(0, 1)
				g.honest(0, 1)
				if g.hangs(0) {
					return true
				}
				g.took(0, 1)
				return false
			})
			q = queueOf(g.look(), 1)
			if !armed(q) || q.ArmSaw == q.ArmIndex || q.ArmIndex != q.SQ.Private || q.SQ.Page == q.SQ.Private {
				g.Errorf("%+v", q)
			}
			return q
		},
		"no-arm": func(g *inspected) inspect.Queue {
			g.until("sleep", 1, armed)
			g.honest(0, 1) // created armed at 0 or not, the first may go either way
			if g.hangs(0) {
				g.kick(1)
			}
			g.took(0, 1)
			g.until("sleep", 1, armed)
			if g.honest(0, 1) || !g.hangs(0) {
				g.Error("it is rung, or does not hang")
			}
			q := queueOf(g.look(), 1)
			if q.SQ.Event == q.SQ.Private || q.SQ.Event != q.SQ.Asked {
				g.Errorf("%+v", q)
			}
			return q
		},
		"wrong-index": func(g *inspected) inspect.Queue {
			g.honest(0, 1) // armed before it was broken, or since
			if g.hangs(0) {
				g.kick(1)
			}
			g.took(0, 1)
			g.until("sleep", 1, func(q inspect.Queue) bool { return armed(q) && q.ArmIndex == 2 })
			if g.honest(0, 1) || !g.hangs(0) {
				g.Error("it is rung, or does not hang")
			}
			q := queueOf(g.look(), 1)
			if q.SQ.Event != q.SQ.Private+1 || q.ArmIndex != q.SQ.Event {
				g.Errorf("%+v", q)
			}
			return q
		},
		"drop-kick": func(g *inspected) inspect.Queue {
			g.until("sleep", 1, asleep)
			if !g.honest(0, 1) || !g.hangs(0) {
				g.Error("it is not rung, or does not hang")
			}
			q := queueOf(g.look(), 1)
			if q.Kicks != 1 || q.KicksAsleep != 1 || q.SQ.Rung != 1 || !armed(q) {
				g.Errorf("%+v", q)
			}
			return q
		},
		"cq-at-tail": func(g *inspected) inspect.Queue {
			g.fillCQ()
			q := g.until("a blocked queue", 1, func(q inspect.Queue) bool { return q.Blocked && armed(q) })
			if q.CQ.Event != q.CQTail || q.CQ.Event == q.CQ.Private {
				g.Errorf("%+v", q)
			}
			return inspect.Queue{}
		},
		"no-interrupt": func(g *inspected) inspect.Queue {
			// The queue has no vector: nothing would be raised anyway. What counts is posted and not raised.
			g.honest(0, 1)
			g.took(0, 1)
			if q := queueOf(g.look(), 1); q.Unraised != 1 {
				g.Errorf("%+v", q)
			}
			return inspect.Queue{}
		},
		"no-probe": func(g *inspected) inspect.Queue {
			g.until("sleep", 1, asleep)
			g.config(4, 2)
			if !g.honest(0, 1) {
				g.Error("it is not rung")
			}
			g.until("the message", 1, func(q inspect.Queue) bool { return q.Kicks == 1 })
			g.config(4, 6)
			if !g.hangs(0) {
				g.Error("it does not hang")
			}
			q := queueOf(g.look(), 1)
			if !armed(q) || q.ResumedAt == 0 || q.ResumedAt < q.ArmedAt || q.SQ.Page == q.SQ.Private {
				g.Errorf("%+v", q)
			}
			return q
		},
		"stale-slots": func(g *inspected) inspect.Queue {
			tail, _, err := dbbuf.Slots(g.life.shadow, 1, 0)
			g.must(err)
			var cmd nvme.Command
			cmd.Opcode, cmd.CDW10 = nvme.AdminDeleteSQ, 1
			g.adminCommand(cmd)
			tail.Store(33)
			z, _ := nvme.ToZeroBased16(bareEntries)
			cmd = nvme.Command{}
			cmd.SetCreateSQ(1, z, guestIOVA+queuesAt, 1, 0)
			g.adminCommand(cmd)
			if q := queueOf(g.look(), 1); q.SQ.Born != 33 {
				g.Errorf("%+v", q)
			}
			return inspect.Queue{}
		},
		"keep-pages": func(g *inspected) inspect.Queue {
			g.write32(nvme.RegCC, 0)
			g.enable(halfLife, false)
			if c := g.look(); !c.Shared || c.Enables != 2 || c.ConfigEnable != 1 || c.Shadow != guestIOVA+shadowAt {
				g.Errorf("%+v", c)
			}
			return inspect.Queue{}
		},
		"sentinel": func(g *inspected) inspect.Queue {
			g.eventually("the sentinel", func() bool {
				g.honest(0, 1)
				q := queueOf(g.look(), 1)
				g.took(0, 1)
				return q.State == "polling" && q.SQ.Event == 1<<32-1
			})
			return inspect.Queue{}
		},
	} {
		t.Run(rule, func(t *testing.T) {
			g := inspectable(t, Shadow)
			breaks(t, rule)
			q := f(g)
			mends(t, rule)
			if q.QID != 0 { // it hangs, and a kick mends that
				if k := g.kick(1); !k.Woken || k.Found == 0 {
					t.Errorf("%+v", k)
				}
				g.took(0, int(q.SQ.Page-q.SQ.Private))
			}
		})
	}
	for _, rule := range Breakable() {
		if err := Break(rule, false); err != nil {
			t.Error(err)
		}
	}
	if Break("no-such-rule", true) == nil {
		t.Error("something else was broken")
	}
}

func (g *inspected) kick(qid uint16) inspect.Kick {
	g.Helper()
	k, err := g.m.Kick(g.Context(), g.socket, qid)
	g.must(err)
	return k
}
