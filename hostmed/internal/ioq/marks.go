package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What reads fail of by themselves: blocks that Write Uncorrectable has marked, and, where the host asks for it, blocks that are not allocated.
//
// Blocks that Write Uncorrectable has marked cannot be read until they are written, zeroed, deallocated or copied to. Which they are is in the
// namespace's gate, which is nil while there are none.

// mark is Write Uncorrectable, NVM Command Set 1.0c 3.2.7. A write to the same blocks that is under way at the same time may
// come before it or after it.
func (r *request) mark() nvme.Status {
	r.Op, r.step = backend.OpWrite, noStep
	first, n := r.cmd.SLBA(), uint64(r.cmd.NLB().Count())
	if st := r.blocks(first, n); st != nvme.StatusSuccess || r.ns.info.ReadOnly {
		return st
	}
	if !r.ns.of.Mark(first, n) {
		return nvme.StatusInternalError
	}
	return nvme.StatusSuccess
}

// meets is for a command that would begin now: one that reads marked blocks fails, one that writes ends with unmark.
func (r *request) meets(gate *subsys.Gate) nvme.Status {
	switch r.cmd.Opcode {
	case nvme.IORead, nvme.IOCompare, nvme.IOVerify:
		if gate.Marked(r.cmd.SLBA(), uint64(r.cmd.NLB().Count())) {
			return nvme.StatusUnrecoveredRead
		}
	case nvme.IOWrite, nvme.IOWriteZeroes:
		r.step = marked
	}
	return nvme.StatusSuccess
}

// unmark is called when the range that r has was written.
func (r *request) unmark() {
	if r.Len == 0 {
		return
	}
	shift := r.ns.info.LBAShift
	if gate := r.ns.of.Gate(); gate != nil && gate.Marked(r.Off>>shift, r.Len>>shift) {
		r.ns.of.Unmark(r.Off>>shift, r.Len>>shift)
	}
}

// heedDULBE is for a command that would begin now, to a namespace with DULBE: one that reads blocks that are not allocated fails, and zeroes
// that are not to deallocate are written. NVM Command Set 1.0c 4.1.3.2.
func (r *request) heedDULBE() nvme.Status {
	switch r.cmd.Opcode {
	case nvme.IORead, nvme.IOCompare, nvme.IOVerify:
		return r.ns.allocated(r.cmd.SLBA(), uint64(r.cmd.NLB().Count()))
	case nvme.IOWriteZeroes:
		r.Keep = !r.Dealloc
	}
	return nvme.StatusSuccess
}

// allocated says whether n blocks from first are: success if all of them.
func (n *namespace) allocated(first, count uint64) nvme.Status {
	for count > 0 {
		yes, run, err := backend.AllocatedBlocks(n.mapper, &n.info, first, count)
		switch {
		case err != nil:
			return nvme.StatusInternalError
		case !yes:
			return nvme.StatusDeallocated
		}
		first += run
		count -= run
	}
	return nvme.StatusSuccess
}
