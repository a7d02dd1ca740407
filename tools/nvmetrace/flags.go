package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// filterFlags say which commands of the kernel's queues are meant. Without any of them all are.
type filterFlags struct {
	Device []device `sep:"," placeholder:"nvmeN" help:"Only these devices. Give it several times for several, or nvme0,nvme1."`
	Queue  []uint16 `sep:"," placeholder:"N" help:"Only these queues, as in 1,2; 0 is the admin queue."`
	Opcode []opcode `sep:"," placeholder:"LIST" help:"Only these commands, by name or number: read,write,flush,dataset-management,identify,0x02. A number means the I/O command and the admin command that have it."`
}

// eventFlags say which events are meant.
type eventFlags struct {
	filterFlags `embed:""`
	MinLatency  time.Duration `placeholder:"TIME" help:"Only commands that took this long, as in 1ms."`
}

// Validate is called by kong.
func (f *eventFlags) Validate() error {
	if f.MinLatency < 0 {
		return fmt.Errorf("--min-latency %v: it must not be negative", f.MinLatency)
	}
	return nil
}

// options is what the kernel can leave out. match is exact.
func (f *filterFlags) options() (o trace.Options) {
	for _, d := range f.Device {
		o.Devices = append(o.Devices, uint16(d))
	}
	o.Queues = f.Queue
	for _, op := range f.Opcode {
		if !slices.Contains(o.Opcodes, op.code) {
			o.Opcodes = append(o.Opcodes, op.code)
		}
	}
	return o
}

// matchQueue says whether a queue is meant.
func (f *filterFlags) matchQueue(dev, qid uint16) bool {
	return (len(f.Device) == 0 || slices.Contains(f.Device, device(dev))) && (len(f.Queue) == 0 || slices.Contains(f.Queue, qid))
}

// match says whether commands of this kind are meant.
func (f *filterFlags) match(dev, qid uint16, code uint8) bool {
	if !f.matchQueue(dev, qid) {
		return false
	}
	return len(f.Opcode) == 0 || slices.ContainsFunc(f.Opcode, func(o opcode) bool { return o.is(qid, code) })
}

// matchEvent says whether an event is to be shown: Timeout, Reset and AsyncEvent of a queue that is meant always are.
func (f *eventFlags) matchEvent(e *trace.Event) bool {
	switch e.Kind {
	case trace.End:
		return f.match(e.Device, e.QID, e.Opcode) && e.Latency >= int64(f.MinLatency)
	case trace.Start: // nobody knows yet how long it will take
		return f.match(e.Device, e.QID, e.Opcode) && f.MinLatency == 0
	}
	return f.matchQueue(e.Device, e.QID)
}

// only takes what is not meant out of s.
func (f *filterFlags) only(s *trace.Snapshot) *trace.Snapshot {
	s.Cells = slices.DeleteFunc(s.Cells, func(c trace.Cell) bool { return !f.match(c.Device, c.QID, c.Opcode) })
	s.Queues = slices.DeleteFunc(s.Queues, func(q trace.Queue) bool { return !f.matchQueue(q.Device, q.QID) })
	return s
}

// device is the instance of an NVMe device: 0 for nvme0.
type device uint16

func (d device) String() string { return fmt.Sprintf("nvme%d", uint16(d)) }

// UnmarshalText is called by kong.
func (d *device) UnmarshalText(text []byte) error {
	s := strings.TrimPrefix(string(text), "/dev/")
	number, ok := strings.CutPrefix(s, "nvme")
	if name, _, namespace := strings.Cut(number, "n"); ok && namespace {
		return fmt.Errorf("%q is a namespace: name its device, nvme%s", s, name)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if !ok || err != nil {
		return fmt.Errorf("%q is no NVMe device: write it as nvme0", text)
	}
	*d = device(n)
	return nil
}

// opcode is a command as it was named: an I/O command, an admin command, or both of one number.
type opcode struct {
	code      uint8
	io, admin bool
}

func (o opcode) is(qid uint16, code uint8) bool {
	return o.code == code && (qid == 0 && o.admin || qid != 0 && o.io)
}

func (o opcode) String() string {
	if o.io && o.admin {
		return fmt.Sprintf("%#02x", o.code)
	}
	return slug(opcodeName(map[bool]uint16{true: 0, false: 1}[o.admin], o.code))
}

// opcodeAliases are names that Linux and its tools have for what the specification calls otherwise.
var opcodeAliases = map[string]uint8{"dsm": nvme.IODSM, "discard": nvme.IODSM, "trim": nvme.IODSM, "write-zeros": nvme.IOWriteZeroes}

// UnmarshalText is called by kong.
func (o *opcode) UnmarshalText(text []byte) error {
	s := strings.ToLower(strings.TrimSpace(string(text)))
	if n, err := strconv.ParseUint(s, 0, 8); err == nil {
		*o = opcode{code: uint8(n), io: true, admin: true}
		return nil
	}
	if code, ok := opcodeAliases[s]; ok {
		*o = opcode{code: code, io: true}
		return nil
	}
	for code, name := range nvme.IOOpcodes() {
		if slug(name) == s {
			*o = opcode{code: code, io: true}
			return nil
		}
	}
	for code, name := range nvme.AdminOpcodes() {
		if slug(name) == s {
			*o = opcode{code: code, admin: true}
			return nil
		}
	}
	return fmt.Errorf("%q is no command: use a name with dashes, such as read, write-zeroes or get-log-page, or a number such as 0x02", text)
}

// slug is a name of the specification as it is written on a command line: "write-zeroes".
func slug(name string) string { return strings.ReplaceAll(strings.ToLower(name), " ", "-") }

// runFlags say how long and how often.
type runFlags struct {
	Interval time.Duration `default:"1s" placeholder:"TIME" help:"Show what came in each of this time (${default})."`
	Duration time.Duration `placeholder:"TIME" help:"End after this long. Default: Ctrl-C ends it, and prints the totals."`
	JSON     bool          `name:"json" help:"Print one JSON object for each interval. See above for its fields."`
}

const leastInterval = 10 * time.Millisecond

// Validate is called by kong.
func (r *runFlags) Validate() error {
	switch {
	case r.Interval != 0 && r.Interval < leastInterval:
		return fmt.Errorf("--interval %v: it must be at least %v", r.Interval, leastInterval)
	case r.Duration < 0:
		return errors.New("--duration must not be negative")
	}
	return nil
}
