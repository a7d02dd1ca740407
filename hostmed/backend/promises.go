package backend

import "github.com/shadowbell/shadowbell/shared/nvme"

// What an NVMe device promises of a namespace, as far as it holds for a slice of it and for commands that hostmed may cut up. NVM Command
// Set 1.0c 2.1.4 (atomic writes), 4.1.5.1 and 5.8.2 (what is preferred).

// maxAtomic is the largest write in bytes that is kept whole whatever memory its data is in: data that cannot be described to the device goes
// through buffers, none of which is smaller.
const maxAtomic = 64 << 10

// atomicUnits returns how many blocks a device writes as a whole, as others see it that read or write beside it, and when power fails; both are powers
// of two. They hold for what lies within a multiple of them, counted from block first of the namespace: hostmed cuts longer commands there and nowhere else, and
// neither a write nor a read of a unit is two commands. most is how many blocks one command can have.
//
// So the boundaries of the device's own (NABSN, NABSPF, NABO) have to be at such multiples too: units are as much smaller as it takes, down to one block.
func atomicUnits(ctrl *nvme.IdentifyController, ns *nvme.IdentifyNamespace, first, most uint64) (write, powerFail uint32) {
	normal, fail := ctrl.AWUN, ctrl.AWUPF
	if ns.NSFEAT&nvme.NSFEATAtomics != 0 {
		if ns.NAWUN != 0 { // 0: as the controller's
			normal = ns.NAWUN
		}
		if ns.NAWUPF != 0 {
			fail = ns.NAWUPF
		}
	}
	fit := func(blocks, boundary nvme.ZeroBased16) uint32 {
		n := uint64(1)
		for n*2 <= min(uint64(blocks.Count()), most) {
			n *= 2
		}
		if boundary != 0 { // 0: none
			for uint64(boundary.Count())%n != 0 || (uint64(ns.NABO)-first)%n != 0 { // n divides 2^64
				n /= 2
			}
		}
		return uint32(n)
	}
	write = fit(normal, ns.NABSN)
	return write, min(fit(fail, ns.NABSPF), write)
}

// promise fills in what the device says of writes and discards, for a slice that begins at its block first and of which one command can have most blocks.
// LBAShift and ReadOnly are set. A unit that the slice does not begin at a multiple of is left out.
func (i *Info) promise(ctrl *nvme.IdentifyController, ns *nvme.IdentifyNamespace, first, most uint64, discards, zeroes bool) {
	unit := func(n uint64) uint32 {
		if n == 0 || first%n != 0 {
			return 0
		}
		return uint32(n)
	}
	both := func(granularity, alignment nvme.ZeroBased16) uint64 {
		a, b := uint64(granularity.Count()), uint64(alignment.Count())
		if m := max(a, b); m%min(a, b) == 0 {
			return m
		}
		return 0
	}
	i.AtomicWrite, i.AtomicPowerFail = atomicUnits(ctrl, ns, first, min(most, maxAtomic>>i.LBAShift))
	writes := !i.ReadOnly
	i.VolatileCache = writes && ctrl.VWC&nvme.VWCPresent != 0
	i.Discard = writes && discards
	i.DiscardZeroes = i.Discard && ns.DLFEAT&nvme.DLFEATReadMask == nvme.DLFEATReadZeroes
	i.WriteZeroes = writes && zeroes
	i.ZeroesStay = ns.DLFEAT&nvme.DLFEATWZDealloc == 0
	i.WriteBlocks, i.OptimalWrite, i.OptimalBlocks = 1, 0, 0
	if i.Discard {
		i.OptimalBlocks = 1
	}
	if ns.NSFEAT&nvme.NSFEATOptPerf != 0 {
		i.WriteBlocks = max(unit(both(ns.NPWG, ns.NPWA)), 1)
		i.OptimalWrite = unit(uint64(ns.NOWS.Count()))
		if i.Discard {
			i.OptimalBlocks = max(unit(both(ns.NPDG, ns.NPDA)), 1)
		}
	}
	i.Boundary = unit(uint64(ns.NOIOB))
}

// whole returns how many of the n bytes of a longer command at byte off of the medium one command may have, so that no unit is cut: 0 if that is less than
// the first.
func (i *Info) whole(off, n uint64) uint64 {
	unit := uint64(max(i.AtomicWrite, 1)) << i.LBAShift
	return max((off+n)&^(unit-1), off) - off
}

// unitAt returns how many bytes there are from byte off of the medium to the end of the unit that it is in.
func (i *Info) unitAt(off uint64) uint64 {
	unit := uint64(max(i.AtomicWrite, 1)) << i.LBAShift
	return unit - off&(unit-1)
}
