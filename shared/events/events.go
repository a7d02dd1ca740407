// Package events is a ring of fixed-size records by which hostmed and guestdrv tell what becomes of each command, and of their own sleep,
// to whoever listens. A ring is a memfd or a file: one producer writes it, any number of readers map it read-only.
//
// The producer never waits and reads nothing that a reader wrote, so a listener cannot slow it down, and one that dies leaves nothing
// behind. It overwrites what is oldest; a reader tells by positions what it has lost, and counts it (Reader.Lost).
//
// Layout, little-endian, Version 1:
//
//	offset  0  magic "SBEVENTS"      16  records that the ring holds, a power of two  u32
//	        8  version          u32  20  Ahead                                        u32
//	       12  bytes per record u32  24  number of the producer  u32   28  its process  u32
//	       32  its thread       u32  40  when it began, ns       i64   48  its name, 64 bytes, NUL-padded
//	      128  written: how many records were put in since, u64. The last ones are at (written-1) mod the ring's size, and before
//	     4096  the records
//
// The producer stores a record first and written after it, at most Ahead records later. A reader loads written, copies, and loads written
// again: of what it copied, all that lies more than a ring less Ahead behind may have been overwritten meanwhile, and is lost.
//
// A record is four 64-bit words: the time; kind, opcode, command identifier and key; and two that depend on the kind (record.go).
// Times are ns of CLOCK_MONOTONIC, as bpf_ktime_get_ns() has them, and Now.
package events

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Version is the layout that this package writes and reads.
const Version = 1

const (
	// RecordSize is the size of a record in bytes: half a cache line.
	RecordSize = 32
	// Ahead is how many records the producer may have stored, or be storing, beyond those that it says are written.
	Ahead = 64

	// DefaultRecords, MinRecords and MaxRecords are sizes of a ring: 8 MiB, 32 KiB and 512 MiB. A worker that does two million commands a second
	// fills the first in 30 ms.
	DefaultRecords = 1 << 18
	MinRecords     = 1 << 10
	MaxRecords     = 1 << 24
)

// The layout.
const (
	magic = uint64('S') | 'B'<<8 | 'E'<<16 | 'V'<<24 | 'E'<<32 | 'N'<<40 | 'T'<<48 | 'S'<<56

	headerSize  = 4096
	nameOffset  = 48
	nameSize    = 64
	writtenWord = 128 / 8
)

// ErrFormat says that a file is no ring of this version.
var ErrFormat = errors.New("not a ring of events")

// ErrProducer says that a ring's positions are none that a producer writes.
var ErrProducer = errors.New("the producer of the ring wrote an impossible position")

// Info is what a ring says of itself.
type Info struct {
	Name    string // of the producer: "hostmed worker 0"; at most 64 bytes
	Number  uint32 // of the producer among those of its process
	Process uint32 // pid
	Thread  uint32 // tid; 0: it is not one thread
	Began   int64  // ns
	Records uint32 // that the ring holds, a power of two
}

// Medium is where a namespace's commands go, for the numbers in Record.Medium.
type Medium struct {
	ID    uint16 `json:"id"`
	Name  string `json:"name"`           // the namespace's SPEC
	Kind  string `json:"kind"`           // null, mem, file, block, nvme or vfio
	Disk  string `json:"disk,omitempty"` // block, nvme: the kernel's name of the whole disk, nvme0n1
	NSID  uint32 `json:"nsid,omitempty"` // nvme, vfio: the device's number of the namespace
	PCI   string `json:"pci,omitempty"`  // vfio: the device's address
	Base  uint64 `json:"base"`           // byte on the disk, file or device's namespace at which the namespace begins
	Shift uint8  `json:"shift"`          // log2 of the size of the medium's own blocks in bytes; file, mem and null: of the namespace's
}

// Key names a queue: the controller's number, from 1, and the queue's. The zero Key is the producer itself.
type Key uint32

// NewKey returns the key of queue qid of a controller.
func NewKey(controller, qid uint16) Key { return Key(controller)<<16 | Key(qid) }

// Controller and QID are a Key's parts.
func (k Key) Controller() uint16 { return uint16(k >> 16) }
func (k Key) QID() uint16        { return uint16(k) }

func (k Key) String() string { return fmt.Sprintf("%d:%d", k.Controller(), k.QID()) }

// Kind is what a record is about.
type Kind uint8

// The kinds. What each means, when its time was taken, and which fields it has is said in docs/trace-points.md.
const (
	Fetch    Kind = iota + 1 // hostmed took a command out of its SQ
	Submit                   // hostmed is about to hand it, or a step of it, to the medium
	Complete                 // the medium has done with it
	Post                     // hostmed is about to write its CQE
	Arm                      // hostmed stored the event index, the tail had not moved, and the queue is not looked at any more
	ArmLost                  // the tail had moved
	Kick                     // a doorbell write came as a message
	Sleep                    // the producer's thread, or guestdrv's for a queue, is about to sleep
	Wake                     // it woke; with a queue's key in hostmed: the queue is polled again
	Publish                  // guestdrv is about to show a command to the controller
	Reap                     // guestdrv took its CQE
	kinds
)

var kindNames = [kinds]string{"", "fetch", "submit", "complete", "post", "arm", "arm-lost", "kick", "sleep", "wake", "publish", "reap"}

func (k Kind) String() string {
	if k > 0 && k < kinds {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// errFormat says what is wrong with a ring.
func errFormat(format string, args ...any) error {
	return fmt.Errorf("%w of version %d: "+format, append([]any{ErrFormat, Version}, args...)...)
}

func thisProcess() uint32 { return uint32(unix.Getpid()) }
