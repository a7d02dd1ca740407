package suite

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// cq is the host's half of a completion queue.
type cq struct {
	c    *ctl
	qid  uint16
	size uint32
	mem  buf
	cons *ring.CQConsumer
	head *dbbuf.Publisher
	sqs  map[uint16]*sq
	hold bool // do not publish the head
	got  int  // completions taken
}

// sq is the host's half of a submission queue.
type sq struct {
	c    *ctl
	qid  uint16
	size uint32
	mem  buf
	prod *ring.SQProducer
	tail *dbbuf.Publisher
	cq   *cq
	next uint16                     // CID of the next command
	out  map[uint16]nvme.Command    // not completed
	done map[uint16]nvme.Completion // completed, not waited for
}

// newCQ makes the host's half; the controller knows nothing of it yet.
func (c *ctl) newCQ(qid uint16, size uint32) *cq {
	mem := c.alloc(uint64(size) * ring.CQESize)
	q := &cq{c: c, qid: qid, size: size, mem: mem, sqs: map[uint16]*sq{}}
	var err error
	q.cons, err = ring.NewCQConsumer(mem.mem, size)
	c.must(err)
	q.head = c.publisher(qid, true)
	return q
}

func (c *ctl) newSQ(qid uint16, size uint32, q *cq) *sq {
	mem := c.alloc(uint64(size) * ring.SQESize)
	s := &sq{c: c, qid: qid, size: size, mem: mem, cq: q, out: map[uint16]nvme.Command{}, done: map[uint16]nvme.Completion{}}
	var err error
	s.prod, err = ring.NewSQProducer(mem.mem, size)
	c.must(err)
	s.tail = c.publisher(qid, false)
	q.sqs[qid] = s
	return s
}

// publisher returns how a doorbell of queue qid is moved now: by the shared pages if they are configured, else by the register.
func (c *ctl) publisher(qid uint16, completions bool) *dbbuf.Publisher {
	ring := func(v uint32) error { c.ringSQ(qid, v); return nil }
	if completions {
		ring = func(v uint32) error { c.ringCQ(qid, v); return nil }
	}
	if c.pages == nil || qid == 0 {
		return dbbuf.NewMMIO(ring)
	}
	word, ei := c.pages.slot(qid, completions)
	word.Store(0)
	ei.Store(0)
	return dbbuf.NewShadow(word, ei, ring)
}

// wantQueues is how many I/O queue pairs are asked for: more are never used.
const wantQueues = 16

// granted asks for the queues, once after each enable, and returns what was given.
func (c *ctl) granted() granted {
	if c.grant.sqs == 0 {
		var cmd nvme.Command
		z, _ := nvme.ToZeroBased16(wantQueues)
		cmd.SetSetFeatures(nvme.FeatureQueues, 0, uint32(nvme.MakeQueueCounts(z, z)))
		got := nvme.QueueCounts(c.ok(cmd).Result)
		c.grant = granted{got.SQs().Count(), got.CQs().Count()}
	}
	return c.grant
}

// createCQ returns the command that creates q.
func (q *cq) createCQ(vector uint16, ien bool) (cmd nvme.Command) {
	z, _ := nvme.ToZeroBased16(q.size)
	cmd.SetCreateCQ(q.qid, z, q.mem.iova, vector, ien)
	return cmd
}

// createSQ returns the command that creates s.
func (s *sq) createSQ() (cmd nvme.Command) {
	z, _ := nvme.ToZeroBased16(s.size)
	cmd.SetCreateSQ(s.qid, z, s.mem.iova, s.cq.qid, 0)
	return cmd
}

// makeCQ creates a completion queue without interrupts.
func (c *ctl) makeCQ(qid uint16, size uint32) *cq { return c.makeCQVector(qid, size, 0, false) }

func (c *ctl) makeCQVector(qid uint16, size uint32, vector uint16, ien bool) *cq {
	c.granted()
	q := c.newCQ(qid, size)
	c.ok(q.createCQ(vector, ien))
	return q
}

// makeSQ creates a submission queue.
func (c *ctl) makeSQ(qid uint16, size uint32, q *cq) *sq {
	s := c.newSQ(qid, size, q)
	c.ok(s.createSQ())
	return s
}

// makePair creates queue pair qid.
func (c *ctl) makePair(qid uint16, size uint32) *sq { return c.makeSQ(qid, size, c.makeCQ(qid, size)) }

// q is the case's I/O queue pair, 64 entries at most.
func (c *ctl) q() *sq {
	if c.io == nil {
		c.io = c.makePair(1, min(64, c.facts.cap.MQES().Count()))
	}
	return c.io
}

func (c *ctl) deleteSQ(qid uint16) nvme.Command {
	return nvme.Command{Opcode: nvme.AdminDeleteSQ, CDW10: uint32(qid)}
}

func (c *ctl) deleteCQ(qid uint16) nvme.Command {
	return nvme.Command{Opcode: nvme.AdminDeleteCQ, CDW10: uint32(qid)}
}

func (s *sq) String() string { return fmt.Sprintf("SQ %d", s.qid) }

// push puts cmd in the ring and returns its CID. The controller is not told.
func (s *sq) push(cmd nvme.Command) uint16 {
	if s.prod.Free() == 0 {
		s.c.wait(whole, s.String()+" to have room", func() bool { s.cq.reap(); return s.prod.Free() > 0 })
	}
	for s.busy(s.next) {
		s.next++
	}
	cmd.CID = s.next
	if s.next++; s.next == 0xFFFF { // NVMe Base 2.0c 3.3.3.1: should not be used
		s.next = 0
	}
	s.out[cmd.CID] = cmd
	s.prod.Push(&cmd)
	return cmd.CID
}

