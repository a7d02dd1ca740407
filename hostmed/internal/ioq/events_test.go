package ioq

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// ear listens to a rig.
type ear struct {
	r       *rig
	tracing *Tracing
	rings   []*events.Writer
	readers []*events.Reader
}

func listen(r *rig) *ear {
	r.t.Helper()
	e := &ear{r: r, tracing: NewTracing()}
	for i, w := range r.workers {
		ring, err := events.New(events.Config{Number: uint32(i)})
		if err != nil {
			r.t.Fatal(err)
		}
		reader, err := events.Map(ring.FD())
		if err != nil {
			r.t.Fatal(err)
		}
		w.Listen(e.tracing, ring)
		e.rings, e.readers = append(e.rings, ring), append(e.readers, reader)
	}
	return e
}

// listenTo makes workers record into short rings that nobody reads.
func listenTo(t testing.TB, workers []*Worker) {
	t.Helper()
	for _, w := range workers {
		ring, err := events.New(events.Config{Heap: true, Records: events.MinRecords})
		if err != nil {
			t.Fatal(err)
		}
		w.Listen(NewTracing(), ring)
	}
}

// stop ends the listening and returns all that was recorded. The rings must not have overrun.
func (e *ear) stop() []events.Record {
	e.r.t.Helper()
	for i, w := range e.r.workers {
		w.Listen(nil, nil)
		e.rings[i].Close()
	}
	m := events.NewMerge(e.readers...)
	var all []events.Record
	out := make([]events.Record, 1000)
	for {
		n, err := m.Read(out, events.End)
		if err != nil {
			e.r.t.Fatal(err)
		}
		if n == 0 {
			break
		}
		all = append(all, out[:n]...)
	}
	if m.Lost() > 0 {
		e.r.t.Fatalf("%d records were lost", m.Lost())
	}
	for _, r := range e.readers {
		r.Close()
	}
	return all
}

// life is what was recorded of one command.
type life struct {
	fetch, submit, complete, post []events.Record
}

// lives sorts records of commands, whose identifiers in each queue are used once.
func lives(all []events.Record) map[[2]uint32]*life {
	by := map[[2]uint32]*life{}
	for _, x := range all {
		k := [2]uint32{uint32(x.Key), uint32(x.CID)}
		if by[k] == nil {
			by[k] = &life{}
		}
		switch l := by[k]; x.Kind {
		case events.Fetch:
			l.fetch = append(l.fetch, x)
		case events.Submit:
			l.submit = append(l.submit, x)
		case events.Complete:
			l.complete = append(l.complete, x)
		case events.Post:
			l.post = append(l.post, x)
		}
	}
	return by
}

// seenByDevice are the commands that a device was given, by its queue's and command's identifiers.
type seenByDevice struct {
	mu  sync.Mutex
	all map[[3]uint64]bool
}

// tracedDevice is a vfio: backend over a device that ends each I/O command with success.
func tracedDevice(t *testing.T) (*seenByDevice, backend.Backend) {
	t.Helper()
	seen := &seenByDevice{all: map[[3]uint64]bool{}}
	m := nvmetest.New(nvmetest.Config{
		Namespaces: []nvmetest.Namespace{{Blocks: 1 << 15, LBADS: 9}},
		Hooks: nvmetest.Hooks{Command: func(qid uint16, c *nvme.Command) nvmetest.Verdict {
			if qid == 0 {
				return nvmetest.Verdict{}
			}
			seen.mu.Lock()
			defer seen.mu.Unlock()
			seen.all[[3]uint64{uint64(qid), uint64(c.CID), c.SLBA()}] = true
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusSuccess}
		}},
	})
	t.Cleanup(m.Close)
	dev, err := hostnvme.OpenOn(t.Context(), quickFunction{m.InProc()}, t.Name(), hostnvme.Options{Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	be, err := backend.OverDevice(backend.Spec{Kind: backend.KindVFIO, Path: t.Name(), Offset: 1 << 20, Poll: true}, dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := be.Close(); err != nil {
			t.Error(err)
		}
	})
	return seen, be
}

