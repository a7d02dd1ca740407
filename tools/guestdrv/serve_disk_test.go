package main

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

var (
	_ export.Disk        = servedDisk{}
	_ export.Capable     = servedDisk{}
	_ export.Deallocator = servedDisk{}
	_ export.Mapper      = servedDisk{}
	_ export.Queued      = servedDisk{}
)

// TestServedDiskHasQueues: what commands of a queue do, the methods see.
func TestServedDiskHasQueues(t *testing.T) {
	device, _ := serve(t)
	ctrl, err := guestdrv.Open(t.Context(), device, guestdrv.Options{MaxQueuePairs: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer ctrl.Close()
	ns, err := ctrl.Namespace(2)
	if err != nil {
		t.Fatal(err)
	}
	var d export.Disk = servedDisk{ns, ctrl}
	if d != export.Disk(servedDisk{ns, ctrl}) {
		t.Error("two disks of one namespace are not equal")
	}
	mem, free, err := export.DMAMemory(d, 8192)
	if err != nil {
		t.Fatal(err)
	}
	defer free()
	q, err := d.(export.Queued).NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if _, err := d.(export.Queued).NewQueue(8); err == nil {
		t.Error("there is a second queue pair, and one was asked for")
	} else if d.(export.Queued).Again(err) {
		t.Errorf("worth another try: %v", err)
	}
	end := func(cmds ...export.Command) {
		t.Helper()
		if n, err := q.Submit(cmds); n != len(cmds) || err != nil {
			t.Fatal(n, err)
		}
		if err := q.Publish(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(30 * time.Second); q.Outstanding() > 0; {
			var out [4]export.Result
			n, err := q.Reap(out[:])
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("%d outstanding: %v", q.Outstanding(), err)
			}
			for _, r := range out[:n] {
				if !r.Status.OK() {
					t.Errorf("command %d: %v", r.Tag, r.Status)
				}
			}
		}
	}
	data, got := bytes.Repeat([]byte("bell"), 2048), make([]byte, 8192)
	copy(mem, data)
	end(export.Command{Op: nvme.IOWrite, LBA: 16, Blocks: 16, Data: mem}, export.Command{Op: nvme.IOFlush, Tag: 1})
	if _, err := d.ReadAtContext(t.Context(), got, 8192); err != nil || !bytes.Equal(got, data) {
		t.Errorf("written by the queue and read by the method: %v, equal %v", err, bytes.Equal(got, data))
	}
	end(export.Command{Op: nvme.IOWriteZeroes, LBA: 16, Blocks: 4, Tag: 2}, export.Command{Op: nvme.IODSM, LBA: 20, Blocks: 4, Data: mem[:nvme.DSMRangeSize], Tag: 3})
	clear(mem)
	end(export.Command{Op: nvme.IORead, LBA: 24, Blocks: 8, Data: mem[4096:]}) // not where the memory begins
	if !bytes.Equal(mem, append(make([]byte, 4096), data[4096:]...)) {
		t.Error("a read into the middle of memory has other bytes, or elsewhere")
	}
	if _, err := d.ReadAtContext(t.Context(), got, 8192); err != nil || !bytes.Equal(got, append(make([]byte, 4096), data[4096:]...)) {
		t.Errorf("zeroed and discarded is something else (%v)", err)
	}
	if n, err := q.Submit([]export.Command{{Op: nvme.IORead, Blocks: 8, Data: make([]byte, 4096)}}); n != 0 || !errors.Is(err, errForeign) {
		t.Errorf("memory of the heap: %d taken, %v", n, err)
	}
}
