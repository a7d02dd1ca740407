package ctrl

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/broken"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// The life of a controller, NVMe Base 2.0c 3.5 to 3.7:
//
//	disabled --CC.EN=1--> enabled                  enable; on bad settings CSTS.CFS and no RDY
//	enabled  --CC.SHN---> enabled, shut down       shutdown; commands still work
//	enabled  --fatal----> failed                   CSTS.CFS
//	any      --CC.EN=0--> disabled                 disable: keeps AQA, ASQ, ACQ
//	any      --Reset----> disabled                 all registers as after power-on
//	any      --NSSR-----> disabled                 the same, and CSTS.NSSRO
//
// Each way to disabled stops the data path first, drops the doorbell pages, and says RDY=0 last (R21). A shutdown drops them, too, before it is
// said to be complete.
//
// A register write is answered at once, whatever the media do. If they have not ended all commands the controller is reset in all but one
// thing: CSTS.RDY stays 1 until they have (settling), and the driver waits for that before it uses its memory for something else or enables the
// controller again: NVMe Base 2.0c 3.5.1 and 3.7.2 (RDY is cleared when the controller is idle). CAP.TO tells it how long that may take.

// writeCC carries out a write of CC. While EN stays set only SHN can change, and the sizes of I/O queue entries until there are I/O
// queues: a host may wait for Identify to learn them. NVMe Base 2.0c 3.5.1.
func (c *Controller) writeCC(v nvme.CC) {
	old := c.regs.cc
	if old.EN() && v.EN() {
		shn := v.SHN()
		if c.queues.any() {
			v = old
		}
		v = old.WithSHN(shn).WithIOSQES(v.IOSQES()).WithIOCQES(v.IOCQES())
	}
	c.regs.cc = v
	switch {
	case v.EN() && !old.EN():
		c.history.enables++
		if !c.settling { // otherwise when that is over
			c.enable()
		}
	case !v.EN() && old.EN():
		c.disable()
		c.log.debug("controller disabled")
	}
	if (v.SHN() == nvme.SHNNormal || v.SHN() == nvme.SHNAbrupt) && c.regs.csts.SHST() == nvme.SHSTNormal {
		c.shutdown()
	}
}

func (c *Controller) enable() {
	c.shutdownDone = nil
	c.regs.csts = c.regs.csts.WithSHST(nvme.SHSTNormal)
	err := c.checkCC()
	if err == nil {
		c.pageSize = c.regs.cc.PageSize()
		err = c.mapAdminQueues()
	}
	if err != nil {
		c.fatal("controller cannot be enabled", err)
		return
	}
	c.ready = true
	c.applyFeatures()
	c.setAtRisk(true)
	c.regs.csts = c.regs.csts.WithRDY(true)
	c.followHealth()
	c.log.debug("controller enabled", "cc", c.regs.cc.String(), "aqa", c.regs.aqa.String())
}

// checkCC checks what CC asks for against CAP. The sizes of I/O queue entries count when a queue is created.
func (c *Controller) checkCC() error {
	cc, caps := c.regs.cc, c.regs.cap
	switch {
	case cc.MPS() < caps.MPSMIN() || cc.MPS() > caps.MPSMAX():
		return fmt.Errorf("CC.MPS is %d, CAP allows %d to %d", cc.MPS(), caps.MPSMIN(), caps.MPSMAX())
	case cc.CSS() != nvme.CSSNVM && cc.CSS() != nvme.CSSIOCS:
		return fmt.Errorf("CC.CSS is %d, CAP allows the NVM command set (0) and all command sets (6), which is the same here", cc.CSS())
	case cc.AMS() != nvme.AMSRoundRobin && cc.AMS() != nvme.AMSWeighted:
		return fmt.Errorf("CC.AMS is %d, CAP allows round robin (0) and weighted round robin with urgent priority class (1)", cc.AMS())
	}
	return nil
}

// mapAdminQueues makes the admin queues from AQA, ASQ and ACQ.
func (c *Controller) mapAdminQueues() error {
	if last := uint64(c.pageSize - 1); c.regs.asq&last != 0 || c.regs.acq&last != 0 {
		return fmt.Errorf("admin queues at %#x and %#x are not aligned to memory pages of %d bytes (CC.MPS)", c.regs.asq, c.regs.acq, c.pageSize)
	}
	sqSize, cqSize := c.regs.aqa.ASQS().Count(), c.regs.aqa.ACQS().Count()
	var a adminQueue
	var err error
	if a.sqMem, err = c.mem.View(c.regs.asq, uint64(sqSize)*ring.SQESize); err != nil {
		return fmt.Errorf("admin SQ at %#x: %w", c.regs.asq, err)
	}
	if a.cqMem, err = c.mem.View(c.regs.acq, uint64(cqSize)*ring.CQESize); err != nil {
		a.release()
		return fmt.Errorf("admin CQ at %#x: %w", c.regs.acq, err)
	}
	var err1, err2 error
	a.sq, err1 = ring.NewSQConsumer(a.sqMem, sqSize)
	a.cq, err2 = ring.NewCQProducer(a.cqMem, cqSize)
	if err := errors.Join(err1, err2); err != nil {
		a.release()
		return fmt.Errorf("admin: %w", err)
	}
	c.dp.ZeroAdminDoorbells() // what was rung while disabled does not count
	c.admin = a
	return nil
}

