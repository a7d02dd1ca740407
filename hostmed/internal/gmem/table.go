package gmem

import (
	"fmt"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Table is a snapshot of a Memory. It does not change and is safe for concurrent use.
type Table struct {
	ranges []Range // by IOVA, not overlapping
	spans  []span  // the same, as the hot path needs them
}

// span is a reachable Range with its host address.
type span struct {
	iova, end uint64
	mem       []byte
	writable  bool
}

func newTable(ranges []Range) *Table {
	t := &Table{ranges: ranges, spans: make([]span, 0, len(ranges))}
	for i := range ranges {
		r := &ranges[i]
		if r.Mem == nil {
			continue
		}
		b, err := r.Mem.Bytes(0, r.Size)
		if err != nil {
			continue // cannot be: Mem is a view of Size bytes
		}
		t.spans = append(t.spans, span{r.IOVA, r.end(), b, r.Writable})
	}
	return t
}

// find returns the span that holds iova, or nil.
func (t *Table) find(iova uint64) *span {
	if len(t.spans) <= 4 {
		for i := range t.spans {
			if s := &t.spans[i]; iova-s.iova < s.end-s.iova {
				return s
			}
		}
		return nil
	}
	i := sort.Search(len(t.spans), func(i int) bool { return t.spans[i].end > iova })
	if i < len(t.spans) && t.spans[i].iova <= iova {
		return &t.spans[i]
	}
	return nil
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
		if s == nil || write && !s.writable {
			if was > 0 {
				vec[was-1].Len = joined
			}
			return vec[:was], false
		}
		step := min(left, s.end-iova)
		vec = appendVec(vec, s.mem[iova-s.iova:], step)
		iova += step
		left -= step
	}
	return vec, true
}

// TranslateAll is Translate for the extents of a command.
func (t *Table) TranslateAll(vec []unix.Iovec, extents []prp.Extent, write bool) ([]unix.Iovec, bool) {
	ok := true
	for i := range extents {
		if vec, ok = t.Translate(vec, extents[i].IOVA, extents[i].Len, write); !ok {
			return vec, false
		}
	}
	return vec, true
}

// View returns [iova, iova+n) if it lies in one writable range.
func (t *Table) View(iova, n uint64) (*shm.Region, error) {
	for i := range t.ranges {
		r := &t.ranges[i]
		if iova < r.IOVA || iova >= r.end() {
			continue
		}
		if r.Mem == nil {
			return nil, fmt.Errorf("guest memory at %#x came without a file descriptor and cannot be shared", iova)
		}
		if !r.Writable {
			return nil, fmt.Errorf("guest memory at %#x is read-only", iova)
		}
		return r.Mem.View(iova-r.IOVA, n)
	}
	return nil, fmt.Errorf("guest address %#x is not mapped", iova)
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
		if s == nil || write && !s.writable {
			return false
		}
		guest := s.mem[iova-s.iova:]
		n := min(len(guest), len(p))
		f(guest[:n], p[:n])
		p = p[n:]
		iova += uint64(n)
	}
	return true
}
