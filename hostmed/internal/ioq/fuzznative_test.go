package ioq

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// strict is a medium that does all commands itself, and holds its caller to what backend.Opcodes promises.
type strict struct {
	backend.Backend
	info backend.Info

	mu    sync.Mutex
	wrong error // the first broken promise
}

func (s *strict) Info() backend.Info { return s.info }

func (s *strict) NewQueue() (backend.Queue, error) {
	q, err := s.Backend.NewQueue()
	return &strictQueue{q, s}, err
}

type strictQueue struct {
	backend.Queue
	s *strict
}

func (q *strictQueue) Submit(reqs, done []*backend.Request) int {
	for _, r := range reqs {
		if err := q.s.check(r); err != nil {
			q.s.mu.Lock()
			q.s.wrong = errors.Join(q.s.wrong, fmt.Errorf("%v, command %+v: %w", r.Op, r.Cmd, err))
			q.s.mu.Unlock()
		}
	}
	n := 0
	for i, r := range reqs {
		if r.Op == backend.OpCommand {
			r.Status, r.DW0 = nvme.StatusSuccess, 0
			done[n] = r
			n++
		} else {
			n += q.Queue.Submit(reqs[i:i+1], done[n:])
		}
	}
	return n
}

func (s *strict) check(r *backend.Request) error {
	i := &s.info
	mem := uint64(0)
	for _, v := range r.Vec {
		mem += v.Len
	}
	has := func(lba, n uint64) bool { return lba <= i.Blocks && n <= i.Blocks-lba }
	inside := func() error {
		if (r.Off|r.Len)&(i.LBASize()-1) != 0 || !has(r.Off>>i.LBAShift, r.Len>>i.LBAShift) {
			return fmt.Errorf("%d bytes at %d of %d", r.Len, r.Off, i.Size())
		}
		return nil
	}
	switch r.Op {
	case backend.OpFlush:
		return nil
	case backend.OpRead, backend.OpWrite:
		if mem != r.Len {
			return fmt.Errorf("%d bytes of memory for %d", mem, r.Len)
		}
		return inside()
	case backend.OpWriteZeroes, backend.OpDiscard:
		return inside()
	}
	c := r.Cmd
	if !i.Native.Has(c.Opcode) || c.FUSE() != 0 {
		return errors.New("it is none of Native")
	}
	switch c.Opcode {
	case nvme.IODSM:
		n := uint64(c.DSMRanges().Count())
		if len(r.Vec) != 1 || mem != n*nvme.DSMRangeSize {
			return fmt.Errorf("%d ranges in %d bytes", n, mem)
		}
		all := uint64(0)
		for b := bytesOf(r.Vec[0]); len(b) > 0; b = b[nvme.DSMRangeSize:] {
			lba, blocks := binary.LittleEndian.Uint64(b[8:]), uint64(binary.LittleEndian.Uint32(b[4:]))
			if all += blocks; !has(lba, blocks) || blocks > uint64(i.NativeMax.DSMRange) {
				return fmt.Errorf("a range of %d blocks at %d", blocks, lba)
			}
		}
		if n > uint64(i.NativeMax.DSMRanges) || all > i.NativeMax.DSM {
			return fmt.Errorf("%d ranges of %d blocks", n, all)
		}
		return nil
	case nvme.IOCopy:
		n, all := uint64(c.CopyRanges().Count()), uint64(0)
		if len(r.Vec) != 1 || mem != n*nvme.CopyRangeSize || c.CopyFormat() != 0 {
			return fmt.Errorf("%d sources in %d bytes, format %d", n, mem, c.CopyFormat())
		}
		for b := bytesOf(r.Vec[0]); len(b) > 0; b = b[nvme.CopyRangeSize:] {
			lba, blocks := binary.LittleEndian.Uint64(b[8:]), uint64(binary.LittleEndian.Uint16(b[16:]))+1
			if all += blocks; !has(lba, blocks) || blocks > uint64(i.NativeMax.CopyRange) {
				return fmt.Errorf("a source of %d blocks at %d", blocks, lba)
			}
		}
		if n > uint64(i.NativeMax.CopyRanges) || all > uint64(i.NativeMax.Copy) || all<<i.LBAShift != r.Len || c.SLBA()<<i.LBAShift != r.Off {
			return fmt.Errorf("%d sources of %d blocks, to %d bytes at %d", n, all, r.Len, r.Off)
		}
		return inside()
	case nvme.IOCompare:
		if mem != r.Len || r.Len > i.NativeMax.Compare {
			return fmt.Errorf("%d bytes of memory for %d", mem, r.Len)
		}
	case nvme.IOVerify, nvme.IOWriteUncorrectable:
		if mem != 0 || r.Len > i.NativeMax.Verify && c.Opcode == nvme.IOVerify || r.Len > i.NativeMax.WriteUncorrectable && c.Opcode == nvme.IOWriteUncorrectable {
			return fmt.Errorf("%d bytes of memory, for %d", mem, r.Len)
		}
	}
	if c.SLBA()<<i.LBAShift != r.Off || uint64(c.NLB().Count())<<i.LBAShift != r.Len {
		return fmt.Errorf("the command's blocks are not those of %d bytes at %d", r.Len, r.Off)
	}
	return inside()
}