// disable is a controller reset: everything but the admin queue registers goes back.
func (c *Controller) disable() {
	if c.regs.csts.RDY() || c.regs.csts.CFS() {
		c.logReset()
	}
	c.ready = false
	c.reporting = nil
	c.settling = !c.dp.Stop(stopPatience)
	if !broken.On(broken.KeepPages) {
		c.pages.release()
		c.pages = doorbellPages{}
	}
	c.dp.ZeroAdminDoorbells()
	c.admin.release()
	c.admin = adminQueue{}
	c.forgetBackground()
	c.stopKeepAlive()
	c.followHealth()
	c.queues = newQueueTable(c.cfg.MaxIOQueues)
	c.events = events{}
	c.notices = notices{}
	if c.cfg.Self != nil {
		c.cfg.Self.ResetHost()
	}
	c.health.reported, c.health.changed = 0, nil
	c.resetFeatures()
	c.intMask.Store(0)
	c.shutdownDone = nil
	c.regs.csts = nvme.CSTS(0).WithNSSRO(c.regs.csts.NSSRO())
	if c.settling {
		c.settled = c.now()
		c.log.warn("controller reset, but commands of before have not ended: CSTS.RDY stays 1 until they have", "media", c.media())
	}
}

// stopPatience is how long the answer to a register write waits for commands to end: longer than media take that work.
const stopPatience = 100 * time.Millisecond

// Settle waits, for patience at the most, until the commands that were in flight at the last reset have ended, and reports whether they have. It is called,
// without patience, whenever the data path says that they may have.
func (c *Controller) Settle(patience time.Duration) bool {
	if !c.settling {
		return true
	}
	if !c.dp.Stop(patience) {
		return false
	}
	c.settling = false
	c.log.info("the commands from before the reset have ended", "after", c.now().Sub(c.settled).Round(time.Millisecond))
	c.dp.ZeroAdminDoorbells()
	if c.regs.cc.EN() { // too early: a driver waits for RDY=0
		c.enable()
	}
	return true
}

// media names what the namespaces are on, for logs.
func (c *Controller) media() (names []string) {
	for i := range c.cfg.Namespaces {
		names = append(names, c.cfg.Namespaces[i].Info.Name)
	}
	return names
}

// Reset is a reset from outside: DEVICE_RESET, FLR. Every register goes back to what it is after
// power-on.
func (c *Controller) Reset() {
	c.disable()
	c.regs = newRegisters(&c.cfg)
	c.log.debug("controller reset")
}

// subsystemReset resets every controller of the NVM subsystem. NVMe Base 2.0c 3.7.1.
func (c *Controller) subsystemReset() {
	c.SubsystemReset()
	if c.cfg.Self != nil {
		c.cfg.Self.ResetSubsystem()
	}
}

// SubsystemReset is the part of an NVM subsystem reset that is this controller's.
func (c *Controller) SubsystemReset() {
	c.Reset()
	c.regs.csts = c.regs.csts.WithNSSRO(true)
}

// shutdown begins to make the data durable; status says when that is done. NVMe Base 2.0c 3.6.1.
func (c *Controller) shutdown() {
	c.regs.csts = c.regs.csts.WithSHST(nvme.SHSTOccurs)
	c.logSMART()
	c.stopKeepAlive()
	c.log.debug("controller shuts down", "shn", c.regs.cc.SHN())
	c.shutdownDone = make(chan error, 1)
	c.flush.start(c.dp.Flush, c.shutdownDone)
}

// flusher runs one flush at a time, however often a driver asks for a shutdown.
type flusher struct {
	mu      sync.Mutex // guards running and next
	running bool
	next    chan error // the newest shutdown that no flush has begun for; nobody waits for older ones
	wait    sync.WaitGroup
}

// start sends done, which has room for it, what a flush that begins later than now returns.
func (f *flusher) start(flush func() error, done chan error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next = done
	if f.running {
		return
	}
	f.running = true
	f.wait.Go(func() {
		for done := f.take(); done != nil; done = f.take() {
			done <- flush()
		}
	})
}

func (f *flusher) take() chan error {
	f.mu.Lock()
	defer f.mu.Unlock()
	done := f.next
	f.next = nil
	f.running = done != nil
	return done
}

// status is CSTS as it stands now.
func (c *Controller) status() nvme.CSTS {
	select {
	case err := <-c.shutdownDone: // never, if it is nil
		c.shutdownDone = nil
		if err != nil {
			c.log.warn("shutdown: data may not be durable", "error", err)
		} else {
			c.setAtRisk(false)
		}
		// From here on the driver may take its memory back, and Linux does, without a reset (R21): the doorbell pages are looked at and
		// written no more.
		c.forgetDoorbellPages()
		c.regs.csts = c.regs.csts.WithSHST(nvme.SHSTComplete)
	default:
	}
	if c.settling {
		return c.regs.csts.WithRDY(!c.regs.cc.EN())
	}
	return c.regs.csts
}

// fatal says CSTS.CFS; only a reset leads out of it.
func (c *Controller) fatal(what string, cause error) {
	c.ready = false
	c.regs.csts = c.regs.csts.WithCFS(true)
	c.admin.release()
	c.admin = adminQueue{}
	log := c.log.warn
	if c.regs.cc.SHN() != 0 {
		log = c.log.debug // a driver that has shut the controller down may take its memory back
	}
	c.keepTelemetry(what + ": " + cause.Error())
	log(what, "error", cause, "cc", c.regs.cc.String(), "aqa", c.regs.aqa.String())
}

var errKeepAlive = errors.New("no Keep Alive command in time (feature 0Fh)")
