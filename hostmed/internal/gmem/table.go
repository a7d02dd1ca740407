package gmem

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/prp"
)

// Table is a snapshot of a Memory. It does not change and is safe for concurrent use.
//
// The ranges are in chunks, by IOVA and not overlapping, so that the next snapshot shares all of them but one: behind a
// vIOMMU there are thousands of ranges, and each I/O of the guest maps and unmaps one.
type Table struct {
	chunks []chunk
	n      int     // ranges
	few    []Range // all of them, if they are few: most clients', which are looked up without a search
}

// maxFew is how many ranges few has at most.
const maxFew = 4

// chunk is a run of at least one range.
type chunk struct {
	end    uint64 // of the last
	ranges []Range
}

// maxChunk is how many ranges a chunk has at most; two that have half of it together become one.
const maxChunk = 64

// newTable returns a table of chunks, which have n ranges together.
func newTable(chunks []chunk, n int) *Table {
	t := &Table{chunks: chunks, n: n}
	if n <= maxFew && len(chunks) == 1 {
		t.few = chunks[0].ranges
	}
	return t
}

// find returns the reachable range that holds iova, or nil.
func (t *Table) find(iova uint64) *Range {
	for i := range t.few {
		if r := &t.few[i]; iova-r.IOVA < r.Size && r.mem != nil {
			return r
		}
	}
	return t.search(iova)
}

func (t *Table) search(iova uint64) *Range {
	if r := t.rangeAt(iova); r != nil && r.mem != nil {
		return r
	}
	return nil
}

// rangeAt returns the range that holds iova, or nil.
func (t *Table) rangeAt(iova uint64) *Range {
	i, j := t.seek(iova)
	if i == len(t.chunks) {
		return nil
	}
	if r := &t.chunks[i].ranges[j]; r.IOVA <= iova {
		return r
	}
	return nil
}

// seek returns the chunk, and the place in it, of the first range that ends above iova; len(chunks), 0 if there is none.
func (t *Table) seek(iova uint64) (i, j int) {
	n := len(t.chunks)
	for i < n {
		if h := int(uint(i+n) >> 1); t.chunks[h].end > iova {
			n = h
		} else {
			i = h + 1
		}
	}
	if i == len(t.chunks) {
		return i, 0
	}
	ranges := t.chunks[i].ranges
	for n = len(ranges); j < n; {
		if h := int(uint(j+n) >> 1); ranges[h].end() > iova {
			n = h
		} else {
			j = h + 1
		}
	}
	return i, j
}

// with returns a table that has r too, which overlaps none of t.
func (t *Table) with(r Range) *Table {
	i, j := t.seek(r.IOVA)
	if i == len(t.chunks) { // above all: the last chunk grows
		if i == 0 {
			return newTable([]chunk{newChunk([]Range{r})}, 1)
		}
		i--
		j = len(t.chunks[i].ranges)
	}
	old := t.chunks[i].ranges
	grown := make([]Range, 0, len(old)+1)
	grown = append(append(append(grown, old[:j]...), r), old[j:]...)
	chunks := append(make([]chunk, 0, len(t.chunks)+1), t.chunks[:i]...)
	if len(grown) > maxChunk {
		chunks = append(chunks, newChunk(grown[:maxChunk/2]), newChunk(grown[maxChunk/2:]))
	} else {
		chunks = append(chunks, newChunk(grown))
	}
	return newTable(append(chunks, t.chunks[i+1:]...), t.n+1)
}

func newChunk(ranges []Range) chunk { return chunk{ranges[len(ranges)-1].end(), ranges} }

