package trace

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/latency"
)

// A file is magic, then frames: a byte that says what it is, the payload's length as a uvarint, the payload. The first is the header, the last the end;
// one without an end was cut off. Numbers in payloads are varints; a string is its number among those before it, or 0 and itself.
const (
	magic = "nvmetrc\n"

	frameHeader   = 'H' // JSON of Header
	frameEvent    = 'E'
	frameSnapshot = 'S'
	frameEnd      = 'Z' // how many events and snapshots there were

	// FileVersion is what Writer writes and Reader takes.
	FileVersion = 1

	maxFrame   = 32 << 20
	maxStrings = 4096 // that have a number; later ones stand there each time
	maxString  = 64
)

// What a snapshot in a file holds at most: more than the kernel's maps.
const (
	fileCells   = 4096
	fileQueues  = 4096
	fileDisks   = 1024
	fileVMs     = 1024
	fileReasons = 65536
)

// Header says where and when a file was recorded.
type Header struct {
	Version   int       `json:"version"`
	Host      string    `json:"host"`
	Kernel    string    `json:"kernel"`
	Arch      string    `json:"arch"`
	Start     time.Time `json:"start"`
	Monotonic int64     `json:"monotonic_ns"` // Event.Time of Start
	Devices   []Device  `json:"devices,omitempty"`
}

// Wall returns the wall clock's time of an Event.Time, as if nobody had set the clock since Start.
func (h *Header) Wall(monotonic int64) time.Time {
	return h.Start.Add(time.Duration(monotonic - h.Monotonic))
}

func newHeader() (Header, error) {
	h := Header{Version: FileVersion, Arch: runtime.GOARCH, Start: time.Now()}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return h, err
	}
	h.Monotonic = now.Nano()
	h.Kernel = release()
	var err error
	if h.Host, err = os.Hostname(); err != nil {
		return h, err
	}
	h.Devices, err = Devices()
	return h, err
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// Writer writes events and snapshots to a file that Reader reads. Its methods may be called from several goroutines.
type Writer struct {
	mu        sync.Mutex
	w         *bufio.Writer
	buf       []byte
	strings   map[string]uint64
	time      int64 // of the event before
	events    uint64
	snapshots uint64
}

// NewWriter writes the header, of this machine and time, to w.
func NewWriter(w io.Writer) (*Writer, error) {
	h, err := newHeader()
	if err != nil {
		return nil, err
	}
	return newWriter(w, h)
}

func newWriter(w io.Writer, h Header) (*Writer, error) {
	out := &Writer{w: bufio.NewWriterSize(w, 64<<10), strings: map[string]uint64{}}
	b, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if _, err := out.w.WriteString(magic); err != nil {
		return nil, err
	}
	return out, out.frame(frameHeader, b)
}

func (w *Writer) frame(kind byte, payload []byte) error {
	if len(payload) > maxFrame {
		return fmt.Errorf("trace: a record of %d bytes; %d is the most", len(payload), maxFrame)
	}
	var head [1 + binary.MaxVarintLen64]byte
	head[0] = kind
	n := 1 + binary.PutUvarint(head[1:], uint64(len(payload)))
	if _, err := w.w.Write(head[:n]); err != nil {
		return err
	}
	_, err := w.w.Write(payload)
	return err
}

// Event writes an event.
func (w *Writer) Event(e Event) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := append(w.buf[:0], byte(e.Kind), e.Opcode, e.Retries)
	b = binary.AppendVarint(b, e.Time-w.time)
	for _, v := range []uint64{
		uint64(e.Device), uint64(e.QID), uint64(e.CID), uint64(e.Status), uint64(e.NSID), e.SLBA, uint64(e.Blocks), uint64(e.Bytes), uint64(e.Latency),
		uint64(e.TID), e.UserData, e.Result, uint64(e.SQHead), uint64(e.SQTail),
	} {
		b = binary.AppendUvarint(b, v)
	}
	for _, v := range e.CDW10 {
		b = binary.AppendUvarint(b, uint64(v))
	}
	b = w.text(b, e.Comm)
	b = w.text(b, e.Disk)
	w.buf, w.time = b, e.Time
	w.events++
	return w.frame(frameEvent, b)
}