func (s *sq) busy(cid uint16) bool {
	_, out := s.out[cid]
	_, done := s.done[cid]
	return out || done
}

// ring tells the controller of everything that was pushed.
func (s *sq) ring() { s.c.must(s.tail.Publish(s.prod.Tail())) }

// submit is push and ring.
func (s *sq) submit(cmd nvme.Command) uint16 {
	cid := s.push(cmd)
	s.ring()
	return cid
}

// reap takes what has completed on the queue, and publishes the head.
func (q *cq) reap() {
	n := 0
	for q.take() {
		n++
	}
	if n > 0 && !q.hold {
		q.c.must(q.head.Publish(q.cons.Head()))
	}
}

// take takes one completion, if there is one.
func (q *cq) take() bool {
	e, ok := q.cons.Next()
	if !ok {
		return false
	}
	q.got++
	cpl := nvme.CompletionOf(e.Lo, e.Hi)
	s := q.sqs[cpl.SQID]
	if s == nil {
		q.c.failf("CQ %d got a completion of SQ %d, which does not feed it: %v", q.qid, cpl.SQID, &cpl)
	}
	if _, ok := s.out[cpl.CID]; !ok {
		q.c.failf("CQ %d got a completion for CID %#x of SQ %d, which is not outstanding: %v", q.qid, cpl.CID, cpl.SQID, &cpl)
	}
	q.c.must(s.prod.Released(cpl.SQHead))
	delete(s.out, cpl.CID)
	s.done[cpl.CID] = cpl
	return true
}

// completed takes the completion of cid, if it has come.
func (s *sq) completed(cid uint16) (nvme.Completion, bool) {
	s.cq.reap()
	cpl, ok := s.done[cid]
	delete(s.done, cid)
	return cpl, ok
}

// wait returns the completion of cid.
func (s *sq) wait(cid uint16) (cpl nvme.Completion) {
	cmd := s.out[cid]
	s.c.wait(whole, fmt.Sprintf("%v, CID %#x (%s)", s, cid, cmd.Describe(s.qid == 0)), func() (ok bool) {
		cpl, ok = s.completed(cid)
		return ok
	})
	return cpl
}

// exec runs cmd to its end.
func (s *sq) exec(cmd nvme.Command) nvme.Completion { return s.wait(s.submit(cmd)) }

// ok runs a command that must succeed.
func (s *sq) ok(cmd nvme.Command) nvme.Completion {
	cpl := s.exec(cmd)
	s.want(&cmd, cpl, nvme.StatusSuccess)
	return cpl
}

// refused runs a command that must fail, with one of the statuses.
func (s *sq) refused(cmd nvme.Command, statuses ...nvme.Status) nvme.Completion {
	cpl := s.exec(cmd)
	s.want(&cmd, cpl, statuses...)
	return cpl
}

// want checks the status of what cmd came to.
func (s *sq) want(cmd *nvme.Command, cpl nvme.Completion, statuses ...nvme.Status) {
	if slices.Contains(statuses, cpl.Status().Code()) {
		return
	}
	names := make([]string, len(statuses))
	for i, st := range statuses {
		names[i] = status(st)
	}
	s.c.failf("%s: status %s, want %s", cmd.Describe(s.qid == 0), status(cpl.Status().Code()), strings.Join(names, " or "))
}

// status prints "0/02h (Invalid Field in Command)".
func status(st nvme.Status) string {
	return fmt.Sprintf("%d/%02Xh (%s)", st.SCT(), st.SC(), st.Name())
}

// The same on the admin queue.

func (c *ctl) ok(cmd nvme.Command) nvme.Completion { return c.adm.ok(cmd) }
func (c *ctl) refused(cmd nvme.Command, statuses ...nvme.Status) nvme.Completion {
	return c.adm.refused(cmd, statuses...)
}

// identify returns what Identify says; it must succeed.
func (c *ctl) identify(cns nvme.CNS, nsid uint32) *[nvme.IdentifySize]byte {
	cmd, page := c.identifyCmd(cns, nsid)
	c.ok(cmd)
	return (*[nvme.IdentifySize]byte)(page.all())
}

// identifyCmd returns an Identify and the page that its data goes to.
func (c *ctl) identifyCmd(cns nvme.CNS, nsid uint32) (cmd nvme.Command, page buf) {
	page = c.page()
	cmd.SetIdentify(cns, nsid, nvme.CSINVM)
	cmd.PRP1 = page.iova
	return cmd, page
}

func (c *ctl) identifyController() *nvme.IdentifyController {
	id := new(nvme.IdentifyController)
	*id.Bytes() = *c.identify(nvme.CNSController, 0)
	return id
}

func (c *ctl) identifyNamespace(nsid uint32) *nvme.IdentifyNamespace {
	id := new(nvme.IdentifyNamespace)
	*id.Bytes() = *c.identify(nvme.CNSNamespace, nsid)
	return id
}

// activeAfter returns the Active Namespace List above nsid.
func (c *ctl) activeAfter(nsid uint32) []uint32 {
	l := new(nvme.NamespaceList)
	*l.Bytes() = *c.identify(nvme.CNSActiveNamespaces, nsid)
	return l.ID[:l.Len()]
}

// soon is how long an interrupt or event may take that is due.
const soon = 2 * time.Second
