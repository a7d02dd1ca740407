package trace

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// loopDisk is a disk of this machine: a loop device over a file. Its name is as in /dev.
func loopDisk(t testing.TB, size int64) string {
	t.Helper()
	needBPF(t)
	back, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if err := back.Truncate(size); err != nil {
		t.Fatal(err)
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	for range 20 { // others take loop devices too
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("loop%d", n)
		disk, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlLoopConfigure(int(disk.Fd()), &unix.LoopConfig{Fd: uint32(back.Fd())})
		if err == unix.EBUSY {
			disk.Close()
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.IoctlSetInt(int(disk.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
				t.Error(err)
			}
			disk.Close()
		})
		return name
	}
	t.Fatal("no free loop device")
	return ""
}

// direct reads or writes n times, past the page cache.
func direct(t testing.TB, disk string, n, size int, write bool) {
	t.Helper()
	fd, err := unix.Open("/dev/"+disk, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(buf)
	for i := range n {
		do := unix.Pread
		if write {
			do = unix.Pwrite
		}
		if got, err := do(fd, buf, int64(i%16*size)); err != nil || got != size {
			t.Fatalf("%d of %d bytes: %v", got, size, err)
		}
	}
}

// block opens a trace of the block layer, where NVMe is not needed.
func block(t testing.TB) *Tracer {
	t.Helper()
	needBPF(t)
	tr, err := Open(t.Context(), Options{Block: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func TestBlockLayerIsCountedExactly(t *testing.T) {
	disk := loopDisk(t, 8<<20)
	tr := block(t)
	if err := tr.Missing(Block); err != nil {
		t.Fatal(err)
	}
	before, err := tr.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	direct(t, disk, 300, 4096, true)
	direct(t, disk, 200, 16384, false)
	took := time.Since(begin)
	after, err := tr.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, c := range after.Sub(before).Block {
		if c.Disk != disk {
			continue
		}
		want := map[byte][2]uint64{'W': {300, 300 * 4096}, 'R': {200, 200 * 16384}}[c.Op]
		if c.Count != want[0] || c.Bytes != want[1] {
			t.Errorf("%c: %d of %d bytes, want %d", c.Op, c.Count, c.Bytes, want)
		}
		if c.InDevice.Sum() <= 0 || c.InDevice.Sum() > took || c.InDevice.Quantile(0.5) <= 0 {
			t.Errorf("%c: %v in the device, median %v; all took %v", c.Op, c.InDevice.Sum(), c.InDevice.Quantile(0.5), took)
		}
		found++
	}
	if found != 2 {
		t.Errorf("%s has %d of 2 cells: %+v", disk, found, after.Block)
	}
	if after.Losses != (Losses{}) {
		t.Errorf("lost %+v", after.Losses)
	}
	hits := map[string]uint64{}
	for _, h := range tr.Hooks() {
		hits[h.Name] = h.Hits
	}
	if hits["block:block_rq_issue"] < 500 || hits["block:block_rq_complete"] < 500 {
		t.Errorf("hits %v", hits)
	}
}

// TestMissingDriver is of a machine without NVMe, as CI's is: what can work works, the rest says what is missing and what helps.
func TestMissingDriver(t *testing.T) {
	if noDriver() == "" {
		if os.Getenv("CI") != "true" {
			t.Skip("this machine has the driver")
		}
		t.Fatal("CI's machine has the driver: this test needs one that has not")
	}
	needBPF(t)
	tr, err := Open(t.Context(), Options{})
	if err == nil {
		tr.Close()
		t.Fatal("opened")
	}
	for _, want := range []string{"NVMe", "nvme_complete_rq", "nvme driver", ": "} {
		if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q without %q, or of several lines", err, want)
		}
	}
	tr = block(t)
	if err := tr.Missing(NVMe); err == nil || !strings.Contains(err.Error(), "nvme driver") {
		t.Errorf("%v", err)
	}
	if err := tr.Missing(KVM); err == nil || !strings.Contains(err.Error(), "not asked") {
		t.Errorf("%v", err)
	}
	for _, h := range tr.Hooks() {
		if h.Part == NVMe && (h.Attached || h.Why == "" || h.Without == "") {
			t.Errorf("%+v", h)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{Devices: []uint16{1024}}, "nvme1024"},
		{Options{RingBytes: -1}, "ring"},
		{Options{RingBytes: MaxRing + 1}, "ring"},
		{Options{MinLatency: -1}, "latency"},
	} {
		if tr, err := Open(t.Context(), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.o, err)
			if err == nil {
				tr.Close()
			}
		}
	}
}

func TestFormatOfATracepoint(t *testing.T) {
	needBPF(t)
	fs, err := openTracefs()
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	fields, err := fs.format("block", "block_rq_issue")
	if err != nil {
		t.Fatal(err)
	}
	if fields["common_pid"] != 4 || fields["dev"] != 8 || fields["sector"] != 16 || fields["rwbs"] == 0 {
		t.Errorf("%v", fields)
	}
	if id, err := fs.id("block", "block_rq_issue"); err != nil || id == 0 {
		t.Errorf("%d, %v", id, err)
	}
	for _, bad := range []string{"", "field:int x;\toffset:4096;\tsize:4;", "field:int x;\toffset:y;\tsize:4;", "field:int x;\tsize:4;\toffset:8;"} {
		if f, err := parseFormat(bytes.NewReader([]byte(bad))); err == nil {
			t.Errorf("%q: %v", bad, f)
		}
	}
}