// text appends a string, cut to what the kernel's are at most.
func (w *Writer) text(b []byte, s string) []byte {
	s = s[:min(len(s), maxString)]
	if n, ok := w.strings[s]; ok {
		return binary.AppendUvarint(b, n)
	}
	if len(w.strings) < maxStrings {
		w.strings[s] = uint64(len(w.strings)) + 1
	}
	b = binary.AppendUvarint(b, 0)
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// Snapshot writes a snapshot.
func (w *Writer) Snapshot(s *Snapshot) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	reasons := 0
	for _, c := range s.KVM {
		reasons += len(c.Reasons)
	}
	if len(s.Cells) > fileCells || len(s.Queues) > fileQueues || len(s.Block) > fileDisks || len(s.KVM) > fileVMs || reasons > fileReasons {
		return fmt.Errorf("trace: a snapshot of %d cells, %d queues, %d of disks and %d virtual machines is too large", len(s.Cells), len(s.Queues), len(s.Block), len(s.KVM))
	}
	b := numbers(w.buf[:0], uint64(s.At.UnixNano()), uint64(s.Since), s.Losses.Ring, s.Losses.Map, s.Losses.Recursion)
	b = numbers(b, uint64(len(s.Cells)))
	for _, c := range s.Cells {
		b = numbers(b, uint64(c.Device), uint64(c.QID), uint64(c.Opcode), uint64(c.SizeClass), c.Errors, c.Retries, c.Bytes)
		b = histogram(b, c.Latency)
	}
	b = numbers(b, uint64(len(s.Queues)))
	for _, q := range s.Queues {
		b = numbers(b, uint64(q.Device), uint64(q.QID), q.Started, q.Ended, q.Orphans, q.Replaced, uint64(q.Depth), uint64(q.DepthMax), q.Publishes, q.Interrupts,
			uint64(q.SQHead), uint64(q.SQTail), q.Timeouts, q.Resets, q.AERs)
	}
	b = numbers(b, uint64(len(s.Block)))
	for _, c := range s.Block {
		b = w.text(b, c.Disk)
		b = numbers(b, uint64(c.Op), c.Bytes)
		b = histogram(histogram(b, c.Queued), c.InDevice)
	}
	b = numbers(b, uint64(len(s.KVM)))
	for _, c := range s.KVM {
		b = numbers(b, uint64(c.PID), c.Exits, c.MMIO, c.FastMMIO, uint64(len(c.Reasons)))
		for _, reason := range sorted(c.Reasons) {
			b = numbers(b, uint64(reason), c.Reasons[reason])
		}
	}
	w.buf = b
	w.snapshots++
	return w.frame(frameSnapshot, b)
}

func sorted(m map[uint32]uint64) []uint32 {
	keys := make([]uint32, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func numbers(b []byte, values ...uint64) []byte {
	for _, v := range values {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

// histogram appends sum, max and the buckets that are not empty, each by its distance from the one before.
func histogram(b []byte, h *latency.Histogram) []byte {
	if h == nil {
		h = new(latency.Histogram)
	}
	counts := h.Counts()
	used := 0
	for _, n := range counts {
		if n > 0 {
			used++
		}
	}
	b = numbers(b, uint64(h.Sum()), uint64(h.Max()), uint64(used))
	last := 0
	for i, n := range counts {
		if n > 0 {
			b = numbers(b, uint64(i-last), n)
			last = i
		}
	}
	return b
}

// Flush hands on what is buffered.
func (w *Writer) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.w.Flush()
}

// Close writes the end mark and flushes. It does not close what was given to NewWriter.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.frame(frameEnd, numbers(nil, w.events, w.snapshots)); err != nil {
		return err
	}
	return w.w.Flush()
}
