package ublk

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestMethodsDoWhatCommandsSay(t *testing.T) {
	d := memdisk.New(256, 4096)
	b := methods{d}
	q, err := b.NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	out, in := make([]byte, 8192), make([]byte, 8192)
	end := func(cmds ...export.Command) map[uint64]nvme.Status {
		t.Helper()
		if n, err := q.Submit(cmds); n != len(cmds) || err != nil {
			t.Fatal(n, err)
		}
		if err := q.Publish(); err != nil {
			t.Fatal(err)
		}
		got := map[uint64]nvme.Status{}
		for q.Outstanding() > 0 {
			if asleep, err := q.Arm(); err != nil {
				t.Fatal(err)
			} else if asleep {
				if n, err := unix.Poll([]unix.PollFd{{Fd: int32(q.EventFD()), Events: unix.POLLIN}}, 10_000); n != 1 && err != unix.EINTR {
					t.Fatalf("no wake-up: %d, %v", n, err)
				}
			}
			var out [1]export.Result
			n, _ := q.Reap(out[:])
			for _, r := range out[:n] {
				got[r.Tag] = r.Status
			}
		}
		return got
	}
	want := bytes.Repeat([]byte("ublk"), 2048)
	copy(out, want)
	for tag, s := range end(export.Command{Op: nvme.IOWrite, LBA: 2, Blocks: 2, Data: out, Tag: 1}, export.Command{Op: nvme.IOFlush, Tag: 2},
		export.Command{Op: nvme.IOWrite, FUA: true, LBA: 8, Blocks: 2, Data: out, Tag: 3}) {
		if !s.OK() {
			t.Errorf("command %d: %v", tag, s)
		}
	}
	if d.Count[memdisk.WriteFUA].Load() != 1 || d.Count[memdisk.Flush].Load() != 1 {
		t.Error("not one write by FUA and one flush")
	}
	end(export.Command{Op: nvme.IORead, LBA: 2, Blocks: 2, Data: in})
	if !bytes.Equal(in, want) {
		t.Error("read something else than was written")
	}
	if got := end(export.Command{Op: nvme.IOWriteZeroes, LBA: 2, Blocks: 1, Tag: 7}, export.Command{Op: nvme.IODSM, LBA: 8, Blocks: 2, Data: out[:16], Tag: 4}); !got[4].OK() || !got[7].OK() {
		t.Errorf("write zeroes: %v, discard: %v", got[7], got[4])
	}
	for lba, want := range map[uint64][]byte{2: append(make([]byte, 4096), want[4096:]...), 8: make([]byte, 8192)} {
		end(export.Command{Op: nvme.IORead, LBA: lba, Blocks: 2, Data: in})
		if !bytes.Equal(in, want) {
			t.Errorf("block %d: something else was zeroed, or discarded", lba)
		}
	}
	got := end(export.Command{Op: nvme.IORead, LBA: 1 << 30, Blocks: 2, Data: in, Tag: 5}, export.Command{Op: 0x77, Tag: 6})
	if got[5].OK() || got[6].Code() != nvme.StatusInvalidOpcode {
		t.Errorf("beyond the end %v, unknown %v", got[5], got[6])
	}
	if b.Again(errors.New("x")) {
		t.Error("a disk is not reset")
	}
}

// TestQueueOverDisk is the whole queue over a Disk, with a kernel that is a fake: random order, nothing lost.
func TestQueueOverDisk(t *testing.T) {
	const depth = 16
	d := memdisk.New(1024, 4096)
	b := methods{d}
	nq, err := b.NewQueue(depth)
	if err != nil {
		t.Fatal(err)
	}
	defer nq.Close()
	port := &fakePort{t: t, desc: make([]byte, depth*ioDescSize)}
	q := &queue{port: port, desc: port.desc, nvme: nq, disk: b, shift: 3, failed: func(err error) { t.Error(err) }}
	for tag := range depth {
		mem, free, err := b.DMAMemory(64 << 10)
		if err != nil {
			t.Fatal(err)
		}
		defer free()
		mem[0] = byte(tag + 1)
		q.bufs = append(q.bufs, buffer{mem: mem, addr: uint64(tag) + 1000})
	}
	if err := q.begin(); err != nil {
		t.Fatal(err)
	}
	rounds := 0
	port.onWait = func() {
		if port.watched != 0 {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(port.watched), Events: unix.POLLIN}}, 100)
			port.events = append(port.events, event{watch: true})
			port.watched = 0
			return
		}
		if rounds++; rounds > 20 {
			port.stop(depth)
			return
		}
		for tag := range uint16(depth) {
			port.request(tag, opWrite, 8, uint64(tag)*8)
		}
	}
	if err := q.run(); err != nil {
		t.Fatal(err)
	}
	if got := q.counts.Requests.Load(); got != 20*depth || len(port.done) != 20*depth {
		t.Errorf("%d requests, %d ended, want %d", got, len(port.done), 20*depth)
	}
	for _, e := range port.done {
		if e.result != 4096 {
			t.Fatalf("tag %d ended with %d", e.tag, e.result)
		}
	}
	var p [4096]byte
	for tag := range depth {
		if _, err := d.ReadAtContext(t.Context(), p[:], int64(tag)*4096); err != nil || p[0] != byte(tag+1) {
			t.Errorf("block %d has %d: %v", tag, p[0], err)
		}
	}
}
