package trace

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/shadowbell/shadowbell/shared/latency"
)

// ErrTruncated is what Next ends with when a file has no end mark: it was cut off, or is still being written. What it returned before is whole.
var ErrTruncated = errors.New("the trace file is cut off")

// errCorrupt is of a payload that no Writer writes.
var errCorrupt = errors.New("not what a trace file has")

// Record is an event, or a snapshot if that is not nil.
type Record struct {
	Event    Event
	Snapshot *Snapshot
}

// Reader reads what Writer has written.
type Reader struct {
	r         *bufio.Reader
	header    Header
	at        int64 // bytes read
	payload   []byte
	strings   []string
	time      int64
	events    uint64
	snapshots uint64
	ended     bool
}

// NewReader reads the header. Of a file that is none, or of another version, the error says so.
func NewReader(r io.Reader) (*Reader, error) {
	in := &Reader{r: bufio.NewReaderSize(r, 64<<10)}
	var head [len(magic)]byte
	if _, err := io.ReadFull(in.r, head[:]); err != nil || string(head[:]) != magic {
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, errors.New("trace: this is no trace file (nvmetrace snoop --write makes them)")
		}
		return nil, err
	}
	in.at = int64(len(magic))
	kind, err := in.frame()
	if err != nil {
		return nil, err
	}
	if kind != frameHeader {
		return nil, in.corrupt(fmt.Errorf("a frame %q instead of the header", kind))
	}
	// A later version may have changed anything else.
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(in.payload, &version); err != nil {
		return nil, in.corrupt(err)
	}
	if version.Version != FileVersion {
		return nil, fmt.Errorf("trace: the file is of version %d, this program reads %d: use the nvmetrace that wrote it", version.Version, FileVersion)
	}
	if err := json.Unmarshal(in.payload, &in.header); err != nil {
		return nil, in.corrupt(err)
	}
	return in, nil
}

// Header says where and when the file was recorded.
func (r *Reader) Header() Header { return r.header }

// Next returns the next record, in the order of writing; io.EOF after the last, ErrTruncated where the file ends too soon.
func (r *Reader) Next() (Record, error) {
	if r.ended {
		return Record{}, io.EOF
	}
	kind, err := r.frame()
	if err != nil {
		return Record{}, err
	}
	d := &decoder{b: r.payload, strings: &r.strings}
	var record Record
	switch kind {
	case frameEvent:
		record.Event = d.event(r.time)
		r.time = record.Event.Time
		r.events++
	case frameSnapshot:
		record.Snapshot = d.snapshot()
		r.snapshots++
	case frameEnd:
		events, snapshots := d.number(), d.number()
		if d.end() == nil && (events != r.events || snapshots != r.snapshots) {
			return Record{}, r.corrupt(fmt.Errorf("%d events and %d snapshots, the end mark says %d and %d", r.events, r.snapshots, events, snapshots))
		}
		r.ended = true
		if err := d.end(); err != nil {
			return Record{}, r.corrupt(err)
		}
		return Record{}, io.EOF
	default:
		return Record{}, r.corrupt(fmt.Errorf("a frame %q", kind))
	}
	if err := d.end(); err != nil {
		return Record{}, r.corrupt(err)
	}
	return record, nil
}

func (r *Reader) corrupt(err error) error {
	return fmt.Errorf("trace: the file is damaged before byte %d: %w", r.at, err)
}

func (r *Reader) truncated() error {
	return fmt.Errorf("trace: %w after %d events and %d snapshots", ErrTruncated, r.events, r.snapshots)
}

func (r *Reader) readByte() (byte, error) {
	b, err := r.r.ReadByte()
	if err == nil {
		r.at++
	}
	return b, err
}

// byteReader is for binary.ReadUvarint.
type byteReader func() (byte, error)

func (f byteReader) ReadByte() (byte, error) { return f() }

// frame reads the next frame's payload. It allocates as much as there is, not as much as is promised.
func (r *Reader) frame() (byte, error) {
	kind, err := r.readByte()
	if errors.Is(err, io.EOF) {
		return 0, r.truncated()
	}
	if err != nil {
		return 0, err
	}
	size, err := binary.ReadUvarint(byteReader(r.readByte))
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, r.truncated()
	}
	if err != nil {
		return 0, r.corrupt(err)
	}
	if size > maxFrame {
		return 0, r.corrupt(fmt.Errorf("a frame of %d bytes", size))
	}
	r.payload = r.payload[:0]
	for left := int(size); left > 0; {
		n := min(left, 64<<10)
		at := len(r.payload)
		r.payload = append(r.payload, make([]byte, n)...)
		got, err := io.ReadFull(r.r, r.payload[at:])
		r.at += int64(got)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, r.truncated()
		}
		if err != nil {
			return 0, err
		}
		left -= n
	}
	return kind, nil
}

