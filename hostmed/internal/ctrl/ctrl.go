// Package ctrl is a virtual NVMe controller without its data path: registers, enable,
// disable, shutdown, the admin queue and its commands, features, log pages and asynchronous
// events (NVMe Base 2.0c, NVM Command Set 1.0c, NVMe PCIe Transport 1.0c). It says of itself that it is NVMe 1.4.
//
// What it does not do: it fetches no I/O command, and knows no socket and no PCI configuration
// space. I/O queues are made and unmade through [DataPath], guest memory is reached through [Memory].
// All methods are called from one goroutine, the session's, except InterruptMask and Post. Only the flush of
// a shutdown and commands that take long have goroutines of their own, which Close waits for.
//
// The flow: WriteReg(CC.EN) maps the admin queues (enable.go); a doorbell of queue 0 becomes AdminKick, which
// fetches, runs and completes admin commands (admin.go, doorbells.go); those are in queues.go, identify.go, features.go and
// logs.go; what happens without a command becomes an event (events.go). Every failed command leaves
// an entry in the error log.
package ctrl

import (
	"cmp"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Limits of any controller, and what Config's zeroes mean.
const (
	MaxIOQueues = 64 // of each kind

	defaultMaxDepth = 4096
	defaultMDTS     = 1 << 20
	minPageSize     = 4096
)

// DoorbellMode is how a driver's doorbells reach the data path.
type DoorbellMode uint8

const (
	Shadow DoorbellMode = iota // Doorbell Buffer Config and its forerunner of 2014 work
	Trap                       // every doorbell is a message
	Mmap                       // the doorbell page of BAR0 is mapped into the client
)

func (m DoorbellMode) String() string {
	switch m {
	case Shadow:
		return "shadow"
	case Trap:
		return "trap"
	case Mmap:
		return "mmap"
	}
	return "unknown"
}

// Namespace is a medium under a namespace id, which is 1 or more and the only one of its kind.
type Namespace struct {
	NSID    uint32
	Backend backend.Backend
	Info    backend.Info
	Of      *subsys.Namespace // in its subsystem; nil: in none

	Protection subsys.Protection
	Formats    uint64 // how often it was formatted
}

// View is n as it is now.
func View(n *subsys.Namespace) *Namespace {
	m := n.Medium()
	return &Namespace{NSID: n.NSID, Backend: m.Backend, Info: m.Info, Of: n, Protection: n.Protection(), Formats: n.Formats()}
}

// CQParams describes an I/O completion queue that passed every check of Create I/O CQ.
type CQParams struct {
	QID    uint16
	Size   uint32      // entries
	IOVA   uint64      // page aligned
	Mem    *shm.Region // Size * 16 bytes, which are there; the data path closes it
	Vector uint16
	IEN    bool
}

// SQParams describes an I/O submission queue that passed every check of Create I/O SQ.
type SQParams struct {
	QID, CQID uint16
	Size      uint32      // entries
	IOVA      uint64      // page aligned
	Mem       *shm.Region // Size * 64 bytes, which are there; the data path closes it
	Prio      uint8       // QPRIO
}

// DataPath is what the I/O queues are in. Its methods are called from the session's goroutine and may wait
// for the workers.
type DataPath interface {
	CreateCQ(CQParams) error
	DeleteCQ(qid uint16)
	CreateSQ(SQParams) error
	// DeleteSQ deletes the queue if every command fetched from it is completed. Otherwise later returns when they are, on any goroutine, and
	// then it is called again.
	DeleteSQ(qid uint16) (later func())
	// Abort reports whether the command will be completed with Command Abort Requested.
	Abort(sqid, cid uint16) bool
	// SetDoorbellPages puts the doorbells of all I/O queues on the pages; nil, nil takes them off. It
	// quiesces, seeds both pages from the current values, switches and wakes all (R23). An error leaves everything as
	// it was (R26).
	SetDoorbellPages(shadow, ei *shm.Region) error
	// ResumeDoorbellPages puts the doorbells back on pages that SetDoorbellPages(nil, nil) took them off, and which the driver has
	// gone on using: their values count, and are not seeded. All queues are probed (R27).
	ResumeDoorbellPages(shadow, ei *shm.Region) error
	SetQuiet(on bool)
	SetCoalescing(thresholdZ uint8, time100us uint8)
	SetVectorConfig(vector uint16, coalescingDisabled bool)
	// SetArbitration says by what I/O SQs share: weighted is CC.AMS, and v its weights and burst. Stop ends it. It is round robin at first.
	SetArbitration(weighted bool, v nvme.Arbitration)
	// SetWriteCache turns the cache off, after which every write is durable before it completes, or, as it is at first and after
	// Stop, on.
	SetWriteCache(on bool)
	// SetDULBE makes reads of blocks of nsid that are not allocated fail, if its medium can tell.
	SetDULBE(nsid uint32, on bool)
	// Stop deletes every I/O queue and drops the doorbell pages: when it returns neither is touched any more (R21). It is true if no command
	// that was fetched moves data any more either, for which it waits for patience at the most. Otherwise Config's owner is told
	// when that is so (Settle), and Stop is called again.
	Stop(patience time.Duration) bool
	// Flush makes every namespace durable. It is called from a goroutine of its own, since it may take long and the
	// session must answer meanwhile; other methods, Stop among them, may be called before it returns.
	Flush() error
	Interrupt(vector uint16)
	// AdminDoorbells returns where queue 0's doorbells are written by MMIO, or the mapped
	// doorbell page's first two words. Shadow pages are not its business (R16).
	AdminDoorbells() (sqTail, cqHead *atomic.Uint32)
	// AdminTaken says which values of them the controller knows; it looks again when they are others, or when it is kicked.
	AdminTaken(sqTail, cqHead uint32)
	// ZeroAdminDoorbells sets both to 0. Whatever the driver then writes is new, also what they held before.
	ZeroAdminDoorbells()
}

// Memory is guest memory by IOVA.
type Memory interface {
	// View returns the n bytes from iova, wherever they are; the caller closes it, before the memory is unmapped.
	View(iova, n uint64) (*shm.Region, error)
	ReadIOVA(iova uint64, p []byte) bool
	WriteIOVA(iova uint64, p []byte) bool
}

// IOStats is what the SMART log says about I/O, counted since the controller was made.
type IOStats struct {
	ReadBytes, WriteBytes       uint64
	ReadCommands, WriteCommands uint64
	MediaErrors                 uint64
	Busy                        time.Duration // with at least one command outstanding
}

// IOError is an I/O command that failed, as the error log has it.
type IOError struct {
	SQID, CID uint16
	Status    nvme.Status // as in the completion
	Location  uint16      // Parameter Error Location; 0xffff: none
	NSID      uint32
	LBA       uint64
}

// Config is one controller. Zeroes take the default in brackets.
type Config struct {
	CNTLID                          uint16
	SubNQN, Serial, Model, Firmware string
	Namespaces                      []Namespace
	MaxIOQueues                     uint16 // of each kind [64, which is also the most]
	MaxDepth                        uint32 // entries of an I/O queue [4096]
	MDTSBytes                       uint32 // longest transfer, a power of two of at least two pages [1 MiB]
	Vectors                         uint16 // interrupt vectors [MaxIOQueues + 1]
	Mode                            DoorbellMode
	DSTRD                           uint8 // doorbell stride 4 << DSTRD bytes
	VID, SSVID                      uint16
	Logger                          hclog.Logger   // [none]
	Stats                           func() IOStats // [nothing was done]
	Persistent                      *Persistent    // of this controller's identity, used by one Controller at a time [one that ends with it]
	HealthPeriod                    time.Duration  // how often devices of the host's are asked for warnings that the guest wants to hear of [30 s]
	// IOErrors returns the I/O commands that failed since it was called last: how many, and the newest, oldest first. [none did]
	IOErrors func() (newest []IOError, n uint64)
	// Dump describes the queues of the data path, for telemetry. [nothing]
	Dump func() string

	// Wake makes the session call AdminKick soon. It is called from any goroutine, and must not block. [mail waits for the
	// next doorbell]
	Wake func()

	Self *subsys.Controller // its place in an NVM subsystem [none]
}

// Controller is one virtual NVMe controller.
type Controller struct {
	cfg Config
	dp  DataPath
	mem Memory
	log limiter
	now func() time.Time

	regs     registers
	intMask  atomic.Uint32
	ready    bool      // CSTS.RDY without CSTS.CFS: the admin queue is served
	settling bool      // reset, but commands of before have not ended
	settled  time.Time // since when
	pageSize uint32
	held     bool // not bus master, or not in D0

	admin   adminQueue
	pages   doorbellPages
	queues  queueTable
	feat    features
	events  events
	notices notices
	health  health
	power   power

	keepAlive keepAlive
	telemetry string // host-initiated, as last taken
	reporting []byte // the persistent events as the host is reading them; nil: it does not

	shutdownDone chan error // of the flush of a shutdown that is going on; nil: none
	flush        flusher
	history      history
	async        async
}

// New returns a controller that is disabled, as after power-on. What cfg asks for beyond the limits is cut to them.
func New(cfg Config, dp DataPath, mem Memory) *Controller {
	c := &Controller{cfg: cfg, dp: dp, mem: mem, now: time.Now, pageSize: minPageSize}
	cfgp := &c.cfg
	cfgp.DSTRD &= 0xf
	cfgp.MaxIOQueues = LimitQueues(cfgp.MaxIOQueues, cfgp.Mode, cfgp.DSTRD)
	if cfgp.MaxDepth == 0 {
		cfgp.MaxDepth = defaultMaxDepth
	}
	cfgp.MaxDepth = min(max(cfgp.MaxDepth, 2), 1<<16)
	if cfgp.MDTSBytes == 0 {
		cfgp.MDTSBytes = defaultMDTS
	}
	// One page cannot be said in Identify: MDTS 0 is no limit.
	cfgp.MDTSBytes = 1 << (bits.Len32(max(cfgp.MDTSBytes, 2*minPageSize)) - 1)
	if cfgp.Vectors == 0 {
		cfgp.Vectors = cfgp.MaxIOQueues + 1
	}
	if cfgp.HealthPeriod <= 0 {
		cfgp.HealthPeriod = healthPeriod
	}
	if cfgp.Logger == nil {
		cfgp.Logger = hclog.NewNullLogger()
	}
	if cfgp.Stats == nil {
		cfgp.Stats = func() IOStats { return IOStats{} }
	}
	if cfgp.IOErrors == nil {
		cfgp.IOErrors = func() ([]IOError, uint64) { return nil, 0 }
	}
	if cfgp.Dump == nil {
		cfgp.Dump = func() string { return "" }
	}
	if cfgp.Wake == nil {
		cfgp.Wake = func() {}
	}
	if cfgp.Persistent == nil {
		cfgp.Persistent = &Persistent{log: cfgp.Logger}
	}
	cfgp.Namespaces = sortedNamespaces(cfgp.Namespaces)
	c.log = limiter{log: cfgp.Logger}
	c.regs = newRegisters(cfgp)
	c.queues = newQueueTable(cfgp.MaxIOQueues)
	c.feat = c.newFeatures()
	c.powerOn()
	return c
}

// LimitQueues returns how many I/O queues of each kind there can be if n are wanted; 0 wants all. The doorbells
// of all must have room in one page if they can be moved there (R29).
func LimitQueues(n uint16, mode DoorbellMode, dstrd uint8) uint16 {
	most := uint16(MaxIOQueues)
	if mode == Shadow {
		slots := minPageSize / nvme.DoorbellStride(dstrd)
		most = min(most, uint16(max(slots/2, 2)-1))
	}
	if n == 0 || n > most {
		return most
	}
	return n
}

func sortedNamespaces(in []Namespace) []Namespace {
	ns := slices.Clone(in)
	slices.SortFunc(ns, func(a, b Namespace) int { return cmp.Compare(a.NSID, b.NSID) })
	return ns
}

// findNamespace returns nsid of the sorted ns, or nil.
func findNamespace(ns []Namespace, nsid uint32) *Namespace {
	i, ok := slices.BinarySearchFunc(ns, nsid, func(n Namespace, id uint32) int { return cmp.Compare(n.NSID, id) })
	if !ok {
		return nil
	}
	return &ns[i]
}

// namespace returns the active namespace nsid, or nil.
func (c *Controller) namespace(nsid uint32) *Namespace {
	return findNamespace(c.cfg.Namespaces, nsid)
}

// Close waits for a shutdown's flush and for what else runs in the background, after which the backends may be closed. The
// data path is closed before. The controller is not used afterwards.
func (c *Controller) Close() {
	c.ready = false
	c.stopKeepAlive()
	c.followHealth() // not any more
	c.flush.wait.Wait()
	c.closeAsync()
	c.status() // a shutdown that nobody has looked at is one all the same
	c.powerOff()
}

// highestNSID is NN of Identify Controller: in a subsystem, where namespaces come and go, more than there are now.
func (c *Controller) highestNSID() uint32 {
	most := uint32(1)
	if n := len(c.cfg.Namespaces); n > 0 {
		most = c.cfg.Namespaces[n-1].NSID
	}
	if c.cfg.Self != nil {
		most = max(most, c.cfg.Self.Subsystem().HighestNSID(c.manages()))
	}
	return most
}

// Enabled reports whether the controller takes admin commands: CSTS.RDY and not CSTS.CFS.
func (c *Controller) Enabled() bool { return c.ready }

// Shutdown reports whether the driver has asked for a shutdown and it is complete.
func (c *Controller) Shutdown() bool { return c.status().SHST() == nvme.SHSTComplete }

// State is a word for logs: disabled, enabled, shut down or failed.
func (c *Controller) State() string {
	switch {
	case c.regs.csts.CFS():
		return "failed"
	case c.Shutdown():
		return "shut down"
	case c.ready:
		return "enabled"
	case c.settling:
		return "reset, but for commands that have not ended"
	}
	return "disabled"
}

// MaxIOQueues is how many I/O queues of each kind there can be, after R29's limit.
func (c *Controller) MaxIOQueues() uint16 { return c.cfg.MaxIOQueues }

// PageSize is the memory page in bytes, from CC.MPS.
func (c *Controller) PageSize() uint32 { return c.pageSize }

// InterruptMask returns INTMS: the vectors that pin interrupts are masked for. Any goroutine may call it.
func (c *Controller) InterruptMask() uint32 { return c.intMask.Load() }
