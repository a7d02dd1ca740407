package journal

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// Report is what Check found.
type Report struct {
	Records int      // acknowledged, all writers together
	Heads   int      // writers whose head was acknowledged
	Beyond  int      // whole records that are there and were not acknowledged
	Lost    []string // one line for each acknowledged thing that is not there, the first few
	Missing int      // how many those are
}

// maxLost is how many losses are described.
const maxLost = 10

func (r *Report) lose(format string, args ...any) {
	if r.Missing++; r.Missing <= maxLost {
		r.Lost = append(r.Lost, fmt.Sprintf(format, args...))
	}
}

// Check looks on a disk for everything that was acknowledged.
func Check(disk io.ReaderAt, l Layout, acks Acks) (Report, error) {
	var r Report
	p := make([]byte, RecordSize)
	for w := range l.Methods {
		last := -1
		if n, ok := acks.Records[w]; ok {
			last = n
		}
		for n := range l.Records {
			if _, err := disk.ReadAt(p, l.record(w, n)); err != nil {
				return r, fmt.Errorf("record %d of writer %d: %w", n, w, err)
			}
			if n > last && zero(p) {
				continue
			}
			whole := bytes.Equal(p, recordContent(&l, w, n))
			switch {
			case n <= last:
				r.Records++
				if !whole {
					r.lose("record %d of writer %d (%s), acknowledged up to %d: %s", n, w, l.Methods[w], last, l.describe(p, w, n))
				}
			case whole:
				r.Beyond++
			case n > last+2*batchSize:
				r.lose("record %d of writer %d (%s), which has not written further than %d: %s", n, w, l.Methods[w], last, l.describe(p, w, n))
			}
		}
		n, ok := acks.Heads[w]
		if !ok {
			continue
		}
		r.Heads++
		head := p[:headSize]
		if _, err := disk.ReadAt(head, l.head(w)); err != nil {
			return r, fmt.Errorf("head of writer %d: %w", w, err)
		}
		// A later one is as good, half of one is not: a logical block is written as a whole.
		has := binary.LittleEndian.Uint64(head)
		if has > uint64(l.Records) || !bytes.Equal(head, headContent(&l, w, int(has))) {
			r.lose("head of writer %d (%s), acknowledged up to %d: is none", w, l.Methods[w], n)
		} else if int(has) < n {
			r.lose("head of writer %d (%s), acknowledged up to %d: is that of %d", w, l.Methods[w], n, has)
		}
	}
	return r, nil
}

// describe says what is in the place of record n.
func (l *Layout) describe(p []byte, w, n int) string {
	if zero(p) {
		return "all zeroes"
	}
	want := recordContent(l, w, n)
	good := 0
	for off := 0; off < len(p); off += headSize {
		if bytes.Equal(p[off:off+headSize], want[off:off+headSize]) {
			good++
		}
	}
	return fmt.Sprintf("%d of %d blocks are its own", good, len(p)/headSize)
}

func zero(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }
