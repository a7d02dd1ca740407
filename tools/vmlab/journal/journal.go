// Package journal finds out what an acknowledged write is worth. Writers put records on a disk, make each durable in one way or another, and
// only then acknowledge it to somebody who outlives the disk's computer. Check looks for every acknowledged record on what a crash has left.
//
// Run writes to a disk as it is, RunFiles to a file system. The writers do not overtake themselves: a record is
// begun when the one before is acknowledged, so an acknowledgement of one stands for all before it. Package volatile below is a disk that loses
// power; writer is the program that runs in guests.
package journal

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
)

// Disk is where records go. A Disk has one user.
type Disk interface {
	// WriteAt may return as soon as the disk has the data, in a cache that forgets.
	WriteAt(p []byte, off int64) (int, error)
	// WriteDurable returns when p would survive a loss of power.
	WriteDurable(p []byte, off int64) error
	// Flush returns when everything would that was written before.
	Flush() error
}

// Method is how a writer makes its records durable.
type Method string

// The methods. Each record is one write of RecordSize.
const (
	Flush   Method = "flush"   // a write, then a flush
	Durable Method = "durable" // one durable write: FUA
	Batch   Method = "batch"   // several writes, then one flush for all
	Through Method = "through" // a write and nothing else: for disks whose write cache is off, and to see that the others are needed
)

const (
	RecordSize = 4096
	// headSize is written in place, over and over, and must come as a whole: one logical block.
	headSize  = 512
	batchSize = 8
)

// Layout says what is where on the disk: for each writer an area of a head and Records records.
type Layout struct {
	Run     uint64   // tells this run's records from another's
	Methods []Method // of each writer
	Records int      // at most, of each writer
	Base    int64    // where the first area begins, in bytes
}

// Size is how many bytes the areas take.
func (l *Layout) Size() int64 { return int64(len(l.Methods)) * l.area() }

func (l *Layout) area() int64 { return int64(1+l.Records) * RecordSize }

func (l *Layout) head(w int) int64 { return l.Base + int64(w)*l.area() }

func (l *Layout) record(w, n int) int64 { return l.head(w) + int64(1+n)*RecordSize }

// content is what a record or a head is made of: its number, then bytes that no other has.
func content(size int, run uint64, kind string, w, n int) []byte {
	p := make([]byte, size)
	binary.LittleEndian.PutUint64(p, uint64(n))
	copy(p[8:16], fmt.Sprintf("%s%d", kind, w))
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], run)
	copy(seed[8:], p[:16])
	_, _ = rand.NewChaCha8(seed).Read(p[16:])
	return p
}

func recordContent(l *Layout, w, n int) []byte { return content(RecordSize, l.Run, "record", w, n) }
func headContent(l *Layout, w, n int) []byte   { return content(headSize, l.Run, "head", w, n) }

// Run has one writer for each method write records to its Disk until ctx ends, a write fails or the area is full. acks gets a line for each
// record that is durable, in one Write, before the writer goes on.
func Run(ctx context.Context, l Layout, disks []Disk, acks io.Writer) error {
	if len(disks) != len(l.Methods) {
		return fmt.Errorf("%d disks for %d writers", len(disks), len(l.Methods))
	}
	a := &acknowledger{w: acks}
	errs := make(chan error, len(disks))
	for w := range disks {
		go func() { errs <- write(ctx, &l, w, disks[w], a) }()
	}
	var first error
	for range disks {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

func write(ctx context.Context, l *Layout, w int, d Disk, a *acknowledger) error {
	step := 1
	if l.Methods[w] == Batch {
		step = batchSize
	}
	for n := 0; n+step <= l.Records && ctx.Err() == nil; n += step {
		for i := range step {
			if err := l.put(w, d, recordContent(l, w, n+i), l.record(w, n+i)); err != nil {
				return fmt.Errorf("writer %d, record %d: %w", w, n+i, err)
			}
		}
		if err := l.settle(w, d); err != nil {
			return fmt.Errorf("writer %d, record %d: %w", w, n, err)
		}
		if err := a.acknowledge(recordKind, w, n+step-1); err != nil {
			return err
		}
		// The head says how far the writer is, in the way of a journal's superblock.
		if err := l.put(w, d, headContent(l, w, n+step-1), l.head(w)); err != nil {
			return fmt.Errorf("writer %d, head: %w", w, err)
		}
		if err := l.settle(w, d); err != nil {
			return fmt.Errorf("writer %d, head: %w", w, err)
		}
		if err := a.acknowledge(headKind, w, n+step-1); err != nil {
			return err
		}
	}
	return nil
}

func (l *Layout) put(w int, d Disk, p []byte, off int64) error {
	if l.Methods[w] == Durable {
		return d.WriteDurable(p, off)
	}
	_, err := d.WriteAt(p, off)
	return err
}

func (l *Layout) settle(w int, d Disk) error {
	if m := l.Methods[w]; m == Durable || m == Through {
		return nil
	}
	return d.Flush()
}

// What is acknowledged.
const (
	recordKind = 'r'
	headKind   = 'h'
	fileKind   = 'f'
)

type acknowledger struct {
	mu sync.Mutex // one line at a time
	w  io.Writer
}

func (a *acknowledger) acknowledge(kind byte, w, n int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err := fmt.Fprintf(a.w, "%c %d %d\n", kind, w, n); err != nil {
		return fmt.Errorf("acknowledging: %w", err)
	}
	return nil
}

// Acks are the acknowledgements that have come: by writer the number of the last record, head and file; a writer that is not there has none.
type Acks struct {
	Records, Heads, Files map[int]int
}

// ReadAcks reads what Run or RunFiles acknowledged. A last line that was cut short does not count.
func ReadAcks(r io.Reader) (Acks, error) {
	a := Acks{Records: map[int]int{}, Heads: map[int]int{}, Files: map[int]int{}}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return a, err
		}
		var kind byte
		var w, n int
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "%c %d %d", &kind, &w, &n); err != nil {
			return a, fmt.Errorf("acknowledgement %q: %w", line, err)
		}
		last := map[byte]map[int]int{recordKind: a.Records, headKind: a.Heads, fileKind: a.Files}[kind]
		if last == nil {
			return a, fmt.Errorf("acknowledgement %q: of what?", line)
		}
		if was, ok := last[w]; ok && n <= was {
			return a, fmt.Errorf("acknowledgement %q comes after that of %d", line, was)
		}
		last[w] = n
	}
}
