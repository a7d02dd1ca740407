package trace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/latency"
)

var testHeader = Header{
	Version: FileVersion, Host: "h", Kernel: "6.12", Arch: "amd64", Start: time.Unix(1700000000, 5).UTC(), Monotonic: 77,
	Devices: []Device{{Name: "nvme3", Instance: 3, Disks: []Disk{{Name: "nvme3n1", NSID: 1, BlockSize: 512}}}},
}

// write makes a file of records.
func write(t testing.TB, records []Record) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := newWriter(&b, testHeader)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if r.Snapshot != nil {
			err = w.Snapshot(r.Snapshot)
		} else {
			err = w.Event(r.Event)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read returns all records of a file, and the error that it ends with.
func read(b []byte) (records []Record, err error) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	for {
		record, err := r.Next()
		if err != nil {
			return records, err
		}
		records = append(records, record)
	}
}

func anyEvent() *rapid.Generator[Event] {
	return rapid.Custom(func(t *rapid.T) Event {
		e := Event{
			Kind: Kind(rapid.IntRange(1, 6).Draw(t, "kind")), Time: rapid.Int64().Draw(t, "time"),
			Device: rapid.Uint16().Draw(t, "device"), QID: rapid.Uint16().Draw(t, "qid"), CID: rapid.Uint16().Draw(t, "cid"),
			Opcode: rapid.Uint8().Draw(t, "opcode"), Status: rapid.Uint16().Draw(t, "status"), Retries: rapid.Uint8().Draw(t, "retries"),
			NSID: rapid.Uint32().Draw(t, "nsid"), SLBA: rapid.Uint64().Draw(t, "slba"), Blocks: rapid.Uint32().Draw(t, "blocks"), Bytes: rapid.Uint32().Draw(t, "bytes"),
			Latency: rapid.Int64().Draw(t, "latency"), TID: rapid.Uint32().Draw(t, "tid"), UserData: rapid.Uint64().Draw(t, "data"), Result: rapid.Uint64().Draw(t, "result"),
			SQHead: rapid.Uint32().Draw(t, "head"), SQTail: rapid.Uint32().Draw(t, "tail"),
			Comm: rapid.SampledFrom([]string{"", "fio", "kworker/1:2H", "\xff\x00"}).Draw(t, "comm"), Disk: rapid.SampledFrom([]string{"", "nvme0n1", "nvme1n1"}).Draw(t, "disk"),
		}
		for i := range e.CDW10 {
			e.CDW10[i] = rapid.Uint32().Draw(t, "cdw")
		}
		return e
	})
}

func anyHistogram() *rapid.Generator[*latency.Histogram] {
	return rapid.Custom(func(t *rapid.T) *latency.Histogram {
		h := new(latency.Histogram)
		for _, ns := range rapid.SliceOfN(rapid.Int64Range(0, 1<<38), 0, 20).Draw(t, "ns") {
			h.Record(time.Duration(ns), 1)
		}
		return h
	})
}

func anySnapshot() *rapid.Generator[*Snapshot] {
	n := func(t *rapid.T) uint64 { return rapid.Uint64().Draw(t, "n") }
	return rapid.Custom(func(t *rapid.T) *Snapshot {
		s := &Snapshot{At: time.Unix(0, rapid.Int64Range(0, 1<<62).Draw(t, "at")), Since: time.Duration(rapid.Int64Range(0, 1<<62).Draw(t, "since")),
			Losses: Losses{Ring: n(t), Map: n(t), Recursion: n(t)}}
		for i := range rapid.IntRange(0, 4).Draw(t, "cells") {
			h := anyHistogram().Draw(t, "h")
			s.Cells = append(s.Cells, Cell{Key: Key{Device: uint16(i), QID: 65535, Opcode: 255, SizeClass: 3}, Count: h.Count(), Errors: n(t), Retries: n(t), Bytes: n(t), Latency: h})
		}
		for i := range rapid.IntRange(0, 4).Draw(t, "queues") {
			s.Queues = append(s.Queues, Queue{Device: uint16(i), QID: 1, Started: n(t), Ended: n(t), Orphans: n(t), Replaced: n(t), Depth: -1, DepthMax: 1 << 40,
				Publishes: n(t), Interrupts: n(t), SQHead: 1<<32 - 1, SQTail: 5, Timeouts: n(t), Resets: n(t), AERs: n(t)})
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "disks") {
			h := anyHistogram().Draw(t, "h")
			s.Block = append(s.Block, BlockCell{Disk: fmt.Sprint("disk", i), Op: 'W', Count: h.Count(), Bytes: n(t), Queued: anyHistogram().Draw(t, "q"), InDevice: h})
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "vms") {
			c := ExitCell{PID: uint32(i), Exits: n(t), MMIO: n(t), FastMMIO: n(t)}
			if i > 0 {
				c.Reasons = map[uint32]uint64{48: n(t), 1: 0}
			}
			s.KVM = append(s.KVM, c)
		}
		return s
	})
}

func anyRecords() *rapid.Generator[[]Record] {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Record {
		if rapid.IntRange(0, 3).Draw(t, "what") == 0 {
			return Record{Snapshot: anySnapshot().Draw(t, "snapshot")}
		}
		return Record{Event: anyEvent().Draw(t, "event")}
	}), 0, 12)
}

