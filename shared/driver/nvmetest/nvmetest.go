// Package nvmetest is a small NVMe controller for tests of the driver: registers, admin commands, namespaces in memory, and doorbells
// by message, by a mapped page or by shared pages. It runs in the test's process, on heap memory that the race detector
// sees (InProc), or behind a vfio-user socket (Serve).
//
// Hooks make it lie. What it does without them follows the specification as far as the driver can see; it is simple and slow, and
// no part of it is used outside tests.
package nvmetest

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Config says what the controller is like. Zero values give a controller with one namespace of 16384 blocks of 512 bytes, shared
// doorbells and quiet polling offered.
type Config struct {
	Namespaces []Namespace
	CAP        nvme.CAP // 0: 1024 entries, stride 4, 1 s
	MDTS       uint8    // as in Identify Controller
	SGLS       uint32   // as in Identify Controller
	Vectors    int      // MSI-X; 0: 32, -1: none
	Queues     int      // I/O queue pairs; 0: 16
	NoShadow   bool     // Doorbell Buffer Config is not offered
	NoQuiet    bool     // the quiet bit is not offered
	NoCache    bool     // there is no volatile write cache
	Mapped     bool     // the doorbell page can be mapped, and is polled
	Unsealed   bool     // with Serve and Mapped: in a file that can be shrunk
	Manual     bool     // I/O queues are looked at by Step and nobody else; no interrupt is sent for them

	Hooks
}

// barSize is the size of BAR0 in bytes behind a socket.
const barSize = 0x4000

// Namespace is one namespace; its NSID is its place in the list, from 1 on.
type Namespace struct {
	Blocks uint64
	LBADS  uint8
	MS     uint16 // bytes of metadata
	GUID   byte   // all bytes of its NGUID
	Absent bool   // not active
}

// Hooks change what the controller does. They run under its lock: they call nothing of the Device but ReadIOVA and WriteIOVA.
type Hooks struct {
	// Read sees a register and what reading it gives, and returns what it is to give.
	Read func(off uint32, v uint64) uint64
	// Write sees a register being written; false drops the write.
	Write func(off uint32, v uint64) bool
	// Command sees a command that was fetched from queue qid. For Do it is executed.
	Command func(qid uint16, cmd *nvme.Command) Verdict
	// Identify may change what Identify returns, 4096 bytes.
	Identify func(cmd *nvme.Command, data []byte)
	// Log fills in a log page, all of which the driver has asked for; without it pages are zeroes.
	Log func(cmd *nvme.Command, data []byte)
	// Admin executes an admin command that the Device does not know. data is what CDW10 counts in dwords, of vendor specific commands; it comes from the
	// driver and goes to it as bits 1:0 of the opcode say.
	Admin func(cmd *nvme.Command, data []byte) (nvme.Status, uint32)
	// Reset sees a reset of the function; an error makes it fail.
	Reset func() error
	// Post may change a CQE of queue qid before it is posted.
	Post func(qid uint16, e *ring.Entry)
}

// Verdict is what becomes of a command.
type Verdict struct {
	Action Action
	Status nvme.Status // with Fail
}

// Action is what Command decides.
type Action int

const (
	Do   Action = iota // execute it
	Fail               // complete it with Status
	Drop               // never complete it
	Hold               // execute and complete it at Release
)

// Device is the controller.
type Device struct {
	cfg Config

	mu      sync.Mutex
	cc      nvme.CC
	csts    nvme.CSTS
	aqa     nvme.AQA
	asq     uint64
	acq     uint64
	mem     []mapping
	reached uint64 // where Reach put the last
	vectors []int  // eventfds, -1: none
	ownFDs  bool
	sqs     map[uint16]*sq
	cqs     map[uint16]*cq
	disks   [][]byte

	bar        *shm.Region // with Serve and Mapped: what BAR0's file holds
	barFD      int
	page       *shm.Region // doorbells that are mapped
	mmio       [(barSize - nvme.DoorbellBase) / 4]atomic.Uint32
	shadow, ei *shm.Region
	quiet      bool
	aers       []uint16
	held       []held
	queues     int

	kick    chan struct{}
	quit    chan struct{}
	stopped chan struct{}
	once    sync.Once

	// Counts that tests look at.
	Rings      atomic.Uint64 // doorbell messages
	Interrupts atomic.Uint64
	Configs    atomic.Uint64 // Doorbell Buffer Configs that were accepted
	Shutdowns  atomic.Uint64
	Resets     atomic.Uint64 // of the controller, by CC.EN
	Flushes    atomic.Uint64
	FLRs       atomic.Uint64 // resets of the function
}

type mapping struct {
	iova uint64
	reg  *shm.Region
}

