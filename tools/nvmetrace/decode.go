package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// opcodeName is the specification's name of a command.
func opcodeName(qid uint16, code uint8) string {
	if qid == 0 {
		return nvme.AdminOpcodeName(code)
	}
	return nvme.IOOpcodeName(code)
}

// noAddresses takes out what nvme_setup_cmd does not tell: data pointers.
var noAddresses = strings.NewReplacer(" prp1=0x0", "", " shadow=0x0 eventidx=0x0", "")

// describe decodes the command of a Start or an End.
func describe(e *trace.Event) string {
	c := nvme.Command{Opcode: e.Opcode, NSID: e.NSID,
		CDW10: e.CDW10[0], CDW11: e.CDW10[1], CDW12: e.CDW10[2], CDW13: e.CDW10[3], CDW14: e.CDW10[4], CDW15: e.CDW10[5]}
	s := c.Describe(e.QID == 0)
	if e.QID == 0 {
		s = noAddresses.Replace(s)
	}
	return s
}

// describeEvent is what happened, in words.
func describeEvent(e *trace.Event) string {
	switch e.Kind {
	case trace.Start:
		return "> " + describe(e)
	case trace.End:
		return describe(e)
	case trace.AsyncEvent:
		return "ASYNCHRONOUS EVENT " + nvme.AsyncEvent(e.Result).String()
	case trace.Timeout:
		return "TIMEOUT of " + describe(e)
	case trace.Reset:
		return "RESET of the controller"
	case trace.Doorbell:
		return fmt.Sprintf("SQ head %d tail %d", e.SQHead, e.SQTail)
	}
	return fmt.Sprintf("event of kind %d", e.Kind)
}

// kindNames are the kinds as --json has them.
var kindNames = map[trace.Kind]string{
	trace.Start: "start", trace.End: "end", trace.AsyncEvent: "async_event", trace.Timeout: "timeout", trace.Reset: "reset", trace.Doorbell: "doorbell",
}

// statusName is "ok" or the specification's name with its numbers.
func statusName(s uint16) string {
	if s == 0 {
		return "ok"
	}
	return nvme.Status(s).String()
}

// printable is s without what could change the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// eventJSON is a line of snoop --json. Its fields are documented in snoopHelp.
type eventJSON struct {
	Kind     string  `json:"kind"`
	Time     int64   `json:"time_ns"`
	Device   string  `json:"device"`
	QID      uint16  `json:"qid"`
	CID      *uint16 `json:"cid,omitempty"`
	Opcode   *uint8  `json:"opcode,omitempty"`
	Command  string  `json:"command,omitempty"`
	Text     string  `json:"text"`
	NSID     uint32  `json:"nsid,omitempty"`
	SLBA     *uint64 `json:"slba,omitempty"`
	Blocks   uint32  `json:"blocks,omitempty"`
	Bytes    uint32  `json:"bytes,omitempty"`
	Latency  int64   `json:"latency_ns,omitempty"`
	Status   *uint16 `json:"status,omitempty"`
	StatusIs string  `json:"status_name,omitempty"`
	Retries  uint8   `json:"retries,omitempty"`
	TID      uint32  `json:"tid,omitempty"`
	Comm     string  `json:"comm,omitempty"`
	Disk     string  `json:"disk,omitempty"`
	SQHead   *uint32 `json:"sq_head,omitempty"`
	SQTail   *uint32 `json:"sq_tail,omitempty"`
}

func toJSON(e *trace.Event) eventJSON {
	j := eventJSON{Kind: kindNames[e.Kind], Time: e.Time, Device: device(e.Device).String(), QID: e.QID, Text: describeEvent(e)}
	switch e.Kind {
	case trace.Start, trace.End, trace.Timeout:
		j.CID, j.Opcode, j.Command = &e.CID, &e.Opcode, opcodeName(e.QID, e.Opcode)
		j.NSID, j.Blocks, j.Bytes, j.Retries = e.NSID, e.Blocks, e.Bytes, e.Retries
		j.TID, j.Comm, j.Disk = e.TID, printable(e.Comm), printable(e.Disk)
		if e.Blocks > 0 {
			j.SLBA = &e.SLBA
		}
	case trace.Doorbell:
		j.SQHead, j.SQTail = &e.SQHead, &e.SQTail
	}
	if e.Kind == trace.End {
		j.Latency, j.Status, j.StatusIs = e.Latency, &e.Status, statusName(e.Status)
	}
	return j
}

// eventPrinter prints events, as lines or as JSON, and counts them.
type eventPrinter struct {
	w      io.Writer
	json   *json.Encoder // nil: lines
	from   int64         // the time that is 0 in lines; the first event's
	shown  uint64
	errors uint64 // ends with a status
}

func newEventPrinter(w io.Writer, asJSON bool) *eventPrinter {
	p := &eventPrinter{w: w}
	if asJSON {
		p.json = json.NewEncoder(w)
	}
	return p
}

const (
	eventHead   = "     TIME s  DEVICE  QUEUE  CID          BYTES    LATENCY  THREAD             COMMAND -> STATUS\n"
	eventFormat = "%11.6f  %-6s  %5d  %-6s  %10s  %9s  %-17s  %s"
)

// print prints one event.
func (p *eventPrinter) print(e *trace.Event) error {
	first := p.shown == 0
	p.shown++
	if e.Kind == trace.End && e.Status != 0 {
		p.errors++
	}
	if p.json != nil {
		return p.json.Encode(toJSON(e))
	}
	if first {
		p.from = e.Time
		if _, err := io.WriteString(p.w, eventHead); err != nil {
			return err
		}
	}
	_, err := io.WriteString(p.w, eventLine(e, p.from)+"\n")
	return err
}

// eventLine is e for people; from is the time that is 0.
func eventLine(e *trace.Event, from int64) string {
	cid, bytes, took, thread := "", "", "", ""
	what := describeEvent(e)
	switch e.Kind {
	case trace.Start, trace.End, trace.Timeout:
		cid = fmt.Sprintf("0x%04x", e.CID)
		if e.Bytes > 0 {
			bytes = size.Bytes(e.Bytes).String()
		}
		if e.TID != 0 {
			thread = fmt.Sprintf("%s/%d", printable(e.Comm), e.TID)
		}
	}
	if e.Kind == trace.End {
		took = text.Duration(time.Duration(e.Latency))
		what += " -> " + statusName(e.Status)
		if e.Retries > 0 {
			what += fmt.Sprintf(", try %d", e.Retries+1)
		}
	}
	line := fmt.Sprintf(eventFormat, float64(e.Time-from)/1e9, device(e.Device), e.QID, cid, bytes, took, thread, what)
	return strings.TrimRight(line, " ")
}

// lossText says what was not counted, and is empty if nothing was lost.
func lossText(l trace.Losses) string {
	var parts []string
	add := func(n uint64, what string) {
		if n > 0 {
			parts = append(parts, text.Count(float64(n))+" "+what)
		}
	}
	add(l.Ring, "events found no room in the ring buffer")
	add(l.Map, "commands found no room in a map")
	add(l.Recursion, "programs were not run because they were running")
	if parts == nil {
		return ""
	}
	return "LOST: " + strings.Join(parts, ", ")
}
