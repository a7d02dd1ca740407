package events

import (
	"errors"
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// Config says what a ring is.
type Config struct {
	Name    string // of the producer, at most 64 bytes
	Number  uint32 // of the producer
	Thread  uint32 // its tid; 0: it is not one thread
	Records uint32 // how many the ring holds; rounded up to a power of two within MinRecords and MaxRecords. 0: DefaultRecords
	Heap    bool   // on the heap, for tests: there is no descriptor
}

// Writer is the producer's end of a ring. It belongs to one goroutine at a time; see Shared.
type Writer struct {
	words   []uint64 // of the records
	written *uint64
	mask    uint64
	next    uint64 // position of the next record
	shown   uint64 // what written says
	mem     *shm.Region
}

func (c *Config) records() uint64 {
	n := c.Records
	if n == 0 {
		n = DefaultRecords
	}
	n = min(max(n, MinRecords), MaxRecords)
	return 1 << bits.Len32(n-1)
}

// Bytes is the size of the ring that c describes.
func (c Config) Bytes() uint64 { return headerSize + c.records()*RecordSize }

// New makes a ring in a memfd. Whoever is given the descriptor can map it for reading and not for writing.
func New(c Config) (*Writer, error) {
	var mem *shm.Region
	var err error
	if c.Heap {
		mem = shm.NewHeap(int(c.Bytes()))
	} else if mem, err = shm.NewMemfdForReaders("shadowbell-events", c.Bytes()); err != nil {
		return nil, fmt.Errorf("a ring of events: %w", err)
	}
	return c.over(mem), nil
}

// Create makes a ring in a new file at path, whose space is taken at once. An existing file is an error.
func Create(path string, c Config) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, fmt.Errorf("a ring of events: %w", err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(c.Bytes())); err != nil {
		return nil, errors.Join(fmt.Errorf("a ring of events: %d bytes in %s: %w", c.Bytes(), path, err), os.Remove(path))
	}
	mem, err := shm.Map(int(f.Fd()), 0, c.Bytes(), true)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("a ring of events: %s: %w", path, err), os.Remove(path))
	}
	return c.over(mem), nil
}

func (c *Config) over(mem *shm.Region) *Writer {
	all := words(mem)
	n := c.records()
	pair := func(low, high uint32) uint64 { return uint64(low) | uint64(high)<<32 }
	all[1] = pair(Version, RecordSize)
	all[2] = pair(uint32(n), Ahead)
	all[3] = pair(c.Number, thisProcess())
	all[4] = uint64(c.Thread)
	all[5] = uint64(Now())
	var name [nameSize]byte
	copy(name[:], c.Name)
	_ = mem.Write(nameOffset, name[:]) // a page is as long as that
	store(&all[writtenWord], 0)
	store(&all[0], magic)
	return &Writer{words: all[headerSize/8:][:n*4], written: &all[writtenWord], mask: n - 1, mem: mem}
}

// FD is the descriptor of a ring that New made, or -1. It stays the Writer's.
func (w *Writer) FD() int { return w.mem.FD() }

// Size is the ring's size in bytes.
func (w *Writer) Size() uint64 { return w.mem.Len() }

// Written is how many records were put in.
func (w *Writer) Written() uint64 { return w.next }

// Close flushes and gives the memory back. Readers keep theirs.
func (w *Writer) Close() error {
	w.Flush()
	return w.mem.Close()
}

// Flush shows readers what was put in. It is called at the end of each batch.
func (w *Writer) Flush() {
	if w.shown != w.next {
		w.shown = w.next
		store(w.written, w.next) // pairs with Reader.read
	}
}

func (w *Writer) put(a, b, c, d uint64) {
	if w.next-w.shown == Ahead {
		w.Flush()
	}
	i := (w.next & w.mask) * 4
	r := w.words[i : i+4 : i+4]
	store(&r[0], a)
	store(&r[1], b)
	store(&r[2], c)
	store(&r[3], d)
	w.next++
}

// Put puts in any record. What is put in for each command has a method of its own, which is faster.
func (w *Writer) Put(r *Record) {
	x := r.words()
	w.put(x[0], x[1], x[2], x[3])
}

// Fetch, Submit, SubmitReal, Complete, Post, Publish and Reap put in a record of their kind. The arguments are as in Record.
func (w *Writer) Fetch(now int64, key Key, cid uint16, opcode uint8, nsid uint32, slba uint64, blocks uint32) {
	w.put(uint64(now), head(Fetch, opcode, cid, key), slba, uint64(nsid)|uint64(blocks&blockMask)<<32)
}

func (w *Writer) Submit(now int64, key Key, cid uint16, opcode, op uint8, medium uint16, offset, bytes uint64) {
	w.put(uint64(now), head(Submit, opcode, cid, key), offset, uint64(medium)|uint64(op)<<16|saturate(bytes)<<32)
}

func (w *Writer) SubmitReal(now int64, key Key, cid uint16, opcode, op uint8, medium uint16, offset uint64, realQID, realCID uint16) {
	w.put(uint64(now), head(Submit, opcode, cid, key), offset, uint64(medium)|uint64(op)<<16|realBit|pairOf(realQID, realCID))
}

func (w *Writer) Complete(now int64, key Key, cid uint16, opcode uint8, status, realQID, realCID uint16) {
	w.put(uint64(now), head(Complete, opcode, cid, key), 0, uint64(status)|pairOf(realQID, realCID))
}

func (w *Writer) Post(now int64, key Key, cid, cqid, status uint16) {
	w.put(uint64(now), head(Post, 0, cid, key), uint64(cqid), uint64(status))
}

func (w *Writer) Publish(now int64, key Key, cid uint16, opcode uint8, nsid uint32, slba uint64, blocks uint32, rang bool) {
	w.put(uint64(now), head(Publish, opcode, cid, key), slba, uint64(nsid)|uint64(blocks&blockMask)<<32|bit(rang, rangBit))
}

func (w *Writer) Reap(now int64, key Key, cid uint16, opcode uint8, status uint16) {
	w.put(uint64(now), head(Reap, opcode, cid, key), 0, uint64(status))
}