type held struct {
	sq  *sq
	cmd nvme.Command
}

// New starts a controller. Close ends it.
func New(cfg Config) *Device {
	if cfg.Namespaces == nil {
		cfg.Namespaces = []Namespace{{Blocks: 16384, LBADS: 9}}
	}
	if cfg.CAP == 0 {
		cfg.CAP = nvme.CAP(0).WithMQES(1023).WithTO(2).WithCSS(nvme.CAPCSSNVM).WithCQR(true)
	}
	if cfg.Vectors == 0 {
		cfg.Vectors = 32
	}
	if cfg.Queues == 0 {
		cfg.Queues = 16
	}
	d := &Device{
		cfg: cfg, queues: cfg.Queues, vectors: make([]int, max(cfg.Vectors, 0)),
		kick: make(chan struct{}, 1), quit: make(chan struct{}), stopped: make(chan struct{}),
	}
	for i := range d.vectors {
		d.vectors[i] = -1
	}
	d.resize()
	d.reset()
	go d.work()
	return d
}

// resize gives each namespace memory of its size, with what it had before.
func (d *Device) resize() {
	for i, ns := range d.cfg.Namespaces {
		n := uint64(0)
		if ns.LBADS < 24 && ns.Blocks<<ns.LBADS <= 1<<30 {
			n = ns.Blocks << ns.LBADS
		}
		disk := make([]byte, n)
		if i < len(d.disks) {
			copy(disk, d.disks[i])
			d.disks[i] = disk
		} else {
			d.disks = append(d.disks, disk)
		}
	}
}

// SetNamespaces changes the namespaces, of which there are as many as before or more. The driver is not told, see Event.
func (d *Device) SetNamespaces(all ...Namespace) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cfg.Namespaces = all
	d.resize()
}

// Close ends the controller's goroutine.
func (d *Device) Close() {
	d.once.Do(func() {
		close(d.quit)
		<-d.stopped
		d.mu.Lock()
		defer d.mu.Unlock()
		d.dropVectors()
		if d.bar != nil {
			d.bar.Close()
			unix.Close(d.barFD)
		}
	})
}

func (d *Device) dropVectors() {
	for i, fd := range d.vectors {
		if fd >= 0 && d.ownFDs {
			unix.Close(fd)
		}
		d.vectors[i] = -1
	}
}

// Disk returns a copy of the contents of namespace nsid.
func (d *Device) Disk(nsid int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.disks[nsid-1])
}

// Fill sets the contents of namespace nsid.
func (d *Device) Fill(nsid int, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.disks[nsid-1], data)
}

// reset is what CC.EN = 0 does.
func (d *Device) reset() {
	d.csts, d.quiet, d.shadow, d.ei = 0, false, nil, nil
	d.sqs, d.cqs = map[uint16]*sq{}, map[uint16]*cq{}
	d.aers, d.held = nil, nil
	for i := range d.mmio {
		d.mmio[i].Store(0)
	}
	if d.page != nil {
		_ = d.page.Zero(0, d.page.Len())
	}
}

// read returns a register.
func (d *Device) read(off uint32, size int) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	var v uint64
	switch off {
	case nvme.RegCAP:
		v = uint64(d.cfg.CAP)
	case nvme.RegCAP + 4:
		v = uint64(d.cfg.CAP) >> 32
	case nvme.RegVS:
		v = uint64(nvme.MakeVersion(1, 4, 0))
	case nvme.RegCC:
		v = uint64(d.cc)
	case nvme.RegCSTS:
		v = uint64(d.csts)
	case nvme.RegAQA:
		v = uint64(d.aqa)
	case nvme.RegASQ:
		v = d.asq
	case nvme.RegACQ:
		v = d.acq
	}
	if size == 4 {
		v &= 1<<32 - 1
	}
	if d.cfg.Read != nil {
		v = d.cfg.Read(off, v)
	}
	return v
}

