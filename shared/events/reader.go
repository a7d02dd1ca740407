package events

import (
	"bytes"
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// Reader is a reader's end of a ring. It belongs to one goroutine at a time.
//
// The producer is not trusted: whatever is in the ring, and whatever becomes of it meanwhile, Read returns records or an error, and not
// more than it was asked for.
type Reader struct {
	mem     *shm.Region
	words   []uint64 // of the records
	written *uint64
	mask    uint64
	keep    uint64 // how many of the last records are safe
	next    uint64
	lost    uint64
	info    Info
	batch   [256][4]uint64
}

// Map returns a Reader of the ring behind fd, which stays the caller's.
func Map(fd int) (*Reader, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("a ring of events: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < headerSize {
		return nil, errFormat("%d bytes long", st.Size)
	}
	mem, err := shm.Map(fd, 0, uint64(st.Size), false)
	if err != nil {
		return nil, fmt.Errorf("a ring of events: %w", err)
	}
	r, err := NewReader(mem)
	if err != nil {
		_ = mem.Close()
	}
	return r, err
}

// Open returns a Reader of the ring at path.
func Open(path string) (*Reader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("a ring of events: %w", err)
	}
	defer f.Close()
	r, err := Map(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// NewReader returns a Reader of the ring in mem, which Close closes. It begins with the oldest record that is there; what came before
// counts as lost. See Skip.
func NewReader(mem *shm.Region) (r *Reader, err error) {
	if fault := shm.Guard(func() { r, err = newReader(mem) }); fault != nil {
		return nil, fault
	}
	return r, err
}

func newReader(mem *shm.Region) (*Reader, error) {
	if mem.Len() < headerSize {
		return nil, errFormat("%d bytes long", mem.Len())
	}
	var h [writtenWord]uint64 // read once
	all := words(mem)
	for i := range h {
		h[i] = atomic.LoadUint64(&all[i])
	}
	low, high := func(i int) uint32 { return uint32(h[i]) }, func(i int) uint32 { return uint32(h[i] >> 32) }
	n, ahead := uint64(low(2)), uint64(high(2))
	switch {
	case h[0] != magic:
		return nil, errFormat("it begins with %#x", h[0])
	case low(1) != Version || high(1) != RecordSize:
		return nil, errFormat("it is of version %d, with records of %d bytes", low(1), high(1))
	case n < MinRecords || n > MaxRecords || bits.OnesCount64(n) != 1 || ahead == 0 || ahead > n/2:
		return nil, errFormat("it says that it holds %d records, %d ahead", n, ahead)
	case mem.Len() < headerSize+n*RecordSize:
		return nil, errFormat("%d bytes long, which is too short for %d records", mem.Len(), n)
	}
	var name [nameSize]byte
	for i := range name {
		name[i] = byte(h[(nameOffset+i)/8] >> (i % 8 * 8))
	}
	text, _, _ := bytes.Cut(name[:], []byte{0})
	return &Reader{
		mem: mem, words: all[headerSize/8:][:n*4], written: &all[writtenWord], mask: n - 1, keep: n - ahead,
		info: Info{Name: string(text), Number: low(3), Process: high(3), Thread: low(4), Began: int64(h[5]), Records: uint32(n)},
	}, nil
}

// Info returns what the ring said of itself when it was opened. Name may be any bytes.
func (r *Reader) Info() Info { return r.info }

// Lost returns how many records were overwritten before Read came to them.
func (r *Reader) Lost() uint64 { return r.lost }

// Close gives the memory back.
func (r *Reader) Close() error { return r.mem.Close() }

// Skip goes to what will be written next. What is skipped is not lost.
func (r *Reader) Skip() error {
	return shm.Guard(func() { r.next = max(r.next, atomic.LoadUint64(r.written)) })
}

// Read copies records, oldest first, and returns how many; it does not wait. An error is the producer's: ErrProducer, or a
// *shm.FaultError if it took the memory away. It stays.
func (r *Reader) Read(out []Record) (n int, err error) {
	fault := shm.Guard(func() {
		for n < len(out) && err == nil {
			var more bool
			k := 0
			if k, more, err = r.read(out[n:]); !more {
				n += k
				return
			}
			n += k
		}
	})
	if fault != nil {
		err = fault
	}
	return n, err
}

// read is Read of one batch; more says that there may be more.
func (r *Reader) read(out []Record) (n int, more bool, err error) {
	written := atomic.LoadUint64(r.written) // pairs with Writer.Flush
	if written < r.next {
		return 0, false, fmt.Errorf("%w: %d after %d", ErrProducer, written, r.next)
	}
	if written-r.next > r.keep {
		r.lose(written - r.keep - r.next)
	}
	batch := r.batch[:min(uint64(len(r.batch)), uint64(len(out)), written-r.next)]
	if len(batch) == 0 {
		return 0, false, nil
	}
	for i := range batch {
		at := ((r.next + uint64(i)) & r.mask) * 4
		from := r.words[at : at+4 : at+4]
		for j := range from {
			batch[i][j] = atomic.LoadUint64(&from[j])
		}
	}
	// What the producer may have begun to overwrite before this load is no record.
	now := atomic.LoadUint64(r.written)
	if now < written {
		return 0, false, fmt.Errorf("%w: %d after %d", ErrProducer, now, written)
	}
	if now-r.next > r.keep {
		gone := now - r.keep - r.next
		if gone >= uint64(len(batch)) {
			r.lose(gone)
			return 0, true, nil
		}
		r.lose(gone)
		batch = batch[gone:]
	}
	for i := range batch {
		out[i].set(&batch[i])
	}
	r.next += uint64(len(batch))
	return len(batch), true, nil
}

func (r *Reader) lose(n uint64) {
	r.next += n
	r.lost += n
}
