package queue

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// recorded is a queue whose events are kept.
func recorded(t *testing.T, size uint32, change func(*Config)) (*pairOfHalves, func() []events.Record) {
	t.Helper()
	w, err := events.New(events.Config{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := events.Map(w.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.Close(), r.Close()); err != nil {
			t.Error(err)
		}
	})
	p := newPair(t, size, func(c *Config) {
		c.Events, c.Key = events.NewShared(w), events.NewKey(9, qid)
		if change != nil {
			change(c)
		}
	})
	return p, func() []events.Record {
		t.Helper()
		out := make([]events.Record, 1000)
		n, err := r.Read(out)
		if err != nil || r.Lost() > 0 {
			t.Fatalf("%d lost, %v", r.Lost(), err)
		}
		for i := range out[:n] {
			if out[i].Key != events.NewKey(9, qid) {
				t.Errorf("%+v", out[i])
			}
		}
		return out[:n]
	}
}

// Each command has one publish when the tail is stored and one reap, over the wrap of rings and of generations of identifiers.
func TestCommandsAreRecorded(t *testing.T) {
	p, seen := recorded(t, 8, nil)
	out := make([]Completion, 8)
	p.tail.BehindNow(0)
	for round := range 200 {
		n := 1 + round%7
		begin := events.Now()
		want := map[uint16]nvme.Command{}
		for i := range n {
			slot, ok := p.Take(uint64(i))
			if !ok {
				t.Fatal("no slot")
			}
			var c nvme.Command
			z, _ := nvme.ToZeroBased16(uint32(i + 1))
			c.SetRW(nvme.IOWrite, uint32(round), uint64(round*100+i), z)
			p.Push(slot, &c)
			want[c.CID] = c
		}
		if got := seen(); len(got) != 0 {
			t.Fatalf("before the publish: %+v", got)
		}
		if round == 100 {
			p.tail.Arm(p.sq.Head()) // the next tail rings
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		published := seen()
		if len(published) != n {
			t.Fatalf("%d commands are recorded as %+v", n, published)
		}
		pending, err := p.sq.Pending(p.tail.Load())
		if err != nil || int(pending) != n {
			t.Fatal(pending, err)
		}
		var es []ring.Entry
		for i := range n {
			var c nvme.Command
			p.sq.Fetch(&c)
			es = append(es, ring.MakeEntry(0, p.sq.Head(), qid, c.CID, nvme.Status(i)))
			x := published[i]
			if w := want[x.CID]; x.Kind != events.Publish || x.CID != c.CID || x.NSID != w.NSID || x.SLBA != w.SLBA() || x.Blocks != w.NLB().Count() || x.Opcode != w.Opcode {
				t.Fatalf("%+v for %+v", x, w)
			}
			if x.Time < begin || x.Time > events.Now() || x.Rang != (round == 100) {
				t.Fatalf("round %d: %+v, begun at %d", round, x, begin)
			}
		}
		if err := p.cq.Consumed(p.head.Load()); err != nil {
			t.Fatal(err)
		}
		p.cq.Post(es)
		p.tail.BehindNow(p.sq.Head())
		p.head.Behind(p.cq.Head())
		if k, err := p.Reap(out); k != n || err != nil {
			t.Fatal(k, err)
		}
		reaped := seen()
		if len(reaped) != n {
			t.Fatalf("%d completions are recorded as %+v", n, reaped)
		}
		for i, x := range reaped {
			if x.Kind != events.Reap || x.CID != published[i].CID || x.Status != uint16(i) || x.Opcode != nvme.IOWrite || x.Time < published[i].Time {
				t.Fatalf("%+v after %+v", x, published[i])
			}
		}
	}
}

func TestSleepIsRecorded(t *testing.T) {
	p, seen := recorded(t, 8, func(c *Config) {
		eventFD(t, c)
		c.NoSpin = true
	})
	slot, _ := p.Take(1)
	p.Push(slot, &nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- p.Wait(t.Context()) }()
	var kinds []events.Kind
	for len(kinds) < 2 { // the publish, then the sleep
		for _, x := range seen() {
			kinds = append(kinds, x.Kind)
		}
	}
	p.cq.Post([]ring.Entry{ring.MakeEntry(0, 1, qid, p.CID(slot), nvme.StatusSuccess)})
	one := [8]byte{1}
	if _, err := unix.Write(p.fd, one[:]); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n, err := p.Reap(make([]Completion, 8)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for _, x := range seen() {
		kinds = append(kinds, x.Kind)
	}
	// It may have napped several times.
	if s := fmt.Sprint(kinds); len(kinds) < 4 || kinds[0] != events.Publish || kinds[1] != events.Sleep || kinds[len(kinds)-2] != events.Wake || kinds[len(kinds)-1] != events.Reap {
		t.Errorf("%s", s)
	}
}
