package guestdrv

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What a namespace is to the servers of package export, beside a plain block device: which optional commands it has, which blocks are
// in use, and memory for data that is not copied.

// WriteFUA is WriteAtContext with Force Unit Access: the data is durable when it returns.
func (ns *Namespace) WriteFUA(ctx context.Context, p []byte, off int64) (n int, err error) {
	if err := ns.check("write", off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	r := ns.request(nvme.IOWrite, off, int64(len(p)))
	r.data, r.flags = p, nvme.RWForceUnit
	return ns.c.run(ctx, ns, r)
}

// WriteZeroesDeallocate is WriteZeroes that also deallocates the blocks (DEAC), where CanDeallocate.
func (ns *Namespace) WriteZeroesDeallocate(ctx context.Context, off, length int64) error {
	if err := ns.offered("write zeroes", nvme.ONCSWriteZeroes); err != nil {
		return err
	}
	if err := ns.check("write zeroes", off, length); err != nil || length == 0 {
		return err
	}
	r := ns.request(nvme.IOWriteZeroes, off, length)
	if ns.CanDeallocate() {
		r.flags = nvme.RWDeallocate
	}
	return ns.simple(ctx, r)
}

// ReadOnly reports whether the namespace is write protected.
func (ns *Namespace) ReadOnly() bool { return ns.Identify().NSATTR&nvme.NSATTRWriteProtected != 0 }

// CanDiscard reports whether the controller has Dataset Management.
func (ns *Namespace) CanDiscard() bool { return ns.c.Identify().ONCS&nvme.ONCSDSM != 0 }

// CanWriteZeroes reports whether the controller has Write Zeroes.
func (ns *Namespace) CanWriteZeroes() bool { return ns.c.Identify().ONCS&nvme.ONCSWriteZeroes != 0 }

// CanDeallocate reports whether Write Zeroes can deallocate: DLFEAT bit 3, and blocks that then read as zeroes.
func (ns *Namespace) CanDeallocate() bool {
	return ns.CanWriteZeroes() && ns.ReadsZeroes() && ns.Identify().DLFEAT&nvme.DLFEATWZDealloc != 0
}

// ReadsZeroes reports whether deallocated blocks read as zeroes: DLFEAT says so.
func (ns *Namespace) ReadsZeroes() bool {
	return ns.Identify().DLFEAT&nvme.DLFEATReadMask == nvme.DLFEATReadZeroes
}

// HasCache reports whether the controller has a volatile write cache. Without one each write is durable when it ends.
func (ns *Namespace) HasCache() bool { return ns.c.Identify().VWC&nvme.VWCPresent != 0 }

// CanMap reports whether the controller tells which blocks are allocated: Get LBA Status (OACS bit 9). Whether it has the action for that
// is known after the first Extents.
func (ns *Namespace) CanMap() bool {
	return ns.c.Identify().OACS&nvme.OACSLBAStatus != 0 && !ns.unmapped.Load()
}

// DMAMemory is Controller.Alloc for who knows only the namespace: n bytes, and what gives them back.
func (ns *Namespace) DMAMemory(n int) (p []byte, free func(), err error) {
	b, err := ns.c.Alloc(n)
	if err != nil {
		return nil, nil, err
	}
	return b.Bytes(), b.Free, nil
}

// Extents calls each for the pieces of length bytes from off, in order and without gaps, until each returns false: blocks that are allocated,
// and blocks that are not. Of a controller that cannot tell everything is allocated.
func (ns *Namespace) Extents(ctx context.Context, off, length int64, each func(length int64, allocated bool) bool) error {
	if err := ns.check("extents", off, length); err != nil || length == 0 {
		return err
	}
	m := extentMap{ns: ns, at: uint64(off) >> ns.shift, end: uint64(off+length) >> ns.shift, each: each}
	for m.at < m.end && !m.stopped {
		if !ns.CanMap() {
			m.emit(m.end, true)
			break
		}
		if err := m.ask(ctx); err != nil {
			return err
		}
	}
	if !m.stopped && m.run > 0 {
		each(int64(m.run<<ns.shift), m.allocated)
	}
	return nil
}

// lbaStatusList is how many bytes of list one Get LBA Status asks for: 255 descriptors.
const lbaStatusList = 4096

// extentMap is an Extents under way. Pieces of one kind that meet are joined.
type extentMap struct {
	ns        *Namespace
	at, end   uint64 // blocks that are left
	each      func(int64, bool) bool
	run       uint64 // blocks, just before at, that each has not been told of
	allocated bool   // what they are
	stopped   bool
}

// emit moves on to block to.
func (m *extentMap) emit(to uint64, allocated bool) {
	n := to - m.at
	if n == 0 || m.stopped {
		return
	}
	if m.run > 0 && m.allocated != allocated {
		if m.stopped = !m.each(int64(m.run<<m.ns.shift), m.allocated); m.stopped {
			return
		}
		m.run = 0
	}
	m.at, m.run, m.allocated = to, m.run+n, allocated
}

// ask asks the controller once, and moves on as far as the answer goes. NVM Command Set 1.0c 4.2.1.
func (m *extentMap) ask(ctx context.Context) error {
	var cmd nvme.Command
	blocks := m.end - m.at
	if blocks > math.MaxUint16 {
		blocks = 0 // all up to the end
	}
	cmd.SetGetLBAStatus(m.ns.nsid, nvme.LBAStatusAllocated, m.at, uint16(blocks), lbaStatusList)
	var list [lbaStatusList]byte
	if _, err := m.ns.c.Admin(ctx, &cmd, list[:]); err != nil {
		switch nvme.StatusOf(err).Code() {
		case nvme.StatusInvalidField, nvme.StatusInvalidOpcode:
			// The command is there, this action of it is not: later than 1.0c.
			m.ns.unmapped.Store(true)
			return nil
		}
		return err
	}
	return m.take(list[:])
}

var errLBAStatus = errors.New("the answer to Get LBA Status is not in order")

// take goes through a list of descriptors, none of which is trusted.
func (m *extentMap) take(list []byte) error {
	n := min(int(binary.LittleEndian.Uint32(list)), (len(list)-nvme.LBAStatusHeaderSize)/nvme.LBAStatusSize)
	complete := list[4] == nvme.LBAStatusComplete
	begin := m.at
	for i := range n {
		d := list[nvme.LBAStatusHeaderSize+i*nvme.LBAStatusSize:]
		first, blocks := binary.LittleEndian.Uint64(d), uint64(binary.LittleEndian.Uint32(d[8:]))
		if first >= m.end {
			complete = true
			break
		}
		if first < m.at || blocks == 0 {
			return fmt.Errorf("namespace %d: descriptor %d: %d blocks from %d, after block %d: %w", m.ns.nsid, i, blocks, first, m.at, errLBAStatus)
		}
		m.emit(first, false)
		m.emit(first+min(blocks, m.end-first), true)
	}
	switch {
	case m.stopped:
	case complete:
		m.emit(m.end, false)
	case m.at == begin:
		return fmt.Errorf("namespace %d: no descriptor, and more are said to follow block %d: %w", m.ns.nsid, m.at, errLBAStatus)
	}
	return nil
}
