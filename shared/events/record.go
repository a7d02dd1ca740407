package events

import (
	"math"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Record is one event. Fields that its Kind does not have are zero.
type Record struct {
	Time   int64 // ns of CLOCK_MONOTONIC
	Source int   // which ring of a Merge; it is not in the ring
	Kind   Kind
	Opcode uint8 // of commands: the guest's
	CID    uint16
	Key    Key

	NSID   uint32 // Fetch, Publish
	SLBA   uint64 // Fetch, Publish: CDW10 and CDW11
	Blocks uint32 // Fetch, Publish: one-based, of commands that have NLB; Dataset Management: ranges; otherwise 0
	Rang   bool   // Publish: the MMIO doorbell was written for the batch

	Op     uint8  // Submit: what the medium is asked for, as package backend numbers it
	Medium uint16 // Submit: see type Medium
	Offset uint64 // Submit: byte on the medium, Medium.Base included
	Bytes  uint32 // Submit: not over 4 GiB-1; 0 if RealQID is not

	// Submit, Complete: where hostmed drives the device itself, the last of its commands that the request became. RealQID 0: there was none as yet,
	// or the kernel chooses.
	RealQID, RealCID uint16

	Status uint16 // Complete: the medium's; Post, Reap: the CQE's; without the phase bit
	CQID   uint16 // Post

	Consumed uint32 // Arm, ArmLost, Kick: the index of the next entry to be fetched
	Tail     uint32 // Arm, ArmLost: as loaded after the event index was stored
	Event    uint32 // Arm, ArmLost: the event index that was stored
	Value    uint32 // Kick: that was written
	CQ       bool   // Kick, Arm, ArmLost: the CQ's doorbell; Consumed and Tail are heads then
	Asleep   bool   // Kick: the queue was not being polled
	Timeout  int64  // Sleep: ns at the most; -1: until something happens
	Ready    uint32 // Wake of a thread: descriptors that were readable
}

// Words 1 of all kinds, and those that depend on it:
//
//	word 1           kind | opcode<<8 | CID<<16 | key<<32
//	                 word 2                    word 3
//	fetch, publish   SLBA                      NSID | blocks<<32 | rang<<63
//	submit           offset                    medium | op<<16 | real<<31 | (real: QID<<48 | CID<<32; otherwise bytes<<32)
//	complete         0                         status | QID<<48 | CID<<32
//	post             CQID                      status
//	reap             0                         status
//	arm, arm-lost    consumed | tail<<32       event | CQ<<32
//	kick             value | consumed<<32      CQ | asleep<<1
//	sleep            timeout                   0
//	wake             ready                     0
const (
	rangBit   = 1 << 63
	blockMask = 1<<31 - 1
	realBit   = 1 << 31
	cqBit     = 1
	armCQBit  = 1 << 32
	asleepBit = 2
)

func head(kind Kind, opcode uint8, cid uint16, key Key) uint64 {
	return uint64(kind) | uint64(opcode)<<8 | uint64(cid)<<16 | uint64(key)<<32
}

func pairOf(qid, cid uint16) uint64 { return uint64(qid)<<48 | uint64(cid)<<32 }

func bit(on bool, b uint64) uint64 {
	if on {
		return b
	}
	return 0
}

// words is r as the ring has it.
func (r *Record) words() (w [4]uint64) {
	w[0], w[1] = uint64(r.Time), head(r.Kind, r.Opcode, r.CID, r.Key)
	switch r.Kind {
	case Fetch, Publish:
		w[2], w[3] = r.SLBA, uint64(r.NSID)|uint64(r.Blocks&blockMask)<<32|bit(r.Rang, rangBit)
	case Submit:
		w[2], w[3] = r.Offset, uint64(r.Medium)|uint64(r.Op)<<16|uint64(r.Bytes)<<32
		if r.RealQID != 0 {
			w[3] = uint64(r.Medium) | uint64(r.Op)<<16 | realBit | pairOf(r.RealQID, r.RealCID)
		}
	case Complete:
		w[3] = uint64(r.Status) | pairOf(r.RealQID, r.RealCID)
	case Post:
		w[2], w[3] = uint64(r.CQID), uint64(r.Status)
	case Reap:
		w[3] = uint64(r.Status)
	case Arm, ArmLost:
		w[2], w[3] = uint64(r.Consumed)|uint64(r.Tail)<<32, uint64(r.Event)|bit(r.CQ, armCQBit)
	case Kick:
		w[2], w[3] = uint64(r.Value)|uint64(r.Consumed)<<32, bit(r.CQ, cqBit)|bit(r.Asleep, asleepBit)
	case Sleep:
		w[2] = uint64(r.Timeout)
	case Wake:
		w[2] = uint64(r.Ready)
	}
	return w
}

// set makes r what the ring has. Whatever that is, it is some Record.
func (r *Record) set(w *[4]uint64) {
	*r = Record{
		Time: int64(w[0]), Kind: Kind(w[1]), Opcode: uint8(w[1] >> 8), CID: uint16(w[1] >> 16), Key: Key(w[1] >> 32),
	}
	switch r.Kind {
	case Fetch, Publish:
		r.SLBA, r.NSID, r.Blocks, r.Rang = w[2], uint32(w[3]), uint32(w[3]>>32)&blockMask, w[3]&rangBit != 0
	case Submit:
		r.Offset, r.Medium, r.Op = w[2], uint16(w[3]), uint8(w[3]>>16)
		if w[3]&realBit != 0 {
			r.RealQID, r.RealCID = uint16(w[3]>>48), uint16(w[3]>>32)
		} else {
			r.Bytes = uint32(w[3] >> 32)
		}
	case Complete:
		r.Status, r.RealQID, r.RealCID = uint16(w[3]), uint16(w[3]>>48), uint16(w[3]>>32)
	case Post:
		r.CQID, r.Status = uint16(w[2]), uint16(w[3])
	case Reap:
		r.Status = uint16(w[3])
	case Arm, ArmLost:
		r.Consumed, r.Tail, r.Event, r.CQ = uint32(w[2]), uint32(w[2]>>32), uint32(w[3]), w[3]&armCQBit != 0
	case Kick:
		r.Value, r.Consumed, r.CQ, r.Asleep = uint32(w[2]), uint32(w[2]>>32), w[3]&cqBit != 0, w[3]&asleepBit != 0
	case Sleep:
		r.Timeout = int64(w[2])
	case Wake:
		r.Ready = uint32(w[2])
	}
}

// Blocks is Record.Blocks of a command.
func Blocks(opcode uint8, cdw10, cdw12 uint32) uint32 {
	switch opcode {
	case nvme.IORead, nvme.IOWrite, nvme.IOCompare, nvme.IOWriteZeroes, nvme.IOVerify, nvme.IOWriteUncorrectable:
		return cdw12&0xffff + 1
	case nvme.IODSM:
		return cdw10&0xff + 1
	}
	return 0
}

// saturate is n as a Record has room for it.
func saturate(n uint64) uint64 { return min(n, math.MaxUint32) }
