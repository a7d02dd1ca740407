package events

import "math"

// End is the time to read a Merge to when nothing is written any more.
const End = int64(math.MaxInt64)

// Merge yields the records of several rings by their times.
//
// A record is put into its ring a little after its time, so of rings that are still written to a Merge is in order only if it is read up to a time
// that lies back by more than that: what takes longest is a batch whose medium answers within the call. Settle is enough for all but that.
type Merge struct {
	readers []*Reader
	sources []source
}

// Settle is how far behind Now it is well to stay.
const Settle = int64(2e6) // 2 ms

// source is what was read of a ring and not yielded yet.
type source struct {
	buf  [512]Record
	i, n int
	err  error
}

// NewMerge returns a Merge of readers, which stay the caller's and are read by nobody else. Record.Source counts them from 0.
func NewMerge(readers ...*Reader) *Merge {
	return &Merge{readers: readers, sources: make([]source, len(readers))}
}

// Read copies records before the time until, in ns, and returns how many. It does not wait. An error is that of a ring whose records have all
// been yielded; the other rings go on, and the error comes again.
func (m *Merge) Read(out []Record, until int64) (n int, err error) {
	for n < len(out) {
		best := -1
		for i := range m.sources {
			s := &m.sources[i]
			if s.i == s.n && s.err == nil {
				s.i = 0
				s.n, s.err = m.readers[i].Read(s.buf[:])
			}
			if s.i == s.n {
				continue
			}
			if t := s.buf[s.i].Time; t < until && (best < 0 || t < m.sources[best].buf[m.sources[best].i].Time) {
				best = i
			}
		}
		if best < 0 {
			break
		}
		s := &m.sources[best]
		out[n] = s.buf[s.i]
		out[n].Source = best
		s.i++
		n++
	}
	for i := range m.sources {
		if s := &m.sources[i]; s.err != nil && s.i == s.n && n < len(out) {
			return n, s.err
		}
	}
	return n, nil
}

// Lost is the sum of what the rings have lost.
func (m *Merge) Lost() (n uint64) {
	for _, r := range m.readers {
		n += r.Lost()
	}
	return n
}