// TestEveryCommandIsTraced: a random load of four queues on two workers, and of each command one fetch, one complete and one post, in the order
// of their times, with what the command and its CQE have; and of what reads and writes, one submit where the data is.
func TestEveryCommandIsTraced(t *testing.T) {
	for _, kind := range []string{"null", "mem", "file", "vfio"} {
		t.Run(kind, func(t *testing.T) {
			var be backend.Backend
			var device *seenByDevice
			switch kind {
			case "file":
				be = openBackend(t, "file:"+filepath.Join(t.TempDir(), "disk")+",size=16MiB")
			case "vfio":
				device, be = tracedDevice(t)
			default:
				be = openBackend(t, kind+":size=16MiB")
			}
			r := newRig(t, rigConfig{shadow: true, workers: 2, backend: be})
			r.ctl.cfg.Trace = 0x1234
			var ps []*pair
			for qid := range uint16(4) {
				ps = append(ps, r.pair(qid+1, 64, false))
			}
			e := listen(r)
			sent, ended := tracedLoad(t, ps)
			all := e.stop()
			media := e.tracing.Media()
			if len(media) != 1 || media[0].Kind != kind || media[0].ID != 1 || media[0].Name != be.Info().Name || media[0].Shift != 9 {
				t.Errorf("%+v", media)
			}
			last := int64(0)
			for i := range all {
				if all[i].Time < last {
					t.Fatalf("%+v after one of %d", all[i], last)
				}
				last = all[i].Time
			}
			got := lives(all)
			for at, c := range sent {
				key := events.NewKey(0x1234, at.qid)
				l := got[[2]uint32{uint32(key), uint32(at.cid)}]
				if l == nil || len(l.fetch) != 1 || len(l.complete) != 1 || len(l.post) != 1 {
					t.Fatalf("%v, %s: %+v", at, nvme.IOOpcodeName(c.Opcode), l)
				}
				f, p := l.fetch[0], l.post[0]
				if f.Opcode != c.Opcode || f.NSID != c.NSID || f.SLBA != c.SLBA() || f.Blocks != wantBlocks(&c) || l.complete[0].Opcode != c.Opcode {
					t.Errorf("%+v is recorded as %+v, %+v", c, f, l.complete[0])
				}
				if p.Status != uint16(ended[at]) || p.CQID != at.qid || l.complete[0].Status&0x7ff != p.Status&0x7ff {
					t.Errorf("%+v with status %v, recorded are %+v and %+v", c, ended[at], l.complete[0], p)
				}
				if f.Time > l.complete[0].Time || l.complete[0].Time > p.Time {
					t.Errorf("%v: fetched at %d, completed at %d, posted at %d", at, f.Time, l.complete[0].Time, p.Time)
				}
				simple := c.Opcode == nvme.IORead || c.Opcode == nvme.IOWrite
				if good := ended[at].OK(); simple && good != (len(l.submit) == 1) || !good && simple && len(l.submit) > 0 {
					t.Errorf("%+v with status %v: %+v", c, ended[at], l.submit)
				}
				for _, s := range l.submit {
					if s.Time < f.Time || s.Time > l.complete[0].Time || s.Medium != 1 {
						t.Errorf("%v: %+v", at, s)
					}
				}
				if !simple || len(l.submit) != 1 {
					continue
				}
				s, end := l.submit[0], l.complete[0]
				if s.Offset != media[0].Base+c.SLBA()*512 || s.Op != map[uint8]uint8{nvme.IORead: uint8(backend.OpRead), nvme.IOWrite: uint8(backend.OpWrite)}[c.Opcode] {
					t.Errorf("%+v: %+v", c, s)
				}
				if device == nil {
					if s.Bytes != c.NLB().Count()*512 || s.RealQID != 0 || end.RealQID != 0 {
						t.Errorf("%+v: %+v, %+v", c, s, end)
					}
					continue
				}
				real := [3]uint64{uint64(end.RealQID), uint64(end.RealCID), s.Offset >> 9}
				device.mu.Lock()
				if !device.all[real] || s.RealQID != 0 && (s.RealQID != end.RealQID || s.RealCID != end.RealCID) {
					t.Errorf("%+v: %+v, %+v, and the device has seen no such command", c, s, end)
				}
				device.mu.Unlock()
			}
		})
	}
}

// wantBlocks is Record.Blocks by package nvme's own fields.
func wantBlocks(c *nvme.Command) uint32 {
	switch c.Opcode {
	case nvme.IOFlush, 0x7f:
		return 0
	case nvme.IODSM:
		return c.DSMRanges().Count()
	}
	return c.NLB().Count()
}

type name struct{ qid, cid uint16 }