// write writes a register or a doorbell.
func (d *Device) write(off uint32, v uint64) {
	if off >= nvme.DoorbellBase {
		d.ring(off, uint32(v))
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cfg.Write != nil && !d.cfg.Write(off, v) {
		return
	}
	switch off {
	case nvme.RegAQA:
		d.aqa = nvme.AQA(v)
	case nvme.RegASQ:
		d.asq = v
	case nvme.RegACQ:
		d.acq = v
	case nvme.RegCC:
		d.configure(nvme.CC(v))
	}
}

func (d *Device) configure(cc nvme.CC) {
	old := d.cc
	d.cc = cc
	switch {
	case cc.EN() && !old.EN():
		if d.openAdmin() {
			d.csts = d.csts.WithRDY(true)
		} else {
			d.csts = d.csts.WithCFS(true)
		}
	case !cc.EN() && old.EN():
		d.Resets.Add(1)
		d.reset()
	}
	if cc.SHN() != nvme.SHNNone && old.SHN() == nvme.SHNNone {
		d.Shutdowns.Add(1)
		d.csts = d.csts.WithSHST(nvme.SHSTComplete)
	}
}

// ring takes a doorbell message.
func (d *Device) ring(off uint32, v uint32) {
	d.Rings.Add(1)
	if i := (off - nvme.DoorbellBase) / 4; int(i) < len(d.mmio) {
		d.mmio[i].Store(v)
		d.mu.Lock()
		if d.page != nil { // the page is what is polled, whoever writes it
			if w, err := d.page.Word32(uint64(i) * 4); err == nil {
				w.Store(v)
			}
		}
		d.mu.Unlock()
	}
	d.wake()
}

func (d *Device) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// resetFunction is what an FLR does.
func (d *Device) resetFunction() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.FLRs.Add(1)
	if d.cfg.Reset != nil {
		if err := d.cfg.Reset(); err != nil {
			return err
		}
	}
	d.cc = 0
	d.reset()
	return nil
}

// abort ends a command that is held. Dword 0 says whether there was one.
func (d *Device) abort(sqid, cid uint16) uint32 {
	for i, h := range d.held {
		if h.sq.qid == sqid && h.cmd.CID == cid {
			d.held = append(d.held[:i:i], d.held[i+1:]...)
			d.complete(h.sq, &h.cmd, nvme.StatusAbortRequested, 0)
			return 0
		}
	}
	return 1
}

// Fault makes the controller report CSTS.CFS and stop.
func (d *Device) Fault() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.csts = d.csts.WithCFS(true)
	d.sqs = map[uint16]*sq{}
}

// Release executes and completes the commands that were held.
func (d *Device) Release() { d.release(func(uint16) bool { return true }) }

// ReleaseAdmin is Release for admin commands.
func (d *Device) ReleaseAdmin() { d.release(func(qid uint16) bool { return qid == 0 }) }

func (d *Device) release(which func(qid uint16) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := d.held
	d.held = nil
	var now []held
	for _, h := range all {
		if which(h.sq.qid) {
			now = append(now, h)
		} else {
			d.held = append(d.held, h)
		}
	}
	for _, h := range now {
		if d.sqs[h.sq.qid] == h.sq {
			d.finish(h.sq, &h.cmd)
			d.interrupt(h.sq.cq)
		}
	}
}

// Held returns how many commands are held.
func (d *Device) Held() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.held)
}

// Event completes one Asynchronous Event Request, if there is one.
func (d *Device) Event(e nvme.AsyncEvent) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.aers) == 0 {
		return false
	}
	cid := d.aers[0]
	d.aers = d.aers[1:]
	s := d.sqs[0]
	d.post(s, ring.MakeEntry(uint64(e), s.ring.Head(), 0, cid, nvme.StatusSuccess))
	d.interrupt(s.cq)
	return true
}

// PostRaw posts a CQE of the test's making in CQ qid and sends its interrupt.
func (d *Device) PostRaw(qid uint16, e ring.Entry) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cqs[qid]
	if c == nil {
		return false
	}
	c.ring.Post([]ring.Entry{e})
	d.interrupt(c)
	return true
}

// Reach lets the controller reach mem, and returns where it finds it.
func (d *Device) Reach(mem *shm.Region) (iova uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reached = (d.reached | (1<<32 - 1)) + 1 // one that is off by a little reaches nothing
	d.mem = append(d.mem, mapping{d.reached, mem})
	return d.reached
}

// Forget takes back what Reach gave, and says whether the controller had it.
func (d *Device) Forget(iova uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.mem)
	d.mem = slices.DeleteFunc(d.mem, func(m mapping) bool { return m.iova == iova })
	return len(d.mem) < n
}

// Reached returns how many pieces of memory the controller reaches.
func (d *Device) Reached() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.mem)
}

// ReadIOVA copies from the driver's memory.
func (d *Device) ReadIOVA(iova uint64, p []byte) bool {
	reg, err := d.view(iova, uint64(len(p)))
	return err == nil && reg.Read(0, p) == nil
}

// WriteIOVA copies into the driver's memory.
func (d *Device) WriteIOVA(iova uint64, p []byte) bool {
	reg, err := d.view(iova, uint64(len(p)))
	return err == nil && reg.Write(0, p) == nil
}

func (d *Device) view(iova, n uint64) (*shm.Region, error) {
	for _, m := range d.mem {
		if iova >= m.iova && iova-m.iova < m.reg.Len() {
			return m.reg.View(iova-m.iova, n)
		}
	}
	return nil, shm.ErrRange
}
