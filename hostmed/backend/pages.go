package backend

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// pageCache is the mapping of a file whose page cache is the file (tmpfs, ramfs), and which of
// its pages are known to be there. The knowledge is a hint: a page that is there after all is
// read by system call, and one that was taken away behind our back is allocated again,
// or faults, and the system call decides.
type pageCache struct {
	data  []byte // nil: it could not be mapped
	known pageSet
}

// pageSet has a bit for each page of a medium.
type pageSet []atomic.Uint64

const pageShift = 12 // of shm.PageSize

func newPageSet(size uint64) pageSet { return make(pageSet, (size>>pageShift)/64+1) }

func openPages(fd int, size uint64, readOnly bool) *pageCache {
	p := &pageCache{known: newPageSet(size)}
	prot := unix.PROT_READ
	if !readOnly {
		prot |= unix.PROT_WRITE
	}
	data, err := unix.Mmap(fd, 0, int(size), prot, unix.MAP_SHARED)
	if err != nil {
		return p // no address space: system calls will do
	}
	p.data = data
	for off := int64(0); off < int64(size); {
		from, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if err != nil {
			break // no more data, or a file system that cannot tell
		}
		to, err := unix.Seek(fd, from, unix.SEEK_HOLE)
		if err != nil || to <= from {
			break
		}
		p.set(uint64(from), uint64(to-from))
		off = to
	}
	return p
}

func (p *pageCache) close() error {
	if p.data == nil {
		return nil
	}
	data := p.data
	p.data = nil
	return unix.Munmap(data)
}

// has reports whether every page of the range is known to be there.
func (p *pageCache) has(off, n uint64) bool {
	return p.data != nil && n > 0 && p.known.has(off, n)
}

func (p *pageCache) set(off, n uint64)   { p.known.set(off, n) }
func (p *pageCache) clear(off, n uint64) { p.known.clear(off, n) }

// has reports whether every page of the range, which is not empty, is in the set.
func (p pageSet) has(off, n uint64) bool {
	for i, last := off>>pageShift, (off+n-1)>>pageShift; i <= last; {
		mask, next := pageMask(i, last)
		if p[i/64].Load()&mask != mask {
			return false
		}
		i = next
	}
	return true
}

func (p pageSet) set(off, n uint64) {
	for i, last := off>>pageShift, (off+n-1)>>pageShift; i <= last; {
		mask, next := pageMask(i, last)
		p[i/64].Or(mask)
		i = next
	}
}

func (p pageSet) clear(off, n uint64) {
	for i, last := off>>pageShift, (off+n-1)>>pageShift; i <= last; {
		mask, next := pageMask(i, last)
		p[i/64].And(^mask)
		i = next
	}
}

// clearWhole is clear for the pages that lie in the range as a whole.
func (p pageSet) clearWhole(off, n uint64) {
	first, end := (off+shm.PageSize-1)>>pageShift, (off+n)>>pageShift
	if first < end {
		p.clear(first<<pageShift, (end-first)<<pageShift)
	}
}

// run returns whether the page of byte off is in the set, and for how many bytes from off on, at most n, that is so.
func (p pageSet) run(off, n uint64) (in bool, run uint64) {
	bit := func(i uint64) bool { return p[i/64].Load()>>(i%64)&1 != 0 }
	i := off >> pageShift
	in = bit(i)
	for end := off + n; i<<pageShift < end; {
		if w := p[i/64].Load(); i%64 == 0 && (w == 0 && !in || w == ^uint64(0) && in) {
			i += 64
			continue
		}
		if bit(i) != in {
			return in, i<<pageShift - off
		}
		i++
	}
	return in, n
}

// pageMask returns the bits of pages i to last that lie in i's word, and the first page of the next.
func pageMask(i, last uint64) (mask, next uint64) {
	next = i/64*64 + 64
	mask = ^uint64(0) << (i % 64)
	if last < next-1 {
		mask &= ^uint64(0) >> (63 - last%64)
	}
	return mask, next
}

// pageQueue serves a file in memory: transfers at once, by the mapping or by system call, the rest as
// fileQueue does, since freeing many pages takes its time.
type pageQueue struct {
	*fileQueue
	vec []Seg
}

func (q *pageQueue) Submit(reqs, done []*Request) int {
	q.inflight += len(reqs)
	// As in mem; after a fault the system call finds out whose memory is gone.
	for i := 0; i < len(reqs); i++ {
		if err := shm.Guard(func() {
			for ; i < len(reqs); i++ {
				announce(q.b.pages.data, reqs[i+1:])
				q.start(reqs[i])
			}
		}); err != nil {
			q.call(reqs[i])
			q.ready.push(reqs[i])
		}
	}
	return q.collect(done)
}

func (q *pageQueue) start(r *Request) {
	p := q.b.pages
	switch r.Op {
	case OpRead, OpWrite:
		if r.Status = q.b.info.check(r); r.Status.OK() && r.Len > 0 {
			switch {
			case !p.has(r.Off, r.Len):
				q.call(r)
			case r.Op == OpRead:
				scatter(r.Vec, p.data[r.Off:r.Off+r.Len])
			default:
				gather(p.data[r.Off:r.Off+r.Len], r.Vec)
			}
		}
		q.ready.push(r)
	case OpWriteZeroes, OpDiscard:
		if q.b.info.check(r).OK() && r.Len > 0 {
			p.clear(r.Off, r.Len)
		}
		q.begin(r)
	default:
		q.begin(r)
	}
}

// call transfers by system call, all of it.
func (q *pageQueue) call(r *Request) {
	vec := r.Vec
	for moved := uint64(0); moved < r.Len; {
		var n int
		var e unix.Errno
		if r.Op == OpRead {
			n, e = preadv(q.b.fd, vec[:min(len(vec), maxVec)], r.Off+moved)
		} else {
			n, e = pwritev(q.b.fd, vec[:min(len(vec), maxVec)], r.Off+moved)
		}
		switch {
		case e == unix.EINTR:
			continue
		case e == 0 && n == 0:
			e = unix.EIO // the file has become shorter
		}
		if e != 0 {
			r.Status = statusOf(r.Op, e)
			return
		}
		if moved += uint64(n); moved < r.Len {
			q.vec = rest(q.vec[:0], r.Vec, moved)
			vec = q.vec
		}
	}
	if r.Op == OpWrite {
		q.b.pages.set(r.Off, r.Len)
	}
	r.Status = nvme.StatusSuccess
}
