package ctrl

import (
	"errors"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// The admin queue. One AdminKick:
//
//  1. take the CQ head, post what waited for room, take the SQ tail; a value that cannot be stops the queue
//     (R30)
//  2. while there are commands, and room in the CQ for the answer (R9): copy one (R31), run it, post its completion
//  3. one interrupt for all of them
//  4. arm both doorbells; if one has moved, again from 1
//
// Commands run to their end here, one at a time, except Asynchronous Event Request and those that take long (async.go).

// kickBudget is how many commands and how many rounds one AdminKick does before it lets the session look at its other work.
const kickBudget = 512

type adminQueue struct {
	sq         *ring.SQConsumer
	cq         *ring.CQProducer
	sqMem      *shm.Region
	cqMem      *shm.Region
	begun      bool // a command was run
	parked     bool // their memory is not all mapped (parking.go)
	tail, head adminDoorbell
	stopped    bool // after an invalid doorbell: nothing is fetched until a reset
	badHead    bool // and the CQ head is not looked at

	waiting []ring.Entry // completions without room in the CQ, oldest first; at most aerLimit+asyncLimit+2
	posted  bool         // an interrupt is due
	cmd     nvme.Command // being run

	counts adminCounts
}

// AdminKick serves the admin queue: one of its doorbells has moved, or may have. It reports
// whether there is more to do, in which case the caller calls it again, soon and without waiting for a doorbell. It also does
// what was posted (async.go).
func (c *Controller) AdminKick() (more bool) {
	c.readMail()
	return c.guarded(c.serveAdmin)
}

// guarded runs fn unless the controller is not enabled. Guest memory that faults under it is the end of
// the controller (R36).
func (c *Controller) guarded(fn func() bool) (more bool) {
	if !c.ready {
		return false
	}
	if err := shm.Guard(func() { more = fn() }); err != nil {
		c.fatal("admin queue memory", err)
		return false
	}
	return more && c.ready
}

// guardedMail is guarded for what has to be done in any state.
func (c *Controller) guardedMail(fn func()) {
	if err := shm.Guard(fn); err != nil {
		c.fatal("admin queue memory", err)
	}
}

func (c *Controller) serveAdmin() (more bool) {
	sqTail, cqHead := c.dp.AdminDoorbells()
	a := &c.admin
	if a.parked || c.held {
		return false
	}
	budget := kickBudget
	for range kickBudget {
		c.takeHead(a.head.load(cqHead))
		for n := c.takeTail(a.tail.load(sqTail)); n > 0 && budget > 0 && a.room() && c.async.running < asyncLimit; n-- {
			a.sq.Fetch(&a.cmd)
			a.counts.fetch()
			c.run(&a.cmd)
			budget--
		}
		c.interrupt()
		tailStands, headStands := a.tail.arm(sqTail), a.head.arm(cqHead)
		c.dp.AdminTaken(a.tail.register, a.head.register)
		switch {
		case budget == 0:
			return true
		case tailStands && headStands:
			return false
		}
	}
	return true
}

// takeHead takes the driver's CQ head and posts what waited for it.
func (c *Controller) takeHead(head uint32) {
	if c.admin.badHead {
		return
	}
	if c.feat.quiet {
		head &^= nvme.QuietBit // no interrupt is saved on queue 0
	}
	if err := c.admin.cq.Consumed(head); err != nil {
		c.admin.badHead = true
		c.stopAdmin(err)
	}
	c.postWaiting()
}

// takeTail returns how many commands wait.
func (c *Controller) takeTail(tail uint32) uint32 {
	if c.admin.stopped {
		return 0
	}
	n, err := c.admin.sq.Pending(tail)
	if err != nil {
		c.stopAdmin(err)
		return 0
	}
	return n
}

func (c *Controller) stopAdmin(err error) {
	if c.admin.stopped {
		return
	}
	c.admin.stopped = true
	c.log.warn("admin queue stopped until the next reset", "error", err)
	c.queueError(0, BadDoorbellValue)
}

// room says that a command can be completed if it is fetched now.
func (a *adminQueue) room() bool { return len(a.waiting) == 0 && a.cq.Free() > 0 && !a.stopped }

// complete posts a completion, or keeps it until there is room. Each of the few that can be
// outstanding has its place.
func (c *Controller) complete(cid uint16, dw0 uint32, status nvme.Status) {
	a := &c.admin
	a.waiting = append(a.waiting, ring.MakeEntry(uint64(dw0), a.sq.Head(), 0, cid, status))
	c.postWaiting()
}

func (c *Controller) postWaiting() {
	a := &c.admin
	n := min(len(a.waiting), int(a.cq.Free()))
	if n == 0 || a.parked || c.held {
		return
	}
	a.cq.Post(a.waiting[:n])
	a.counts.post(n)
	a.waiting = append(a.waiting[:0], a.waiting[n:]...)
	a.posted = true
}

// interrupt signals vector 0 if anything was posted since the last time. The admin CQ's interrupts are always enabled
// and never coalesced.
func (c *Controller) interrupt() {
	if c.admin.posted {
		c.admin.posted = false
		c.admin.counts.interrupts++
		c.dp.Interrupt(0)
	}
}

// AdminUnconsumed says whether the driver has yet to give back completions of the admin queue: the part of queue 0 in
// the level of the interrupt pin.
func (c *Controller) AdminUnconsumed() bool {
	if !c.ready {
		return false
	}
	_, head := c.dp.AdminDoorbells()
	return c.admin.head.load(head)&^nvme.QuietBit != c.admin.cq.Tail()
}

// result is what became of a command.
type result struct {
	dw0    uint32
	status nvme.Status
	loc    location
	cause  string
	err    error // beneath cause, or nil
	later  bool  // it is completed later: an Asynchronous Event Request, or in the background
}

// location is the Parameter Error Location of the error log: byte of the SQE in bits 7:0, bit of it in bits 10:8.
type location uint16

const (
	inOpcode location = 0
	inFlags  location = 1
	inNSID   location = 4
	inPRP1   location = 24
	inPRP2   location = 32
	nowhere  location = 0xffff
)

// dword returns the location of bit n of command dword d.
func dword(d, n uint16) location { return location(d*4 + n/8 | n%8<<8) }

// fail is a command that failed and would fail again: DNR is set.
func fail(status nvme.Status, loc location, cause string) result {
	return result{status: status.WithDNR(), loc: loc, cause: cause}
}

func failErr(status nvme.Status, loc location, cause string, err error) result {
	return result{status: status.WithDNR(), loc: loc, cause: cause, err: err}
}

// run runs one command and completes it. A failure is logged and recorded here and nowhere else.
func (c *Controller) run(cmd *nvme.Command) {
	if !c.admin.begun && *cmd == (nvme.Command{}) {
		// QEMU with share=off passes the file of memory that it writes to elsewhere.
		c.log.warn("an admin command of zeroes: is the client's memory shared? QEMU's needs share=on: -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem")
	}
	c.admin.begun = true
	r := c.dispatch(cmd)
	if r.later {
		c.logBegun(cmd)
		return
	}
	c.finish(cmd, r)
}

// finish completes a command that was run.
func (c *Controller) finish(cmd *nvme.Command, r result) {
	if !r.status.OK() {
		c.takeIOErrors()
		c.cfg.Persistent.addError(nvme.ErrorLogEntry{CID: cmd.CID, Location: uint16(r.loc), NSID: cmd.NSID}, r.status.WithMore())
		r.status = r.status.WithMore() // the error log has more
		c.log.failed(cmd, &r)
	}
	c.complete(cmd.CID, r.dw0, r.status)
}

func (c *Controller) dispatch(cmd *nvme.Command) result {
	if cmd.FUSE() != nvme.FuseNormal {
		return fail(nvme.StatusInvalidField, inFlags, "fused admin command")
	}
	if cmd.PSDT() != nvme.PSDTPRP {
		return fail(nvme.StatusInvalidField, inFlags, "SGL in an admin command")
	}
	switch cmd.Opcode {
	case nvme.AdminDeleteSQ:
		return c.deleteSQ(cmd)
	case nvme.AdminCreateSQ:
		return c.createSQ(cmd)
	case nvme.AdminGetLogPage:
		return c.getLogPage(cmd)
	case nvme.AdminDeleteCQ:
		return c.deleteCQ(cmd)
	case nvme.AdminCreateCQ:
		return c.createCQ(cmd)
	case nvme.AdminIdentify:
		return c.identify(cmd)
	case nvme.AdminAbort:
		return c.abort(cmd)
	case nvme.AdminSetFeatures:
		return c.setFeatures(cmd)
	case nvme.AdminGetFeatures:
		return c.getFeatures(cmd)
	case nvme.AdminAsyncEventRequest:
		return c.asyncEventRequest(cmd)
	case nvme.AdminGetLBAStatus:
		return c.getLBAStatus(cmd)
	case nvme.AdminKeepAlive:
		c.startKeepAlive()
		return result{}
	case nvme.AdminDoorbellBufferConfig, nvme.AdminDoorbellMemory2014:
		if c.cfg.Mode == Shadow {
			return c.doorbellBufferConfig(cmd)
		}
	case nvme.AdminFormatNVM:
		if c.canFormat() {
			return c.formatNVM(cmd)
		}
	case nvme.AdminNamespaceManagement:
		if c.manages() {
			return c.namespaceManagement(cmd)
		}
	case nvme.AdminNamespaceAttachment:
		if c.manages() {
			return c.namespaceAttachment(cmd)
		}
	}
	if c.passes(cmd.Opcode) {
		return c.passOn(cmd)
	}
	return fail(nvme.StatusInvalidOpcode, inOpcode, "command not supported")
}

// adminOpcodes are those that dispatch knows; the effects log says so.
func (c *Controller) adminOpcodes() []uint8 {
	ops := []uint8{
		nvme.AdminDeleteSQ, nvme.AdminCreateSQ, nvme.AdminGetLogPage, nvme.AdminDeleteCQ, nvme.AdminCreateCQ, nvme.AdminIdentify,
		nvme.AdminAbort, nvme.AdminSetFeatures, nvme.AdminGetFeatures, nvme.AdminAsyncEventRequest, nvme.AdminGetLBAStatus,
		nvme.AdminKeepAlive,
	}
	if c.cfg.Mode == Shadow {
		ops = append(ops, nvme.AdminDoorbellBufferConfig, nvme.AdminDoorbellMemory2014)
	}
	if c.canFormat() {
		ops = append(ops, nvme.AdminFormatNVM)
	}
	if c.manages() {
		ops = append(ops, nvme.AdminNamespaceManagement, nvme.AdminNamespaceAttachment)
	}
	return append(ops, c.passedOpcodes()...)
}

var errNotMapped = errors.New("not in the guest's memory")

// toHost writes data to the command's PRPs.
func (c *Controller) toHost(cmd *nvme.Command, data []byte) result {
	return c.transfer(cmd, data, c.mem.WriteIOVA)
}

// fromHost reads data from the command's PRPs.
func (c *Controller) fromHost(cmd *nvme.Command, data []byte) result {
	return c.transfer(cmd, data, c.mem.ReadIOVA)
}

func (c *Controller) transfer(cmd *nvme.Command, data []byte, copyTo func(iova uint64, p []byte) bool) result {
	maxPages := int(prp.Pages(uint64(c.pageSize-1), c.cfg.MDTSBytes, c.pageSize))
	extents, status := prp.Walk(cmd.PRP1, cmd.PRP2, uint32(len(data)), c.pageSize, maxPages, c.mem, nil)
	if !status.OK() {
		return fail(status, inPRP1, "PRP")
	}
	for _, e := range extents {
		if !copyTo(e.IOVA, data[:e.Len]) {
			return failErr(nvme.StatusDataTransferError, inPRP1, "data", errNotMapped)
		}
		data = data[e.Len:]
	}
	return result{}
}
