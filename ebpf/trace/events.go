package trace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
)

// lookEvery is how long an event may lie in the ring: the kernel wakes the reader only when a quarter of it is full, since a wake-up
// for each command would cost more than all the rest.
const lookEvery = 25 * time.Millisecond

// ErrNoEvents is returned by Read of a Tracer without Options.Events.
var ErrNoEvents = errors.New("trace: opened without Options.Events")

// Read calls f with each event until ctx ends, which is no error, or Close is called. Events of one CPU come in order; those of several may be swapped
// by some microseconds. When ctx has ended, what is still in the ring is read. Only one Read may run.
func (t *Tracer) Read(ctx context.Context, f func(Event)) error {
	if t.reader == nil {
		return ErrNoEvents
	}
	var names interned
	var record ringbuf.Record
	for {
		ended := ctx.Err() != nil
		wait, left := lookEvery, math.MaxInt
		if ended { // what is there now, since more may come for ever
			wait, left = 0, t.reader.AvailableBytes()
		}
		t.reader.SetDeadline(time.Now().Add(wait))
		for left > 0 && (ended || ctx.Err() == nil) {
			err := t.reader.ReadInto(&record)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if errors.Is(err, ringbuf.ErrClosed) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("ring buffer: %w", err)
			}
			left -= eventSize
			e, err := decode(record.RawSample, &names)
			if err != nil {
				return err
			}
			f(e)
		}
		if ended {
			return nil
		}
	}
}

// eventSize is that of struct event in maps.h.
var eventSize = binary.Size(bpf.TraceEvent{})

// decode makes an event of what a program wrote: little endian, like all that the programs are compiled for.
func decode(b []byte, names *interned) (Event, error) {
	if len(b) < eventSize {
		return Event{}, fmt.Errorf("an event of %d bytes, not %d", len(b), eventSize)
	}
	le := binary.LittleEndian
	e := Event{
		Time: int64(le.Uint64(b)), Latency: int64(le.Uint64(b[8:])), SLBA: le.Uint64(b[16:]), UserData: le.Uint64(b[24:]), Result: le.Uint64(b[32:]),
		Blocks: le.Uint32(b[40:]), Bytes: le.Uint32(b[44:]), NSID: le.Uint32(b[48:]), TID: le.Uint32(b[52:]), SQHead: le.Uint32(b[56:]), SQTail: le.Uint32(b[60:]),
		Device: le.Uint16(b[88:]), QID: le.Uint16(b[90:]), CID: le.Uint16(b[92:]), Status: le.Uint16(b[94:]),
		Kind: Kind(b[96]), Opcode: b[97], Retries: b[98],
		Comm: names.get(b[104:120]), Disk: names.get(b[120:152]),
	}
	for i := range e.CDW10 {
		e.CDW10[i] = le.Uint32(b[64+4*i:])
	}
	return e, nil
}

// interned spares a string for each event: there are few names.
type interned struct{ known map[string]string }

const maxInterned = 1024

// get returns b up to its first zero.
func (n *interned) get(b []byte) string {
	for i, c := range b {
		if c == 0 {
			b = b[:i]
			break
		}
	}
	if s, ok := n.known[string(b)]; ok {
		return s
	}
	if n.known == nil || len(n.known) >= maxInterned {
		n.known = map[string]string{}
	}
	s := string(b)
	n.known[s] = s
	return s
}