func TestFileThereAndBack(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		want := anyRecords().Draw(rt, "records")
		got, err := read(write(t, want))
		if !errors.Is(err, io.EOF) || !reflect.DeepEqual(got, append([]Record(nil), want...)) && len(want) > 0 {
			rt.Fatalf("%v\n%+v\n%+v", err, got, want)
		}
	})
	r, err := NewReader(bytes.NewReader(write(t, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if h := r.Header(); !reflect.DeepEqual(h, testHeader) {
		t.Errorf("%+v", h)
	}
	if at := testHeader.Wall(77 + 1e9); !at.Equal(testHeader.Start.Add(time.Second)) {
		t.Errorf("%v", at)
	}
}

// A file that is cut anywhere gives what is whole in it, and an error that says so.
func TestCutFile(t *testing.T) {
	var records []Record
	for i := range 40 {
		records = append(records, Record{Event: Event{Kind: End, Time: int64(i), Comm: fmt.Sprint("c", i%3)}})
	}
	s := &Snapshot{At: time.Unix(0, 1), Cells: []Cell{{Latency: new(latency.Histogram)}}, Queues: []Queue{{QID: 1}}}
	records = slices.Insert(records, 20, Record{Snapshot: s})
	file := write(t, records)
	for n := range file {
		got, err := read(file[:n])
		if n < len(magic) {
			if err == nil || !strings.Contains(err.Error(), "no trace file") {
				t.Fatalf("%d bytes: %v", n, err)
			}
			continue
		}
		if !errors.Is(err, ErrTruncated) {
			t.Fatalf("%d of %d bytes: %v", n, len(file), err)
		}
		if len(got) > 0 && !reflect.DeepEqual(got, records[:len(got)]) {
			t.Fatalf("%d bytes: %+v", n, got)
		}
	}
	if got, err := read(file[:len(file)-4]); len(got) != len(records) || !strings.Contains(err.Error(), "after 40 events and 1 snapshots") {
		t.Errorf("%d records, %v", len(got), err)
	}
}

func TestFilesThatAreNone(t *testing.T) {
	file := write(t, []Record{{Event: Event{Kind: Start}}})
	later := bytes.Replace(file, []byte(`"version":1`), []byte(`"version":2`), 1)
	long := append(append([]byte{}, file...)[:len(magic)], 'H', 0xff, 0xff, 0xff, 0xff, 0x7f)
	count := append([]byte{}, file...)
	count[len(count)-2] = 9 // events, in the end mark
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"another file":   {[]byte("#!/bin/sh\nexit 0\n"), "no trace file"},
		"later version":  {later, "version 2"},
		"a long frame":   {long, "damaged"},
		"missing events": {count, "the end mark says"},
		"no header":      {append([]byte(magic), 'E', 0), "header"},
	} {
		if _, err := read(c.file); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSnapshotTooLargeForAFile(t *testing.T) {
	w, err := newWriter(io.Discard, testHeader)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Snapshot(&Snapshot{Cells: make([]Cell, fileCells+1)}); err == nil {
		t.Error("written")
	}
}

// TestManyNames has more strings than have numbers.
func TestManyNames(t *testing.T) {
	var want []Record
	for i := range maxStrings + 50 {
		want = append(want, Record{Event: Event{Kind: End, Comm: fmt.Sprint("comm", i), Disk: fmt.Sprint("comm", i/2)}})
	}
	if got, err := read(write(t, want)); !errors.Is(err, io.EOF) || !reflect.DeepEqual(got, want) {
		t.Errorf("%v", err)
	}
}

// FuzzReader: no file makes it panic or allocate beyond its bounds, and what it takes it writes again.
func FuzzReader(f *testing.F) {
	h := new(latency.Histogram)
	h.Record(time.Millisecond, 3)
	f.Add(write(f, nil))
	f.Add(write(f, []Record{{Event: Event{Kind: Start, Comm: "fio", Time: 5}}, {Snapshot: &Snapshot{
		Cells: []Cell{{Latency: h}}, Queues: []Queue{{Depth: 3}}, Block: []BlockCell{{Disk: "d", InDevice: h}}, KVM: []ExitCell{{PID: 4, Reasons: map[uint32]uint64{1: 2}}},
	}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		records, err := read(b)
		if err == nil {
			t.Fatal("no end")
		}
		again, err := read(write(t, records))
		if !errors.Is(err, io.EOF) || len(again) != len(records) {
			t.Fatalf("%d of %d records: %v", len(again), len(records), err)
		}
	})
}

func TestEventInAFileIsSmall(t *testing.T) {
	one := write(t, nil)
	var records []Record
	for i := range 100 {
		records = append(records, Record{Event: Event{Kind: End, Time: int64(i) * 10000, QID: 1, CID: uint16(i), Opcode: 2, NSID: 1, SLBA: uint64(i) * 8, Blocks: 8, Bytes: 4096,
			Latency: 80000, TID: 1234, Comm: "fio", Disk: "nvme0n1", CDW10: [6]uint32{uint32(i) * 8, 0, 7}}})
	}
	if each := (len(write(t, records)) - len(one)) / 100; each > 48 {
		t.Errorf("%d bytes for an event", each)
	}
}
