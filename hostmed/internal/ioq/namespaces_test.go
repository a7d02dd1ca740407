package ioq

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// closeAtEnd closes s after what the workers have begun, as in hostmed, where its sessions are over by then.
func (r *rig) closeAtEnd(s *subsys.Subsystem) {
	r.t.Cleanup(func() {
		for _, w := range r.workers {
			w.Call(func() {})
		}
		s.Close()
	})
}

// inSubsystem puts the rig's namespace 1 in a subsystem.
func (r *rig) inSubsystem(b backend.Backend) (*subsys.Subsystem, *subsys.Namespace) {
	r.t.Helper()
	s := subsys.New(subsys.Config{Workers: Pool(r.workers)})
	r.closeAtEnd(s)
	n := s.AddNamespace(subsys.NamespaceConfig{NSID: 1, Backend: b, Shared: true})
	r.attach(n)
	return s, n
}

func (r *rig) attach(ns ...*subsys.Namespace) {
	r.t.Helper()
	var list []ctrl.Namespace
	for _, n := range ns {
		m := n.Medium()
		list = append(list, ctrl.Namespace{NSID: n.NSID, Backend: m.Backend, Info: m.Info, Of: n})
	}
	if err := r.ctl.SetNamespaces(list); err != nil {
		r.t.Fatal(err)
	}
}

func openBackend(t testing.TB, spec string) backend.Backend {
	t.Helper()
	b, err := backend.Open(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// exclusive has n for the test until the returned function is called.
func exclusive(s *subsys.Subsystem, n *subsys.Namespace) (end func()) {
	begun, over := make(chan struct{}), make(chan struct{})
	s.Go(func() {
		n.Exclusive(func() {
			close(begun)
			<-over
		})
	})
	<-begun
	return sync.OnceFunc(func() { close(over) })
}

func (r *rig) heldBack(n int) func() bool {
	return func() bool {
		sum := 0
		for _, w := range r.workers {
			w.Call(func() { sum += len(w.held) })
		}
		return sum == n
	}
}

func TestCommandsWaitForTheGate(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{workers: 2, shadow: true, scatter: true})
	s, n := r.inSubsystem(disk)
	a, b := r.pair(1, 16, false), r.pair(2, 16, false)
	end := exclusive(s, n)
	defer end()
	for _, p := range []*pair{a, b} {
		for i := range 5 {
			p.push(rw(nvme.IOWrite, uint64(i), 1, base+dataOff))
		}
		p.publish()
	}
	r.eventually("ten commands are held back", r.heldBack(10))
	// DMA_UNMAP does not wait for them: nothing of them has begun.
	for _, off := range []uint64{dataOff, a.cqOff, b.sqOff} {
		r.unmap(off, 4096)
		r.remap(off, 4096)
	}
	if _, ok := a.cq.Next(); ok {
		t.Fatal("a command went past the gate")
	}
	end()
	for _, p := range []*pair{a, b} {
		for _, e := range p.reap(5) {
			if !e.Status().OK() {
				t.Error(e.Status())
			}
		}
	}
	r.noError()
}

// Whoever has the namespace alone has it when what was under way is complete, not before.
func TestExclusiveWaitsForWhatIsUnderWay(t *testing.T) {
	dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
	r := newRig(t, rigConfig{backend: dev, shadow: true})
	s, n := r.inSubsystem(dev)
	p := r.pair(1, 16, false)
	for range 3 {
		p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	}
	p.publish()
	r.eventually("three reads are with the backend", func() bool { return dev.held() == 3 })
	var alone atomic.Bool
	s.Go(func() { n.Exclusive(func() { alone.Store(true) }) })
	r.eventually("the gate is closed", func() bool { return n.Gate() != nil })
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.publish()
	r.eventually("the fourth waits", r.heldBack(1))
	dev.finish(2)
	p.reap(2)
	if alone.Load() {
		t.Fatal("a command is still under way")
	}
	dev.finish(1)
	p.reap(1)
	r.eventually("it is alone", alone.Load)
	r.eventually("the fourth is with the backend", func() bool { return dev.held() == 1 })
	dev.finish(1)
	p.reap(1)
}

func TestQueuesGoWhileCommandsWait(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{workers: 2, shadow: true})
	s, n := r.inSubsystem(disk)
	a, b := r.pair(1, 16, false), r.pair(2, 16, false)
	end := exclusive(s, n)
	defer end()
	for _, p := range []*pair{a, b} {
		for range 3 {
			p.push(rw(nvme.IOWrite, 0, 1, base+dataOff))
		}
		p.publish()
	}
	r.eventually("six commands are held back", r.heldBack(6))
	r.ctl.DeleteSQ(1)
	for _, e := range a.reap(3) {
		if e.Status().Code() != nvme.StatusAbortSQDeleted {
			t.Errorf("after Delete SQ: %v", e.Status())
		}
	}
	r.ctl.DeleteCQ(1)
	r.ctl.Stop(patience) // a reset: the rest ends without a word
	if !r.heldBack(0)() {
		t.Error("commands are held of queues that are gone")
	}
	end()
	s.Close()
	if err := r.ctl.SetDoorbellPages(r.view(shadowOff, 4096), r.view(eiOff, 4096)); err != nil {
		t.Fatal(err)
	}
	c := r.pair(1, 16, false)
	if st := c.do(rw(nvme.IOWrite, 0, 1, base+dataOff)); !st.OK() {
		t.Error(st)
	}
	if _, ok := b.cq.Next(); ok {
		t.Error("a completion in a queue that is gone")
	}
}

