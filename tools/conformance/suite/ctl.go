package suite

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// rig is one controller over all cases.
type rig struct {
	cfg   Config
	open  func(context.Context) (device.Device, error)
	peer  *rig // a second controller, or nil
	used  bool // by the case that runs
	dev   device.Device
	irqs  []int // eventfd of each vector
	mem   arena
	bells map[uint32]device.Doorbell // by offset, so that each is made once
	facts facts
}

// maxVectors is how many interrupt vectors are taken.
const maxVectors = 5

// reopen opens the controller, for the first time or because the connection was lost.
func (r *rig) reopen(ctx context.Context) error {
	r.close()
	dev, err := r.open(ctx)
	if err != nil {
		return err
	}
	r.dev = dev
	r.mem = arena{dev: dev, align: pageSize}
	r.bells = map[uint32]device.Doorbell{}
	if n := min(dev.MaxInterrupts(), maxVectors); n > 0 {
		if r.irqs, err = dev.Interrupts(n); err != nil {
			r.close()
			return fmt.Errorf("interrupts: %w", err)
		}
	}
	return nil
}

func (r *rig) close() {
	if r.dev == nil {
		return
	}
	// Not to leave a controller that writes to memory which is about to go.
	_ = r.dev.Write32(nvme.RegCC, 0)
	r.mem.close()
	_ = r.dev.Close()
	_ = r.dev.Unmap()
	for _, fd := range r.irqs {
		_ = unix.Close(fd)
	}
	r.dev, r.irqs = nil, nil
}

func (r *rig) gone() bool {
	select {
	case <-r.dev.Done():
		return true
	default:
		return false
	}
}

// settle resets a peer after the case that used it.
func (r *rig) settle(ctx context.Context) {
	r.used = false
	r.guard(ctx, setup{disabled: true}, func(*ctl) {})
}

// setup is how a case wants its controller.
type setup struct {
	disabled   bool   // reset only
	asqs, acqs uint32 // entries of the admin queues [64]
	mps        uint8  // CC.MPS
	ams        uint8  // CC.AMS
}

const adminDepth = 64

// ctl is a controller during one case: the verbs that cases are written in. Each ends the case if it cannot do what it says.
type ctl struct {
	*rig
	ctx      context.Context
	deadline time.Time
	adm      *sq // the admin queues; nil while disabled
	grant    granted
	io       *sq // see q
	pages    *dbPages
	scratch  *data // see tick
}

// granted is what Set Features, Number of Queues, gave.
type granted struct{ sqs, cqs uint32 }

// failf ends the case: this is what was seen.
func (c *ctl) failf(format string, args ...any) { panic(failure{fmt.Sprintf(format, args...)}) }

// skipf ends the case: it does not apply.
func (c *ctl) skipf(format string, args ...any) { panic(skip{fmt.Sprintf(format, args...)}) }

// check ends the case unless ok.
func (c *ctl) check(ok bool, format string, args ...any) {
	if !ok {
		c.failf(format, args...)
	}
}

func (c *ctl) must(err error) {
	if err != nil {
		c.failf("%v", err)
	}
}

func (c *ctl) read32(off uint32) uint32 {
	v, err := c.dev.Read32(off)
	c.must(err)
	return v
}

func (c *ctl) read64(off uint32) uint64 {
	v, err := c.dev.Read64(off)
	c.must(err)
	return v
}

func (c *ctl) write32(off, v uint32)        { c.must(c.dev.Write32(off, v)) }
func (c *ctl) write64(off uint32, v uint64) { c.must(c.dev.Write64(off, v)) }

func (c *ctl) csts() nvme.CSTS { return nvme.CSTS(c.read32(nvme.RegCSTS)) }
func (c *ctl) cc() nvme.CC     { return nvme.CC(c.read32(nvme.RegCC)) }

// until waits for done, at most for limit or Config.Timeout and never beyond the case's deadline, and says whether it came.
func (c *ctl) until(limit time.Duration, done func() bool) bool {
	end := time.Now().Add(min(limit, c.cfg.Timeout))
	if end.After(c.deadline) {
		end = c.deadline
	}
	pause := 10 * time.Microsecond
	for i := 0; ; i++ {
		if done() {
			return true
		}
		if i < 50 {
			runtime.Gosched()
			continue
		}
		if time.Now().After(end) {
			return done()
		}
		if err := c.ctx.Err(); err != nil {
			c.failf("%v", err)
		}
		if c.gone() {
			c.failf("the connection is lost: %v", c.dev.Err())
		}
		time.Sleep(pause)
		pause = min(pause*3/2, time.Millisecond)
	}
}

// wait is until that must come.
func (c *ctl) wait(limit time.Duration, what string, done func() bool) {
	begin := time.Now()
	if c.until(limit, done) {
		return
	}
	over := ""
	if time.Now().After(c.deadline) {
		over = fmt.Sprintf(", until the case's %v were over,", waitsPerCase*c.cfg.Timeout)
	}
	c.failf("waited %.1f s%s for %s: CSTS=%#x, CC=%#x", time.Since(begin).Seconds(), over, what, c.read32(nvme.RegCSTS), c.read32(nvme.RegCC))
}

// whole is a limit that leaves it to Config.Timeout.
const whole = time.Hour