// without returns a table that lacks the ranges inside [iova, last], and those; nil if there are none. One that is only
// partly inside is returned as split, and then nothing is.
func (t *Table) without(iova, last uint64) (n *Table, gone []Range, split *Range) {
	from, j := t.seek(iova)
	to := from // the first chunk that is not touched
	var keep []Range
	for ; to < len(t.chunks) && t.chunks[to].ranges[0].IOVA <= last; to++ {
		ranges := t.chunks[to].ranges
		if to == from {
			keep = append(keep, ranges[:j]...)
			ranges = ranges[j:]
		}
		for k := range ranges {
			switch r := &ranges[k]; {
			case r.IOVA > last:
				keep = append(keep, *r)
			case r.IOVA < iova || r.end()-1 > last:
				return nil, nil, r
			default:
				gone = append(gone, *r)
			}
		}
	}
	if len(gone) == 0 {
		return nil, nil, nil
	}
	chunks := append(make([]chunk, 0, len(t.chunks)+1), t.chunks[:from]...)
	if len(keep) > 0 && from > 0 && len(keep)+len(t.chunks[from-1].ranges) <= maxChunk/2 {
		keep = append(slices.Clone(t.chunks[from-1].ranges), keep...)
		chunks = chunks[:from-1]
	}
	for len(keep) > maxChunk {
		chunks = append(chunks, newChunk(keep[:maxChunk/2]))
		keep = keep[maxChunk/2:]
	}
	if len(keep) > 0 {
		chunks = append(chunks, newChunk(keep))
	}
	return newTable(append(chunks, t.chunks[to:]...), t.n-len(gone)), gone, nil
}

// Within returns the host memory of [iova, iova+n), which is not empty, if it lies in one range and may be written if it is to be.
func (t *Table) Within(iova, n uint64, write bool) (vec unix.Iovec, ok bool) {
	for i := range t.few { // find, without a call
		if r := &t.few[i]; iova-r.IOVA < r.Size && r.mem != nil {
			return r.within(iova, n, write)
		}
	}
	if r := t.search(iova); r != nil {
		return r.within(iova, n, write)
	}
	return vec, false
}

func (r *Range) within(iova, n uint64, write bool) (vec unix.Iovec, ok bool) {
	off := iova - r.IOVA
	if n > r.Size-off || write && !r.Writable {
		return vec, false
	}
	return unix.Iovec{Base: &r.mem[off], Len: n}, true
}

// Translate appends the host memory of [iova, iova+n) to vec: one element for each range that it
// crosses, joined with vec's last where they touch. It returns false, with vec as it
// was, if some of it is not mapped, or is to be written and may not be. It
// allocates only when vec has no room.
func (t *Table) Translate(vec []unix.Iovec, iova uint64, n uint32, write bool) ([]unix.Iovec, bool) {
	was, joined := len(vec), uint64(0) // what the last element had before it was joined
	if was > 0 {
		joined = vec[was-1].Len
	}
	for left := uint64(n); left > 0; {
		s := t.find(iova)
		if s == nil || write && !s.Writable {
			if was > 0 {
				vec[was-1].Len = joined
			}
			return vec[:was], false
		}
		step := min(left, s.end()-iova)
		vec = appendVec(vec, s.mem[iova-s.IOVA:], step)
		iova += step
		left -= step
	}
	return vec, true
}

// TranslateAll is Translate for the extents of a command.
func (t *Table) TranslateAll(vec []unix.Iovec, extents []prp.Extent, write bool) ([]unix.Iovec, bool) {
	ok := true
	var r *Range // of the extent before, where most lie too
	for i := range extents {
		e := &extents[i]
		if r == nil || e.IOVA-r.IOVA >= r.Size {
			r = t.find(e.IOVA)
		}
		if r != nil && uint64(e.Len) <= r.end()-e.IOVA && (r.Writable || !write) {
			vec = appendVec(vec, r.mem[e.IOVA-r.IOVA:], uint64(e.Len))
			continue
		}
		if vec, ok = t.Translate(vec, extents[i].IOVA, extents[i].Len, write); !ok {
			return vec, false
		}
	}
	return vec, true
}

// ReadIOVA copies guest memory to p; false if some of it is not mapped. The caller runs under shm.Guard.
func (t *Table) ReadIOVA(iova uint64, p []byte) bool {
	return t.each(iova, p, false, func(guest, p []byte) { copy(p, guest) })
}

// WriteIOVA copies p to guest memory; false, with nothing known of how much was
// written, if some of it is not mapped or is read-only. The caller runs under shm.Guard.
func (t *Table) WriteIOVA(iova uint64, p []byte) bool {
	return t.each(iova, p, true, func(guest, p []byte) { copy(guest, p) })
}

func (t *Table) each(iova uint64, p []byte, write bool, f func(guest, p []byte)) bool {
	for len(p) > 0 {
		s := t.find(iova)
		if s == nil || write && !s.Writable {
			return false
		}
		guest := s.mem[iova-s.IOVA:]
		n := min(len(guest), len(p))
		f(guest[:n], p[:n])
		p = p[n:]
		iova += uint64(n)
	}
	return true
}
