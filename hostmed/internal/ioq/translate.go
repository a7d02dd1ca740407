package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// sinkSize is how much memory the data that goes into bit buckets has.
const sinkSize = 64 << 10

// keepVec is the most pieces of guest memory that a request keeps room for: as many as PRPs of a 1 MiB transfer need.
const keepVec = 260

// data sets the range of a command that moves data, and translates its data pointer. toGuest says
// which way.
func (w *Worker) data(r *request, toGuest bool) nvme.Status {
	c, s := &r.cmd, r.sq
	if st := r.blocks(c.SLBA(), uint64(c.NLB().Count())); st != nvme.StatusSuccess {
		return st
	}
	page := uint64(s.pageSize)
	if off := c.PRP1 & (page - 1); off+r.Len <= page && off&3 == 0 && c.PSDT() == nvme.PSDTPRP && r.Len <= s.g.ctl.mdts {
		// One page: no list to walk.
		if seg, ok := s.g.ctl.mem.Table().Within(c.PRP1, r.Len, toGuest); ok {
			r.Vec = r.vec[:1]
			r.Vec[0] = seg
			return nvme.StatusSuccess
		}
	}
	return w.translate(r, toGuest)
}

// translate turns the command's data pointer into host memory, in r.Vec.
func (w *Worker) translate(r *request, toGuest bool) nvme.Status {
	ctl := r.sq.g.ctl
	if r.Len > ctl.mdts {
		return nvme.StatusInvalidField.WithDNR()
	}
	table := ctl.mem.Table()
	c := &r.cmd
	if c.PSDT() != nvme.PSDTPRP {
		return w.translateSGL(r, toGuest, table)
	}
	page := r.sq.pageSize
	ext, st := w.walker.Walk(c.PRP1, c.PRP2, uint32(r.Len), page, r.sq.maxPages, table, w.extents[:0])
	w.extents = ext[:0]
	if st != nvme.StatusSuccess {
		return st.WithDNR()
	}
	var ok bool
	if r.vec, ok = table.TranslateAll(r.vec[:0], ext, toGuest); !ok {
		return nvme.StatusDataTransferError.WithDNR()
	}
	r.Vec = r.vec
	return nvme.StatusSuccess
}

// translateSGL is translate for an SGL. There is no metadata, so MPTR is not looked at.
func (w *Worker) translateSGL(r *request, toGuest bool, table *gmem.Table) nvme.Status {
	ext, st := w.walker.WalkSGL(r.cmd.SGL1(), uint32(r.Len), toGuest, table, w.extents[:0])
	w.extents = ext[:0]
	if st != nvme.StatusSuccess {
		return st.WithDNR()
	}
	vec := r.vec[:0]
	for i := range ext {
		if ext[i].IOVA == prp.BitBucket {
			vec = w.drain(vec, uint64(ext[i].Len))
			continue
		}
		var ok bool
		if vec, ok = table.Translate(vec, ext[i].IOVA, ext[i].Len, toGuest); !ok {
			return nvme.StatusDataTransferError.WithDNR()
		}
	}
	r.vec = vec
	r.Vec = vec
	return nvme.StatusSuccess
}

// drain appends memory for n bytes that nobody wants.
func (w *Worker) drain(vec []backend.Seg, n uint64) []backend.Seg {
	if w.sink == nil {
		w.sink = shm.NewHeap(sinkSize)
	}
	for n > 0 {
		step := min(n, sinkSize)
		if b, err := w.sink.Bytes(0, step); err == nil { // it is as long as that
			vec = append(vec, backend.Seg{Base: &b[0], Len: step})
		}
		n -= step
	}
	return vec
}