// decoder takes a payload apart. After its first error all is zero.
type decoder struct {
	b       []byte
	strings *[]string
	err     error
}

func (d *decoder) end() error {
	if d.err == nil && len(d.b) > 0 {
		d.err = errCorrupt
	}
	return d.err
}

func (d *decoder) number() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.b, d.err = nil, errCorrupt
		return 0
	}
	d.b = d.b[n:]
	return v
}

// upTo is a number that is at most most.
func (d *decoder) upTo(most uint64) uint64 {
	v := d.number()
	if v > most {
		d.b, d.err = nil, errCorrupt
		return 0
	}
	return v
}

func (d *decoder) u8() uint8   { return uint8(d.upTo(math.MaxUint8)) }
func (d *decoder) u16() uint16 { return uint16(d.upTo(math.MaxUint16)) }
func (d *decoder) u32() uint32 { return uint32(d.upTo(math.MaxUint32)) }

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.b)) {
		d.b, d.err = nil, errCorrupt
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) text() string {
	if n := d.upTo(uint64(len(*d.strings))); n > 0 {
		return (*d.strings)[n-1]
	}
	s := string(d.bytes(d.upTo(maxString)))
	if d.err == nil && len(*d.strings) < maxStrings {
		*d.strings = append(*d.strings, s)
	}
	return s
}

func (d *decoder) event(before int64) Event {
	var e Event
	if head := d.bytes(3); head != nil {
		e.Kind, e.Opcode, e.Retries = Kind(head[0]), head[1], head[2]
	}
	delta, n := binary.Varint(d.b)
	if n <= 0 {
		d.b, d.err = nil, errCorrupt
		return e
	}
	d.b = d.b[n:]
	e.Time = before + delta
	e.Device, e.QID, e.CID, e.Status = d.u16(), d.u16(), d.u16(), d.u16()
	e.NSID, e.SLBA, e.Blocks, e.Bytes = d.u32(), d.number(), d.u32(), d.u32()
	e.Latency, e.TID, e.UserData, e.Result = int64(d.number()), d.u32(), d.number(), d.number()
	e.SQHead, e.SQTail = d.u32(), d.u32()
	for i := range e.CDW10 {
		e.CDW10[i] = d.u32()
	}
	e.Comm, e.Disk = d.text(), d.text()
	return e
}

func (d *decoder) snapshot() *Snapshot {
	s := &Snapshot{At: time.Unix(0, int64(d.number())), Since: time.Duration(d.number()), Losses: Losses{Ring: d.number(), Map: d.number(), Recursion: d.number()}}
	for range d.upTo(fileCells) {
		c := Cell{Key: Key{Device: d.u16(), QID: d.u16(), Opcode: d.u8(), SizeClass: d.u8()}, Errors: d.number(), Retries: d.number(), Bytes: d.number()}
		if c.Latency = d.histogram(); d.err != nil {
			return nil
		}
		c.Count = c.Latency.Count()
		s.Cells = append(s.Cells, c)
	}
	for range d.upTo(fileQueues) {
		s.Queues = append(s.Queues, Queue{
			Device: d.u16(), QID: d.u16(), Started: d.number(), Ended: d.number(), Orphans: d.number(), Replaced: d.number(),
			Depth: int64(d.number()), DepthMax: int64(d.number()), Publishes: d.number(), Interrupts: d.number(),
			SQHead: d.u32(), SQTail: d.u32(), Timeouts: d.number(), Resets: d.number(), AERs: d.number(),
		})
		if d.err != nil {
			return nil
		}
	}
	for range d.upTo(fileDisks) {
		c := BlockCell{Disk: d.text(), Op: d.u8(), Bytes: d.number(), Queued: d.histogram(), InDevice: d.histogram()}
		if d.err != nil {
			return nil
		}
		c.Count = c.InDevice.Count()
		s.Block = append(s.Block, c)
	}
	reasons := uint64(fileReasons)
	for range d.upTo(fileVMs) {
		c := ExitCell{PID: d.u32(), Exits: d.number(), MMIO: d.number(), FastMMIO: d.number()}
		n := d.upTo(reasons)
		reasons -= n
		for range n {
			if c.Reasons == nil {
				c.Reasons = map[uint32]uint64{}
			}
			reason := d.u32()
			c.Reasons[reason] = d.number()
			if d.err != nil {
				return nil
			}
		}
		if d.err != nil {
			return nil
		}
		s.KVM = append(s.KVM, c)
	}
	return s
}

func (d *decoder) histogram() *latency.Histogram {
	var counts [latency.Buckets]uint64
	sum, most := d.number(), d.number()
	used := d.upTo(latency.Buckets)
	at := uint64(0)
	for range used {
		at += d.upTo(latency.Buckets - 1 - at)
		counts[at] = d.number()
		if d.err != nil {
			return nil
		}
	}
	h := new(latency.Histogram)
	h.AddCounts(&counts, sum, most)
	return h
}
