// Package backend is where a namespace's bytes are: nowhere (null), in this
// process's memory (mem), in a file (file), or on a device of the host's (block, nvme). For tests of drivers, faults may lie over any of them (faults.go). It is what a worker of hostmed hands a
// batch of requests to, and what gives them back when they are done.
//
// A request comes with its range checked and its guest memory translated to host
// addresses; the backend moves the data straight between the two. The package knows
// nothing of queues, PRPs or controllers, holds no lock on the way of a request,
// and allocates nothing for one.
package backend

import (
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Op is what a Request asks for.
type Op uint8

// The operations. What each does to Request's fields is said at Request.
const (
	OpRead        Op = iota // Off, Len, Vec
	OpWrite                 // Off, Len, Vec, FUA
	OpFlush                 // nothing: all writes that were completed before it become durable
	OpWriteZeroes           // Off, Len, FUA, Dealloc
	OpDiscard               // Off, Len; a hint, except that Info.DiscardZeroes says what is read afterwards
	OpCommand               // Cmd, one that Info.Native has, as it is: see Opcodes
)

func (o Op) String() string {
	names := [...]string{"read", "write", "flush", "write zeroes", "discard", "command"}
	if int(o) < len(names) {
		return names[o]
	}
	return "unknown operation"
}

// Seg is a piece of guest memory at its address in this process.
type Seg = unix.Iovec

// Request is one operation on a namespace. From Submit until Submit or Reap gives it
// back it is the backend's, and so is the memory that Vec points to. Requests
// that are with a backend at the same time have no order among them.
type Request struct {
	Op      Op
	FUA     bool   // durable before it is done (write, write zeroes)
	Dealloc bool   // write zeroes: may give the blocks back (DEAC)
	Keep    bool   // write zeroes: the blocks are allocated afterwards, as Mapper sees it
	Off     uint64 // byte offset, a multiple of the LBA size, already checked against the size
	Len     uint64 // bytes, a multiple of the LBA size
	Vec     []Seg  // guest memory, Len bytes in all (read, write; for OpCommand see Opcodes); the slice must not be on a stack

	// Cmd is the guest's command that the request is, or is a part of; nil: hostmed itself asks. A backend that speaks NVMe takes from it, beside
	// what it is for OpCommand, hints and protection fields of the command that Op stands for. NSID, SLBA and data pointer in it are the guest's.
	Cmd *nvme.Command

	Status nvme.Status // the result
	DW0    uint32      // OpCommand: Dword 0 of the completion
	Owner  uint64      // the caller's; the backend leaves it alone
	Priv   [2]uint64   // the backend's while the request is with it

	// RealQID and RealCID are the last of the device's commands that the request became, where hostmed drives the device (vfio:); RealQID 0: none as
	// yet. Other backends leave them alone.
	RealQID, RealCID uint16
}

// Info describes a namespace's medium. It does not change while a queue is open; see Alterable.
type Info struct {
	Name          string  // for people and logs: the spec without its defaults, "file:/srv/a.img"
	Blocks        uint64  // size in LBAs
	LBAShift      uint8   // log2 of the LBA size in bytes, 9 to 16
	FixedLBA      bool    // Format takes no other LBA size: it is the medium\'s own
	ReadOnly      bool    // writes are refused
	Discard       bool    // OpDiscard gives space back
	DiscardZeroes bool    // after OpDiscard the range reads as zeroes
	WriteZeroes   bool    // OpWriteZeroes is better than writing zeroes
	ZeroesStay    bool    // OpWriteZeroes gives no space back, whatever Dealloc says
	VolatileCache bool    // OpFlush and FUA mean something
	Maps          bool    // the Backend is a Mapper
	Native        Opcodes // I/O commands that the backend takes as OpCommand: the medium does them itself
	NativeMax     CommandLimits
	OptimalBlocks uint32 // LBAs that a discard should be a multiple of and aligned to; 0: not known
	WriteBlocks   uint32 // LBAs that a write should be a multiple of and aligned to; 0: not known
	OptimalWrite  uint32 // LBAs that a large write should be a multiple of; 0: WriteBlocks
	Boundary      uint32 // LBAs: what does not cross a multiple of them is faster; 0: none

	// AtomicWrite is how many LBAs, a power of two, are written as a whole for whoever reads or writes beside it, and AtomicPowerFail, which is no more, when
	// power fails: if they lie within a multiple of that. 0: 1.
	AtomicWrite, AtomicPowerFail uint32

	NGUID [16]byte
	UUID  [16]byte // both stable: derived from the spec, for a file from its path
}

// Opcodes is a set of I/O opcodes. Of those in Info.Native these come as OpCommand, and nothing else does:
//
//	                     Off, Len                     Vec
//	Write Uncorrectable  the blocks                   nil
//	Compare              the blocks                   guest memory, Len bytes, which the medium is compared with
//	Verify               the blocks                   nil
//	Dataset Management   of no meaning                one piece: the ranges, an array of nvme.DSMRange
//	Copy                 the blocks that it writes    one piece: the source ranges, an array of nvme.CopyRange (format 0)
//	80h and above        0, bytes of Vec              guest memory, as the opcode's bits 1:0 say: 01b to the medium, 10b from it; nil: none
//
// Read, Write, Write Zeroes and Flush are always requests of their own Op, with the command beside it in Cmd; reservations are hostmed's business.
//
// What a backend may rely on:
//   - Cmd.Opcode is in Native, FUSE is 0, and no more is asked for than NativeMax allows. What is over that comes as other operations.
//   - Every block, also of each range in a list, is of the namespace, counted in its blocks from its own first: a slice of a medium adds where it
//     begins. Cmd's SLBA is Off, its NLB is Len.
//   - A list is a copy of the guest's that is the request's: the backend may change it, and hand its address to the kernel. It is at most 4 KiB long.
//   - A medium that is read-only or protected is asked for nothing but Compare and Verify.
//   - FUA is set where a Copy has to be durable before it is done, which its own bit need not say.
//   - The rest of Cmd is the guest's, looked at by nobody. NSID, CID, MPTR, the data pointer and PSDT mean nothing to the medium and must be replaced.
//     So must be what would let a guest reach past its blocks.
//   - An opcode of 80h and above has no range that could be checked. Its data is as long as CDW10 says in dwords, and CDW11 is 0 (the form of vendor
//     specific commands, NVMe Base 2.0c 3.3.3.1). A backend has such a thing in Native only if its medium is one guest's as a whole and the device says
//     that it uses that form.
//
// Status and DW0 go to the guest as they are.
type Opcodes [4]uint64

// Has says whether op is in the set.
func (o Opcodes) Has(op uint8) bool { return o[op>>6]>>(op&63)&1 != 0 }

// With returns the set with ops.
func (o Opcodes) With(ops ...uint8) Opcodes {
	for _, op := range ops {
		o[op>>6] |= 1 << (op & 63)
	}
	return o
}

// CommandLimits are how much a medium takes in one OpCommand. 0: as much as a guest is told that it may ask for.
type CommandLimits struct {
	Compare            uint64 // bytes
	Verify             uint64 // bytes
	WriteUncorrectable uint64 // bytes
	DSMRanges          uint32 // how many
	DSMRange           uint32 // LBAs of one
	DSM                uint64 // LBAs of all
	CopyRanges         uint32 // how many
	CopyRange          uint32 // LBAs of one
	Copy               uint32 // LBAs of all
}

// MaxLBAShift is log2 of the largest block size in bytes.
const MaxLBAShift = 16

// LBASize is the size of a block in bytes.
func (i Info) LBASize() uint64 { return 1 << i.LBAShift }

// Size is the size of the medium in bytes.
func (i Info) Size() uint64 { return i.Blocks << i.LBAShift }

// Backend is an open medium. It may be used by any number of queues at once.
type Backend interface {
	Info() Info
	// NewQueue returns a way in for one worker.
	NewQueue() (Queue, error)
	// Close gives the medium back. Every queue must be closed before.
	Close() error
}

// Sharer is a Backend whose queues have something in common that one owner, a worker, shares with itself without locks or signals.
type Sharer interface {
	Backend
	// NewQueueFor is NewQueue for an owner, a pointer: all queues of one owner are used by one goroutine.
	NewQueueFor(owner any) (Queue, error)
}

// Pinner is a Backend that gets at memory that its queues were told of some time later. Requests work meanwhile, only not as well.
type Pinner interface {
	Backend
	// AwaitMemory waits for that, some seconds at the most.
	AwaitMemory()
}

// NewQueue opens a queue of b for owner.
func NewQueue(b Backend, owner any) (Queue, error) {
	if s, ok := b.(Sharer); ok {
		return s.NewQueueFor(owner)
	}
	return b.NewQueue()
}

// Queue is one worker's way into a Backend. All its methods are called by one
// goroutine at a time. None of them waits for the medium, except Close, and
// none allocates in the steady state.
type Queue interface {
	// Submit starts all of reqs as one batch. Those that are finished at once, and earlier ones that have
	// finished meanwhile, are put in done, whose length must be at least len(reqs), in any
	// order; Submit returns how many. The rest come out of Reap. Guest memory that has gone away is the status of its request, not a panic.
	Submit(reqs []*Request, done []*Request) int

	// Reap puts up to len(done) finished requests in done and returns how many. Where there is nothing to
	// reap it costs a few loads.
	Reap(done []*Request) int

	// Inflight is the number of requests that Submit took and neither call gave back yet.
	Inflight() int

	// EventFD is a non-blocking eventfd that becomes readable when Reap has something, for this queue or for another of the same medium, or
	// -1 if the queue never finishes a request later. Its counter is the caller's to read away; call Reap after
	// that, also with nothing in flight, and sleep only when Reap has nothing.
	EventFD() int

	// AddMemory says that b, a whole mapping of guest memory, is about to be used in
	// requests; RemoveMemory that it is not any more, with nothing in flight on it. Both are hints by
	// which a queue may register memory with the kernel; neither is needed for a request to work.
	// RemoveMemory must be called before b is unmapped if AddMemory was.
	AddMemory(b []byte)
	RemoveMemory(b []byte)

	// Close waits for what is in flight, drops the results, and gives the queue's resources back.
	Close() error
}

// Poller is a Queue whose owner must come back to Reap, again and again, as long as something is in flight and Polled says so: nothing else tells that
// it is done.
type Poller interface {
	Queue
	// Polled does not change while the queue is open.
	Polled() bool
}

// Event is what a Watched backend has seen of its medium.
type Event uint8

// The events.
const (
	EventChanged Event = iota // its size may be another: Alterable.Resized tells
	EventGone                 // it is away and does not come back; every request fails
	EventHealth               // the device under an Administered has a warning in its SMART log
)

// Watched is a Backend whose medium changes without anybody here asking.
type Watched interface {
	Backend
	// Watch makes f hear of events, from any goroutine and one at a time, until Close has returned. It is called once at the most. f may not call
	// the backend, nor wait for anything that does.
	Watch(f func(Event))
}

// Warner is a Backend that works and has something to say to the operator all the same.
type Warner interface {
	Backend
	Warnings() []string
}

// Keeper is a Queue that may keep a request back for long, or for ever: one with faults does so on purpose. The memory of such a request is
// not touched any more.
type Keeper interface {
	Queue
	// GiveUp makes Reap return, without waiting, those requests that which chooses of the ones that are kept back, and returns how many. aborted
	// says that an Abort command asks for one; otherwise their queue, their medium or their memory is about to go.
	GiveUp(aborted bool, which func(*Request) bool) int
}
