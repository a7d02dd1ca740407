package backend

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/uring"
)

var plainFacts = blockFacts{disk: "disk", name: "disk", logical: 512, dmaMask: 511, discardMax: 1 << 30, writeBack: true}

// blockOverFile is the backend of a block device over a regular file.
func blockOverFile(t testing.TB, size uint64, s Spec, x blockFacts) (Backend, error) {
	t.Helper()
	s.Path = filepath.Join(diskDir(t), "device")
	f, err := os.OpenFile(s.Path, os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	b, err := newBlock(s, f, x, &disks)
	if err != nil {
		f.Close()
		return nil, err
	}
	return b, nil
}

func TestBlockShowsTheDevice(t *testing.T) {
	x := plainFacts
	x.logical, x.physical, x.minimal, x.optimal = 512, 4096, 8192, 65536
	x.discardUnit, x.boundary, x.start = 1<<20, 128<<10, 1<<20
	i := opened(t)(blockOverFile(t, 1<<20+512, Spec{Kind: KindBlock}, x)).Info()
	if i.LBAShift != 9 || i.Blocks != 2049 || i.WriteBlocks != 16 || i.OptimalWrite != 128 || i.OptimalBlocks != 2048 || i.Boundary != 256 || !i.VolatileCache || !i.Discard || i.DiscardZeroes {
		t.Errorf("%+v", i)
	}
	// Blocks may be larger than the device's, and what is left over is nobody's.
	x.writeBack, x.start, x.discardMax = false, 512, 0
	i = opened(t)(blockOverFile(t, 1<<20+512, Spec{Kind: KindBlock, LBA: 4096}, x)).Info()
	if i.LBAShift != 12 || i.Blocks != 256 || i.WriteBlocks != 1 || i.OptimalWrite != 0 || i.Boundary != 0 || i.OptimalBlocks != 0 || i.VolatileCache || i.Discard {
		t.Errorf("%+v", i)
	}
}

// TestBlockWarnings: blocks that can tear are worth a word, those of the device's own are not.
func TestBlockWarnings(t *testing.T) {
	for _, c := range []struct {
		lba      uint32
		physical uint64
		readOnly bool
		warns    bool
	}{{0, 512, false, false}, {4096, 512, false, true}, {4096, 4096, false, false}, {4096, 512, true, false}} {
		x := plainFacts
		x.physical = c.physical
		b := opened(t)(blockOverFile(t, 1<<20, Spec{Kind: KindBlock, LBA: c.lba, ReadOnly: c.readOnly, NoPin: true}, x)).(*block)
		if got := strings.Join(b.Warnings(), "\n"); strings.Contains(got, "power fails") != c.warns {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestBlockRefusesWithARemedy(t *testing.T) {
	for _, c := range []struct {
		s    Spec
		edit func(*blockFacts)
		says string
	}{
		{Spec{LBA: 512}, func(x *blockFacts) { x.logical = 4096 }, "give lba=4096 or more"},
		{Spec{}, func(x *blockFacts) { x.logical = 520 }, "520 bytes"},
		{Spec{Poll: true}, func(*blockFacts) {}, "nvme.poll_queues"},
		{Spec{}, func(x *blockFacts) { x.readOnly = true }, "add readonly"},
	} {
		x := plainFacts
		c.edit(&x)
		c.s.Kind = KindBlock
		b, err := blockOverFile(t, 1<<20, c.s, x)
		if err == nil {
			b.Close()
			t.Errorf("%+v: it is served", c.s)
			continue
		}
		oneLine(t, err, c.says)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{dir: "no block device", file: "use file:", "/dev/null": "character device", filepath.Join(dir, "none"): "correct the path"} {
		_, err := Open("block:" + path)
		oneLine(t, err, says)
	}
}

func TestBlockFacts(t *testing.T) {
	h := diskHost{sys: t.TempDir()}
	put := func(path, text string) {
		path = filepath.Join(h.sys, "class/block/nvme0n1", path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for path, text := range map[string]string{
		"queue/physical_block_size": "4096", "queue/minimum_io_size": "8192", "queue/optimal_io_size": "65536", "queue/chunk_sectors": "256",
		"queue/discard_granularity": "1048576", "queue/discard_max_bytes": "2147483648", "queue/dma_alignment": "3", "queue/write_cache": "write back",
		"queue/io_poll": "1", "queue/zoned": "none", "ro": "0", "wwid": "eui.0123", "nvme0n1p3/partition": "3", "nvme0n1p3/ro": "1",
	} {
		put(path, text)
	}
	got := blockFacts{disk: "nvme0n1", name: "nvme0n1p3", logical: 512}
	if err := h.read(&got); err != nil {
		t.Fatal(err)
	}
	want := blockFacts{
		disk: "nvme0n1", name: "nvme0n1p3", key: "wwid=eui.0123#3", logical: 512, physical: 4096, minimal: 8192, optimal: 65536,
		discardUnit: 1 << 20, discardMax: 2 << 30, boundary: 128 << 10, dmaMask: 3, writeBack: true, polls: true, readOnly: true,
	}
	if got != want {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	put("queue/zoned", "host-managed")
	oneLine(t, h.read(&got), "host-managed")
}

func TestBlockStatus(t *testing.T) {
	for e, want := range map[unix.Errno]nvme.Status{
		0: nvme.StatusSuccess, unix.EIO: nvme.StatusUnrecoveredRead, unix.ENODATA: nvme.StatusUnrecoveredRead, unix.EBADE: nvme.StatusReservationConflict.WithDNR(),
		unix.EILSEQ: nvme.StatusGuardCheck, unix.ENOLINK: nvme.StatusInternalPathError, unix.EREMOTEIO: nvme.StatusInternalError,
		unix.ENOSPC: nvme.StatusCapacityExceeded.WithDNR(), unix.ENODEV: nvme.StatusInternalPathError,
	} {
		if got := deviceStatus(OpRead, e); got != want {
			t.Errorf("%v: %v, want %v", e, got, want)
		}
	}
}

// TestBlockFlushFailsOnce: a device says each time what has become of a flush.
func TestBlockFlushFailsOnce(t *testing.T) {
	b := opened(t)(blockOverFile(t, 1<<20, Spec{Kind: KindBlock}, plainFacts)).(*block)
	if st := b.syncStatus(OpFlush, unix.EIO); st != nvme.StatusWriteFault {
		t.Error(st)
	}
	mustRun(t, newQueue(t, b), &Request{Op: OpFlush})
}

// TestBlockRegistersMemory: transfers of one piece go by registered memory, and others do not.
func TestBlockRegistersMemory(t *testing.T) {
	b := opened(t)(blockOverFile(t, 1<<20, Spec{Kind: KindBlock}, plainFacts))
	q := newQueue(t, b)
	mem := pattern(guestMemory(t, 64<<10), 1)
	q.AddMemory(mem)
	for range 2 * registerAfter {
		mustRun(t, q, read(0, mem[:512]))
	}
	if q.(*fileQueue).fixed.next == 0 {
		lacks(t, "the kernel registers no memory here: RLIMIT_MEMLOCK or its age")
	}
	pattern(mem, 1)
	mustRun(t, q, write(0, mem[:8192]), write(8192, mem[8192:12288], mem[16384:20480]))
	got := guestMemory(t, 16<<10)
	mustRun(t, q, read(0, got))
	expect(t, got[:12288], mem[:12288], "registered")
	expect(t, got[12288:], mem[16384:20480], "registered, in pieces")
	clear(mem)
	mustRun(t, q, read(0, mem[:16384]))
	expect(t, mem[:16384], got, "read to registered memory")
	q.RemoveMemory(mem)
	mustRun(t, q, read(0, mem[:16384]))
}

// TestBlockTwoRings: where one ring polls, what it cannot do goes to another, and all of it comes back.
func TestBlockTwoRings(t *testing.T) {
	b := opened(t)(blockOverFile(t, testSize, Spec{Kind: KindBlock}, plainFacts))
	q := newQueue(t, b).(*fileQueue)
	aux, err := uring.New(uring.Config{Entries: 8})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(aux.RegisterFiles([]int{b.(*block).fd}), aux.RegisterEventFD(q.evfd)); err != nil {
		t.Fatal(err)
	}
	counted := &countedRing{ring: aux}
	q.aux = counted
	if !q.Polled() {
		t.Error("nobody is told to look for completions")
	}
	mem := pattern(guestMemory(t, 1<<20), 9)
	var reqs []*Request
	for i := range 64 { // more than the second ring takes at once
		r := write(uint64(i)<<14, mem[i<<14:][:1<<14])
		r.FUA = i%2 == 0
		reqs = append(reqs, r)
	}
	mustRun(t, q, append(reqs, &Request{Op: OpFlush}, &Request{Op: OpDiscard, Off: 4 << 20, Len: 1 << 20}, &Request{Op: OpWriteZeroes, Off: 2 << 20, Len: 1 << 20})...)
	if counted.n < 35 {
		t.Errorf("%d entries on the second ring; want 32 of FUA and 3 that are no transfers", counted.n)
	}
	before := counted.n
	got := guestMemory(t, 1<<20)
	mustRun(t, q, read(0, got))
	expect(t, got, mem, "by two rings")
	if counted.n != before {
		t.Error("a read went to the second ring")
	}
}

type countedRing struct {
	ring
	n int
}

func (r *countedRing) GetSQE() *uring.SQE {
	e := r.ring.GetSQE()
	if e != nil {
		r.n++
	}
	return e
}

// lacks ends a test for which the machine has not what it takes: in CI as a failure.
func lacks(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// loopDevice makes a loop device of a new file.
func loopDevice(t *testing.T, size int64) (device, file string) {
	t.Helper()
	file = filepath.Join(diskDir(t), "loop.img")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--direct-io=on", "--find", "--show", file).CombinedOutput()
	if err != nil {
		lacks(t, fmt.Sprintf("no loop devices here: %v: %s", err, bytes.TrimSpace(out)))
	}
	device = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return device, file
}

// loopHost is this machine with locks of its own.
func loopHost(t *testing.T) *diskHost {
	h := disks
	h.locks = t.TempDir()
	return &h
}

func TestBlockOverLoop(t *testing.T) {
	device, file := loopDevice(t, testSize)
	h := loopHost(t)
	b, err := openBlock(Spec{Kind: KindBlock, Path: device}, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	_, err = openBlock(Spec{Kind: KindBlock, Path: device}, h, nil)
	oneLine(t, err, "in use")
	if fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL, 0); err != unix.EBUSY {
		unix.Close(fd)
		t.Errorf("somebody else claims it: %v", err)
	}
	for _, c := range []func(*testing.T, Backend){writeRead, pieces, bothEnds, zeroes, discard, flushes} {
		c(t, b)
	}
	// Bytes are where the host has them.
	q, err := b.NewQueue()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	mem := pattern(guestMemory(t, 1<<20), 5)
	mustRun(t, q, write(1<<20, mem), &Request{Op: OpFlush})
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, got[1<<20:2<<20], mem, "of the host")
	mustRun(t, q, &Request{Op: OpDiscard, Off: 1 << 20, Len: 1 << 20}, &Request{Op: OpDiscard, Len: 1 << 20})
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	if held := st.Blocks << 9; b.Info().Discard && held > 6<<20 {
		t.Errorf("%d bytes of %d are allocated after a discard of 2 MiB", held, testSize)
	}
}

func TestBlockWatchSeesSizeAndClose(t *testing.T) {
	device, file := loopDevice(t, testSize)
	h := loopHost(t)
	b, err := openBlock(Spec{Kind: KindBlock, Path: device}, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	events := make(chan Event, 10)
	b.(Watched).Watch(func(e Event) { events <- e })
	if err := os.Truncate(file, 2*testSize); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("losetup", "--set-capacity", device).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if e := received(t, events); e != EventChanged {
		t.Errorf("event %d", e)
	}
	a := b.(Alterable)
	if !a.Resized() || a.Resize() != nil || b.Info().Size() != 2*testSize || a.Resized() {
		t.Errorf("%+v", b.Info())
	}
}

// TestBlockWatchWithoutEvents: the clock sees it too, and the end is told once.
func TestBlockWatchWithoutEvents(t *testing.T) {
	h := diskHost{sys: t.TempDir()}
	at := filepath.Join(h.sys, "class/block/disk")
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	b := opened(t)(blockOverFile(t, 1<<20, Spec{Kind: KindBlock}, plainFacts)).(*block)
	b.h, b.events = &h, &ueventHub{open: func() (ueventSource, error) { return nil, unix.EPERM }}
	events := make(chan Event, 10)
	b.Watch(func(e Event) { events <- e })
	if err := b.f.Truncate(2 << 20); err != nil {
		t.Fatal(err)
	}
	if e := received(t, events); e != EventChanged {
		t.Errorf("event %d, want a change", e)
	}
	if err := os.Remove(at); err != nil {
		t.Fatal(err)
	}
	if e := received(t, events); e != EventGone {
		t.Errorf("event %d, want the end", e)
	}
	select {
	case <-b.stopped:
	case <-time.After(20 * time.Second):
		t.Error("it is still watched")
	}
}

func TestBlockSpec(t *testing.T) {
	for in, want := range map[string]Spec{
		"block:/dev/x":                        {Kind: KindBlock, Path: "/dev/x"},
		"block:/dev/x,lba=512":                {Kind: KindBlock, Path: "/dev/x", LBA: 512},
		"block:/dev/x,lba=4096,poll,readonly": {Kind: KindBlock, Path: "/dev/x", LBA: 4096, Poll: true, ReadOnly: true},
		"block:/dev/x,,y,nopin":               {Kind: KindBlock, Path: "/dev/x,y", NoPin: true},
	} {
		s, err := ParseSpec(in)
		if err != nil || s != want || s.String() != in {
			t.Errorf("%s: %+v, %q, %v", in, s, s.String(), err)
		}
	}
	_, err := ParseSpec("block:/dev/x,size=1GiB")
	oneLine(t, err, "no option of block")
	if got := fmt.Sprint(syntaxes[KindBlock].takes()); got != "lba=, poll, nopin, readonly" {
		t.Error(got)
	}
}