// FuzzNative runs arbitrary SQEs on a medium that does commands itself, while somebody of the guest's changes what their pointers point to: nothing that
// the medium is asked for is outside of the namespace, or larger than it takes.
func FuzzNative(f *testing.F) {
	add := func(c nvme.Command, list ...byte) { f.Add(c.Bytes()[:], list) }
	le := binary.LittleEndian
	dsm := func(lba uint64, n uint32) (b []byte) {
		return le.AppendUint64(le.AppendUint32(make([]byte, 4), n), lba)
	}
	source := func(lba uint64, nlb uint16) []byte {
		return append(le.AppendUint16(le.AppendUint64(make([]byte, 8), lba), nlb), make([]byte, 14)...)
	}
	ranges := nvme.Command{Opcode: nvme.IODSM, NSID: 1, PRP1: base + dataOff, CDW10: 1, CDW11: nvme.DSMDeallocate}
	add(ranges, append(dsm(32767, 1), dsm(0, 8)...)...)
	add(ranges, append(dsm(1<<64-1, 2), dsm(32767, 2)...)...)
	for format := range uint32(5) {
		copies := nvme.Command{Opcode: nvme.IOCopy, NSID: 1, PRP1: base + dataOff, CDW10: 32766, CDW12: format<<8 | 1}
		add(copies, append(source(32767, 0), source(5, 0)...)...)
		add(copies, append(source(1<<64-8, 7), source(32767, 1)...)...)
	}
	for _, op := range []uint8{nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable, nvme.IORead, nvme.IOWrite, nvme.IOWriteZeroes, 0x79, 0x7d, 0x12, 0x1d, 0x80, 0xff} {
		add(rw(op, 32767, 1, base+dataOff))
		add(rw(op, 1<<64-1, 2, base+dataOff))
		c := rw(op, 32767, 1, base+dataOff)
		c.Flags, c.CDW2, c.CDW3, c.MPTR, c.CDW13, c.CDW14, c.CDW15 = 0xfc, 1, 1, base, ^uint32(0), ^uint32(0), ^uint32(0)
		c.CDW12 |= 0xffff0000
		add(c)
		c.NSID = nvme.NSIDAll
		add(c)
	}
	m := openBackend(f, "mem:size=16MiB")
	s := &strict{Backend: m, info: m.Info()}
	s.info.Native = s.info.Native.With(nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable, nvme.IODSM, nvme.IOCopy)
	s.info.NativeMax = backend.CommandLimits{Compare: 64 << 10, Verify: 1 << 20, WriteUncorrectable: 1 << 20, DSMRanges: 200, DSMRange: 20000, DSM: 30000, CopyRanges: 50, CopyRange: 100, Copy: 120}
	r := newRig(f, rigConfig{shadow: true, backend: s})
	p := r.pair(1, 16, false)
	lists := r.view(dataOff, 4096)
	stop, stopped := make(chan struct{}), make(chan struct{})
	f.Cleanup(func() {
		close(stop)
		<-stopped
	})
	go func() { // changes the block numbers in lists, there and back
		defer close(stopped)
		for bit := uint64(1); ; bit = bit<<1 | bit>>63 {
			select {
			case <-stop:
				return
			default:
			}
			for at := uint64(8); at < 64; at += 8 {
				if w, err := lists.Word64(at); err == nil {
					was := w.Load()
					w.CompareAndSwap(was, was^bit)
					w.CompareAndSwap(was^bit, was)
				}
			}
		}
	}()
	f.Fuzz(func(t *testing.T, raw, list []byte) {
		p.r.t = t
		var c nvme.Command
		copy(c.Bytes()[:], raw)
		if c.NSID != nvme.NSIDAll {
			c.NSID = 1
		}
		for _, prp := range []*uint64{&c.PRP1, &c.PRP2} { // what overwrites the rings is the guest's own affair
			if *prp-base < dataOff {
				*prp += dataOff
			}
		}
		r.put(dataOff, list[:min(len(list), 4096)])
		p.push(c)
		n := 1
		if c.FUSE() == nvme.FuseFirst { // it may wait for what comes next
			p.push(nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
			n = 2
		}
		p.publish()
		p.reap(n)
		r.noError()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.wrong != nil {
			t.Fatal(s.wrong)
		}
	})
}
