package ublk

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestDiskBackendDoesWhatCommandsSay(t *testing.T) {
	d := memdisk.New(256, 4096)
	b := NewDiskBackend(d)
	q, err := b.NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	var bufs [2]Buffer
	for i := range bufs {
		if bufs[i], err = b.Alloc(64 << 10); err != nil {
			t.Fatal(err)
		}
		defer bufs[i].Free()
	}
	end := func(cmds ...Command) map[uint64]nvme.Status {
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
			var out [1]Result
			n, _ := q.Reap(out[:])
			for _, r := range out[:n] {
				got[r.Tag] = r.Status
			}
		}
		return got
	}
	want := bytes.Repeat([]byte("ublk"), 2048)
	copy(bufs[0].Bytes(), want)
	iova := [2]uint64{bufs[0].IOVA(), bufs[1].IOVA()}
	for tag, s := range end(Command{Op: nvme.IOWrite, LBA: 2, Blocks: 2, IOVA: iova[0], Tag: 1}, Command{Op: nvme.IOFlush, Tag: 2},
		Command{Op: nvme.IOWrite, FUA: true, LBA: 8, Blocks: 2, IOVA: iova[0], Tag: 3}) {
		if !s.OK() {
			t.Errorf("command %d: %v", tag, s)
		}
	}
	end(Command{Op: nvme.IORead, LBA: 2, Blocks: 2, IOVA: iova[1]})
	if !bytes.Equal(bufs[1].Bytes()[:8192], want) {
		t.Error("read something else than was written")
	}
	end(Command{Op: nvme.IOWriteZeroes, LBA: 2, Blocks: 1})
	le.PutUint32(bufs[0].Bytes()[4:], 2)
	le.PutUint64(bufs[0].Bytes()[8:], 8)
	if got := end(Command{Op: nvme.IODSM, Blocks: 1, IOVA: iova[0], Tag: 4}); !got[4].OK() {
		t.Errorf("discard: %v", got[4])
	}
	end(Command{Op: nvme.IORead, LBA: 2, Blocks: 2, IOVA: iova[1]})
	if !bytes.Equal(bufs[1].Bytes()[:8192], append(make([]byte, 4096), want[4096:]...)) {
		t.Error("write zeroes has zeroed something else")
	}
	got := end(Command{Op: nvme.IORead, LBA: 1 << 30, Blocks: 1, IOVA: iova[1], Tag: 5}, Command{Op: 0x77, Tag: 6})
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
	b := NewDiskBackend(d)
	nq, err := b.NewQueue(depth)
	if err != nil {
		t.Fatal(err)
	}
	defer nq.Close()
	port := &fakePort{t: t, desc: make([]byte, depth*ioDescSize)}
	q := &queue{port: port, desc: port.desc, nvme: nq, backend: b, shift: 3, maxIO: 64 << 10, failed: func(err error) { t.Error(err) }}
	for tag := range depth {
		buf, err := b.Alloc(64 << 10)
		if err != nil {
			t.Fatal(err)
		}
		defer buf.Free()
		buf.Bytes()[0] = byte(tag + 1)
		q.bufs = append(q.bufs, buf)
		q.addrs = append(q.addrs, uint64(tag)+1000)
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
