package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Commands that the medium does itself, as backend.OpCommand; the comment of backend.Opcodes says what each looks like. What the medium
// is too small for is done as if it did not know the command.

// firstVendor is the first vendor specific opcode.
const firstVendor = 0x80

// tooLarge, in place of a status, says that the medium does not take so much at once. No status has this value.
const tooLarge = nvme.Status(0xfffe)

// copySources is the guest's list of a Copy.
type copySources [ctrl.MaxCopyRanges]nvme.CopyRange

// nativeOf is the part of o that native has rules for.
func nativeOf(o backend.Opcodes) backend.Opcodes {
	known := backend.Opcodes{}.With(nvme.IOWriteUncorrectable, nvme.IOCompare, nvme.IODSM, nvme.IOVerify, nvme.IOCopy)
	return backend.Opcodes{o[0] & known[0], o[1] & known[1], o[2], o[3]}
}

// class is how r stands to its namespace's gate: what a vendor specific command does nobody knows.
func class(r *request) subsys.Class {
	if op := r.cmd.Opcode; op >= firstVendor && r.ns.native.Has(op) {
		return subsys.Writes
	}
	return subsys.ClassOf(r.cmd.Opcode)
}

// over says that n is more than limit, if that is one.
func over[T uint32 | uint64](n, limit T) bool { return limit != 0 && n > limit }

// native makes r an OpCommand, or returns tooLarge.
func (w *Worker) native(r *request) (st nvme.Status) {
	c, most := &r.cmd, &r.ns.info.NativeMax
	r.Op, r.DW0 = backend.OpCommand, 0
	n := uint64(c.NLB().Count()) << r.ns.info.LBAShift
	switch c.Opcode {
	case nvme.IOCompare:
		if over(n, most.Compare) {
			return tooLarge
		}
		st = w.data(r, false)
	case nvme.IOVerify:
		if over(n, most.Verify) {
			return tooLarge
		}
		if st = r.blocks(c.SLBA(), uint64(c.NLB().Count())); st == nvme.StatusSuccess && r.Len > ctrl.MaxVerify {
			st = nvme.StatusInvalidField.WithDNR()
		}
	case nvme.IOWriteUncorrectable:
		if over(n, most.WriteUncorrectable) {
			return tooLarge
		}
		st = r.blocks(c.SLBA(), uint64(c.NLB().Count()))
	case nvme.IODSM:
		st = w.nativeDSM(r)
	case nvme.IOCopy:
		st = w.nativeCopy(r)
	default:
		st = w.vendor(r)
	}
	r.pos, r.end = 0, r.Len
	r.step = native
	return st
}

// nativeDSM checks the ranges of a Dataset Management command, which the medium gets all at once, with its attributes and theirs.
func (w *Worker) nativeDSM(r *request) nvme.Status {
	most := &r.ns.info.NativeMax
	n := int(r.cmd.DSMRanges().Count())
	if over(uint32(n), most.DSMRanges) {
		return tooLarge
	}
	d, st := w.dsmRanges(r, n)
	if st != nvme.StatusSuccess {
		return st
	}
	all := uint64(0)
	for i := range d.list[:n] {
		x := &d.list[i]
		if over(x.Length, most.DSMRange) {
			return tooLarge
		}
		if x.Length == 0 {
			x.SLBA = 0 // which was not checked
		}
		all += uint64(x.Length)
	}
	copy(d.handed[:], d.list[:n])
	if over(all, most.DSM) {
		return tooLarge
	}
	r.Off, r.Len = d.list[0].SLBA<<r.ns.info.LBAShift, 0
	r.vec = append(r.vec[:0], segOf(d.handed[:n]))
	r.Vec = r.vec
	return nvme.StatusSuccess
}

// nativeCopy checks the ranges of a Copy. What reads of them fail of is looked at before it begins.
func (w *Worker) nativeCopy(r *request) nvme.Status {
	l := r.ranges(0)
	if l.sources == nil {
		l.sources = new(copySources)
	}
	info := &r.ns.info
	n, all, st := w.copyRanges(r, l.sources)
	if st != nvme.StatusSuccess {
		return st
	}
	most := &info.NativeMax
	if over(uint32(n), most.CopyRanges) || over(all, most.Copy) {
		return tooLarge
	}
	for i := range l.sources[:n] {
		blocks := l.sources[i].NLB.Count()
		if over(blocks, most.CopyRange) {
			return tooLarge
		}
		if st := r.readable(l.sources[i].SLBA, uint64(blocks)); st != nvme.StatusSuccess {
			r.DW0 = uint32(i)
			return st
		}
	}
	w.owes(r, uint64(all)<<info.LBAShift)
	r.FUA = r.cmd.FUA() || r.sq.g.ctl.through.Load()
	r.vec = append(r.vec[:0], segOf(l.sources[:n]))
	r.Vec = r.vec
	return nvme.StatusSuccess
}

// vendor takes a vendor specific command in the form that NVMe Base 2.0c 3.3.3.1 has for them.
func (w *Worker) vendor(r *request) nvme.Status {
	const toMedium, fromMedium = 1, 2
	r.Off, r.Len = 0, uint64(r.cmd.CDW10)*4
	switch way := r.cmd.Opcode & 3; {
	case way == toMedium|fromMedium:
		return nvme.StatusInvalidOpcode.WithDNR()
	case r.cmd.CDW11 != 0: // metadata
		return nvme.StatusInvalidField.WithDNR()
	case way == 0:
		r.Len = 0
	case r.Len > 0:
		return w.translate(r, way == fromMedium)
	}
	return nvme.StatusSuccess
}

// nativeDone takes the marks off what r has written.
func (r *request) nativeDone() {
	switch r.cmd.Opcode {
	case nvme.IOCopy:
		r.unmark()
	case nvme.IODSM:
		if r.cmd.CDW11&nvme.DSMDeallocate != 0 {
			for r.nextRange() {
				r.unmark()
			}
		}
	}
}
