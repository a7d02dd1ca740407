package doctor

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/shadowbell/shadowbell/shared/inspect"
)

// Sample is one look at a mediator.
type Sample struct {
	inspect.Snapshot
	Views []View `json:"views,omitempty"`
}

// View is what stands in a queue's memory, read from outside: after the Snapshot, and not on the queue's thread.
type View struct {
	Socket string `json:"socket"`
	QID    uint16 `json:"qid"`
	At     int64  `json:"at_ns"` // CLOCK_MONOTONIC
	Worker int    `json:"worker"`

	Doorbells bool   `json:"doorbells"` // the next four were read
	Tail      uint32 `json:"tail"`
	TailEvent uint32 `json:"tail_event"`
	Head      uint32 `json:"head"` // with the quiet bit
	HeadEvent uint32 `json:"head_event"`

	Ring bool   `json:"ring"` // the next two were read
	Hash uint64 `json:"hash"` // of the SQ's entries
	Next bool   `json:"next"` // the entry that the device fetches next is not all zeroes
}

// Limits of a file of samples.
const (
	MaxSamples = 4096
	maxLine    = 16 << 20
	maxQueues  = 1 << 16
)

// Write appends s to a file of samples: one line of JSON each.
func Write(w io.Writer, s *Sample) error {
	line, err := json.Marshal(s)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// Read reads a file of samples. An error names the line.
func Read(r io.Reader) (samples []Sample, err error) {
	in := bufio.NewScanner(r)
	in.Buffer(nil, maxLine)
	for n := 1; in.Scan(); n++ {
		if len(in.Bytes()) == 0 {
			continue
		}
		var s Sample
		if err := json.Unmarshal(in.Bytes(), &s); err != nil {
			return nil, fmt.Errorf("line %d is no sample: %w", n, err)
		}
		if err := s.check(); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if samples = append(samples, s); len(samples) > MaxSamples {
			return nil, fmt.Errorf("more than %d samples: cut the file, the newest count", MaxSamples)
		}
	}
	if errors.Is(in.Err(), bufio.ErrTooLong) {
		return nil, fmt.Errorf("line %d is longer than %d MiB", len(samples)+1, maxLine>>20)
	}
	if in.Err() == nil && len(samples) == 0 {
		return nil, errors.New("no sample in it")
	}
	return samples, in.Err()
}

func (s *Sample) check() error {
	if s.Version != inspect.Version {
		return fmt.Errorf("samples of version %d, this doctor reads %d", s.Version, inspect.Version)
	}
	n := len(s.Views)
	for i := range s.Controllers {
		n += len(s.Controllers[i].Queues) + len(s.Controllers[i].Errors)
	}
	if n > maxQueues {
		return fmt.Errorf("%d queues, views and errors in one sample, at most %d", n, maxQueues)
	}
	return nil
}
