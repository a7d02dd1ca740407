package main

import (
	"errors"
	"io/fs"

	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

// eventFlags are those of commands whose I/O can be recorded.
type eventFlags struct {
	Events     string     `placeholder:"FILE" help:"Record every I/O command in the new FILE, for nvmetrace path (docs/trace-points.md). In /dev/shm it costs the least."`
	EventsSize size.Bytes `default:"8MiB" placeholder:"SIZE" help:"With --events: of FILE, a ring of 32-byte records, two for a command; older ones are overwritten (${default}, at most 512 MiB)."`
}

// record makes the file, which has to be there before the sandbox is shut; nil if there is to be none. end gives its memory back.
func (e *eventFlags) record(device string) (s *events.Shared, end func(), err error) {
	if e.Events == "" {
		return nil, func() {}, nil
	}
	const most = events.MaxRecords * events.RecordSize
	if e.EventsSize > most {
		return nil, nil, cli.Usagef("--events-size %v: at most 512MiB", e.EventsSize)
	}
	w, err := events.Create(e.Events, events.Config{Name: "guestdrv " + device, Records: uint32(e.EventsSize / events.RecordSize)})
	if errors.Is(err, fs.ErrExist) {
		return nil, nil, cli.Usagef("--events %s: it exists: remove it, or choose another name", e.Events)
	}
	if err != nil {
		return nil, nil, cli.UsageError{Err: err}
	}
	return events.NewShared(w), func() { _ = w.Close() }, nil
}