// tracedLoad runs a few thousand commands, good and bad, and returns them and their statuses.
func tracedLoad(t *testing.T, ps []*pair) (map[name]nvme.Command, map[name]nvme.Status) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	sent, ended := map[name]nvme.Command{}, map[name]nvme.Status{}
	out := make([]int, len(ps))
	took := func(p *pair, es []ring.Entry) {
		for _, e := range es {
			ended[name{p.qid, e.CID()}] = e.Status()
		}
	}
	for range 600 {
		i := rnd.IntN(len(ps))
		p := ps[i]
		for range rnd.IntN(20) {
			if out[i] == 60 {
				break
			}
			lba, blocks := uint64(rnd.IntN(20000)), uint32(1+rnd.IntN(8))
			ops := [...]uint8{nvme.IORead, nvme.IOWrite, nvme.IORead, nvme.IOWrite, nvme.IOCompare, nvme.IOVerify, nvme.IOWriteZeroes}
			c := rw(ops[rnd.IntN(len(ops))], lba, blocks, base+dataOff)
			switch rnd.IntN(20) {
			case 0:
				c = nvme.Command{Opcode: nvme.IOFlush, NSID: 1}
			case 1:
				c.NSID = 7
			case 2:
				c.SetSLBA(1 << 40)
			case 3:
				c.PRP1 = 0xdead_0000_0000
			case 4:
				c = nvme.Command{Opcode: 0x7f, NSID: 1}
			case 5: // no attribute asks for anything
				c = nvme.Command{Opcode: nvme.IODSM, NSID: 1, PRP1: base + dataOff, CDW10: 3}
			}
			c.CID = p.push(c)
			sent[name{p.qid, c.CID}] = c
			out[i]++
		}
		p.publish()
		n := rnd.IntN(out[i] + 1)
		took(p, p.reap(n))
		out[i] -= n
	}
	for i, p := range ps {
		took(p, p.reap(out[i]))
	}
	return sent, ended
}

// Nothing is recorded when nobody listens, and listening can begin and end under load.
func TestListenUnderLoad(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, workers: 2})
	ps := []*pair{r.pair(1, 64, false), r.pair(2, 64, false)}
	done := make(chan bool)
	go func() {
		defer close(done)
		for i := range 2000 {
			p := ps[i%2]
			for range 10 {
				p.push(rw(nvme.IORead, uint64(i), 1, base+dataOff))
			}
			p.publish()
			p.reap(10)
		}
	}()
	for heard := 0; ; heard++ {
		e := listen(r)
		time.Sleep(time.Millisecond)
		for _, w := range r.workers {
			w.Listen(nil, nil)
		}
		var was []uint64
		for _, ring := range e.rings {
			was = append(was, ring.Written())
		}
		time.Sleep(time.Millisecond)
		for i, ring := range e.rings {
			if ring.Written() != was[i] {
				t.Fatalf("%d records while nobody listened", ring.Written()-was[i])
			}
		}
		e.stop()
		select {
		case <-done:
			if heard == 0 {
				t.Error("nobody listened")
			}
			return
		default:
		}
	}
}

// The way of a queue to sleep and back.
func TestSleepIsTraced(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, noSpin: true})
	r.ctl.cfg.Trace = 5
	p := r.pair(3, 16, false)
	key := events.NewKey(5, 3)
	asleep := func() { r.eventually("it sleeps", func() bool { return r.state(3) == Armed }) }
	asleep()
	e := listen(r)
	for range 3 {
		if st := p.do(rw(nvme.IORead, 0, 1, base+dataOff)); !st.OK() {
			t.Fatal(st)
		}
		asleep()
	}
	var kinds []string
	var slept, woke int
	for _, x := range e.stop() {
		switch {
		case x.Key == 0 && x.Kind == events.Sleep:
			slept++
		case x.Key == 0 && x.Kind == events.Wake:
			woke++
		case x.Key != key:
			t.Errorf("%+v", x)
		case x.Kind == events.Arm && (x.Consumed != x.Tail || x.Event != x.Consumed || x.CQ):
			t.Errorf("%+v", x)
		case x.Kind == events.Kick && (x.Value != x.Consumed+1 || !x.Asleep || x.CQ):
			t.Errorf("%+v", x)
		case x.Kind == events.Arm, x.Kind == events.Kick, x.Kind == events.Wake, x.Kind == events.Fetch, x.Kind == events.Post:
			kinds = append(kinds, x.Kind.String())
		}
	}
	once := []string{"kick", "wake", "fetch", "post", "arm"}
	if want := append(append(append([]string(nil), once...), once...), once...); fmt.Sprint(kinds) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", kinds, want)
	}
	if slept == 0 || woke == 0 {
		t.Errorf("the thread slept %d times and woke %d times", slept, woke)
	}
}

// A tail that moves while the queue is being armed.
func TestArmLostIsTraced(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, noSpin: true})
	r.ctl.cfg.Trace = 5
	p := r.pair(3, 16, false)
	e := listen(r)
	r.workers[0].Call(func() {
		w, g := r.workers[0], r.ctl.cqs[3].Load()
		w.resume(g)
		p.push(rw(nvme.IORead, 0, 1, base+dataOff))
		p.push(rw(nvme.IORead, 0, 1, base+dataOff))
		p.publish()
		if w.arm(g) {
			t.Error("it was armed with commands in its queue")
		}
	})
	p.reap(2)
	lost := 0
	for _, x := range e.stop() {
		if x.Kind != events.ArmLost {
			continue
		}
		lost++
		if x.Key != events.NewKey(5, 3) || x.Consumed != 0 || x.Event != 0 || x.Tail != 2 {
			t.Errorf("%+v", x)
		}
	}
	if lost != 1 {
		t.Errorf("%d arms were lost", lost)
	}
}