func TestGateRefuses(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{shadow: true})
	_, n := r.inSubsystem(disk)
	p := r.pair(1, 16, false)
	if err := n.SetProtection(subsys.Protected); err != nil {
		t.Fatal(err)
	}
	if st := p.do(nvme.Command{Opcode: nvme.IOFlush, NSID: 1}); !st.OK() {
		t.Errorf("flush: %v", st)
	}
	if st := p.do(rw(nvme.IOWrite, 0, 1, base+dataOff)); st.Code() != nvme.StatusNamespaceWriteProtected {
		t.Errorf("write: %v", st)
	}
	if st := p.do(rw(nvme.IORead, 0, 1, base+dataOff)); !st.OK() {
		t.Errorf("read: %v", st)
	}
	if err := n.SetProtection(subsys.Unprotected); err != nil {
		t.Fatal(err)
	}
	if st := p.do(rw(nvme.IOWrite, 0, 1, base+dataOff)); !st.OK() {
		t.Errorf("write: %v", st)
	}
}

// TestNamespacesComeAndGoUnderLoad attaches and detaches while every queue reads: each command succeeds or says that there
// is no such namespace, and the other namespace notices nothing.
func TestNamespacesComeAndGoUnderLoad(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{workers: 2, shadow: true})
	s, one := r.inSubsystem(disk)
	stop, load := make(chan struct{}), sync.WaitGroup{}
	var refused, served atomic.Int64
	for qid := range uint16(4) {
		p := r.pair(qid+1, 32, false)
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for i := range 16 {
					c := rw(nvme.IORead, 0, 1, base+dataOff)
					c.NSID = uint32(i%2 + 1)
					p.push(c)
				}
				p.publish()
				for _, e := range p.reap(16) {
					switch st := e.Status(); {
					case st.OK():
						served.Add(1)
					case st.Code() == nvme.StatusInvalidNamespace:
						refused.Add(1)
					default:
						t.Errorf("%v", st)
					}
				}
			}
		})
	}
	for range 8 {
		b := openBackend(t, "mem:size=1MiB")
		two := s.AddNamespace(subsys.NamespaceConfig{NSID: 2, Backend: b, Shared: true})
		r.attach(one, two)
		now := served.Load()
		r.eventually("more was read", func() bool { return served.Load() > now+30 })
		two.Exclusive(func() {})
		r.attach(one)
		Pool(r.workers).Drain(two)
		s.RemoveNamespace(two)
		if err := b.Close(); err != nil { // unmaps it: whoever still uses it faults
			t.Fatal(err)
		}
	}
	close(stop)
	load.Wait()
	if served.Load() == 0 || refused.Load() == 0 {
		t.Errorf("%d served, %d refused", served.Load(), refused.Load())
	}
	r.noError()
}

// Suspend gives every queue of a backend back, Resume takes it up again.
func TestSuspend(t *testing.T) {
	dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
	r := newRig(t, rigConfig{backend: dev, shadow: true})
	s, n := r.inSubsystem(dev)
	p := r.pair(1, 16, false)
	if err := s.Alter(n, func(backend.Backend) error {
		dev.info.Blocks = 8
		dev.queues = nil
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.attach(n) // nobody is a member here
	p.push(rw(nvme.IORead, 7, 1, base+dataOff))
	p.publish()
	r.eventually("the new queue has it", func() bool { return dev.finish(1) == 1 })
	if st := p.reap(1)[0].Status(); !st.OK() {
		t.Error(st)
	}
	if st := p.do(rw(nvme.IORead, 8, 1, base+dataOff)); st.Code() != nvme.StatusLBAOutOfRange {
		t.Errorf("past the new end: %v", st)
	}
}

// Commands that a gate holds back end with their SQ, also while their CQ is parked: they are completed when it goes on.
func TestHeldCommandsOfAParkedCQ(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{shadow: true, scatter: true})
	s, n := r.inSubsystem(disk)
	p := r.pair(1, 16, false)
	end := exclusive(s, n)
	defer end()
	for i := range 5 {
		p.push(rw(nvme.IOWrite, uint64(i), 1, base+dataOff))
	}
	p.publish()
	r.eventually("five commands are held back", r.heldBack(5))
	r.unmap(p.cqOff, 4096)
	r.ctl.DeleteSQ(1)
	end()
	r.remap(p.cqOff, 4096)
	for _, e := range p.reap(5) {
		if e.Status().Code() != nvme.StatusAbortSQDeleted {
			t.Error(e.Status())
		}
	}
	r.noError()
}

// A namespace id up to NN is valid, also if nothing is attached as it; NVMe Base 2.0c 3.2.1 has another status for it.
func TestInactiveNamespaceIsNoInvalidOne(t *testing.T) {
	r := newRig(t, rigConfig{})
	b := r.ctl.namespace(1).backend
	p := r.pair(1, 8, false)
	if err := r.ctl.SetNamespaces([]ctrl.Namespace{{NSID: 1, Backend: b, Info: b.Info()}, {NSID: 3, Backend: b, Info: b.Info()}}); err != nil {
		t.Fatal(err)
	}
	for nsid, want := range map[uint32]nvme.Status{
		0: nvme.StatusInvalidNamespace, 1: nvme.StatusSuccess, 2: nvme.StatusInvalidField, 3: nvme.StatusSuccess, 4: nvme.StatusInvalidNamespace, nvme.NSIDAll: nvme.StatusInvalidNamespace,
	} {
		c := rw(nvme.IORead, 0, 1, base+dataOff)
		c.NSID = nsid
		if st := p.do(c); st.Code() != want {
			t.Errorf("namespace %d: %v, want %v", nsid, st, want)
		}
	}
}