// quietFor is how long something that must not happen is waited for.
const quietFor = 15 * time.Millisecond

// never checks that something does not happen.
func (c *ctl) never(what string, happened func() bool) {
	if c.until(quietFor, happened) {
		c.failf("%s", what)
	}
}

// begin resets the controller, whatever the last case left, and enables it unless the case wants to.
func (c *ctl) begin(s setup) {
	if c.dev == nil || c.gone() {
		c.must(c.reopen(c.ctx))
	}
	if !c.tryDisable() {
		c.must(c.dev.Reset())
		c.wait(c.readyTime(), "CSTS.RDY=0 after a function reset", func() bool { return !c.csts().RDY() })
	}
	c.mem.reset()
	c.drainInterrupts()
	if !s.disabled {
		c.enable(s)
	}
}

func (c *ctl) readyTime() time.Duration { return nvme.CAP(c.read64(nvme.RegCAP)).Timeout() }

func (c *ctl) tryDisable() bool {
	v, err := c.dev.Read32(nvme.RegCC)
	if err != nil || v == ^uint32(0) || nvme.CC(v).CSS() == nvme.CSSAdmin {
		return false
	}
	if err := c.dev.Write32(nvme.RegCC, uint32(nvme.CC(v).WithEN(false).WithSHN(nvme.SHNNone))); err != nil {
		return false
	}
	return c.until(c.readyTime(), func() bool {
		v, err := c.dev.Read32(nvme.RegCSTS)
		return err == nil && !nvme.CSTS(v).RDY() && !nvme.CSTS(v).CFS()
	})
}

// disable clears CC.EN and waits for CSTS.RDY=0.
func (c *ctl) disable() {
	c.write32(nvme.RegCC, uint32(c.cc().WithEN(false).WithSHN(nvme.SHNNone)))
	c.wait(c.readyTime(), "CSTS.RDY=0 after CC.EN was cleared", func() bool { return !c.csts().RDY() })
	c.adm, c.io, c.pages, c.grant = nil, nil, nil, granted{}
}

// enable makes the admin queues, sets CC.EN and waits for CSTS.RDY=1.
func (c *ctl) enable(s setup) {
	c.adminQueues(s)
	c.write32(nvme.RegCC, uint32(c.ccFor(s)))
	c.ready()
}

func (c *ctl) ccFor(s setup) nvme.CC {
	cc := nvme.CC(0).WithEN(true).WithIOSQES(6).WithIOCQES(4).WithMPS(s.mps).WithAMS(s.ams)
	if caps := nvme.CAP(c.read64(nvme.RegCAP)); caps.CSS()&nvme.CAPCSSNVM == 0 && caps.CSS()&nvme.CAPCSSIOCS != 0 {
		cc = cc.WithCSS(nvme.CSSIOCS)
	}
	return cc
}

func (c *ctl) ready() {
	c.wait(c.readyTime(), "CSTS.RDY=1 after CC.EN was set", func() bool {
		s := c.csts()
		c.check(!s.CFS(), "CSTS.CFS after CC.EN was set: %v, %v", s, c.cc())
		return s.RDY()
	})
}

// adminQueues makes the admin queues and writes AQA, ASQ and ACQ.
func (c *ctl) adminQueues(s setup) {
	sqs, cqs := max(s.asqs, 2), max(s.acqs, 2)
	if s.asqs == 0 {
		sqs = adminDepth
	}
	if s.acqs == 0 {
		cqs = adminDepth
	}
	c.mem.align = pageSize << s.mps
	c.io, c.pages, c.grant = nil, nil, granted{}
	q := c.newCQ(0, cqs)
	c.adm = c.newSQ(0, sqs, q)
	z := func(n uint32) nvme.ZeroBased16 { z, _ := nvme.ToZeroBased16(n); return z }
	c.write32(nvme.RegAQA, uint32(nvme.AQA(0).WithASQS(z(sqs)).WithACQS(z(cqs))))
	c.write64(nvme.RegASQ, c.adm.mem.iova)
	c.write64(nvme.RegACQ, q.mem.iova)
}

// bell returns the doorbell register at off.
func (r *rig) bell(off uint32) device.Doorbell {
	b, ok := r.bells[off]
	if !ok {
		b = r.dev.Doorbell(off)
		r.bells[off] = b
	}
	return b
}

// ringSQ and ringCQ write a doorbell register, with any value.
func (c *ctl) ringSQ(qid uint16, v uint32) {
	c.must(c.bell(nvme.SQTailDoorbell(qid, c.facts.cap.DSTRD())).Ring(v))
}

func (c *ctl) ringCQ(qid uint16, v uint32) {
	c.must(c.bell(nvme.CQHeadDoorbell(qid, c.facts.cap.DSTRD())).Ring(v))
}

// interrupted takes the interrupts of vector v and says whether there were any.
func (r *rig) interrupted(v int) bool {
	var b [8]byte
	n, err := unix.Read(r.irqs[v], b[:])
	return err == nil && n == len(b)
}

func (r *rig) drainInterrupts() {
	for v := range r.irqs {
		r.interrupted(v)
	}
}

// alive checks that the controller still takes admin commands.
func (c *ctl) alive() {
	c.check(!c.csts().CFS(), "the controller has failed: %v", c.csts())
	c.identify(nvme.CNSController, 0)
}
