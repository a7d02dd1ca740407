package volatile

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var chance = rand.New(rand.NewPCG(3, 4))

// TestCut: what is synced is there, what is not is there or not, sector by sector.
func TestCut(t *testing.T) {
	d := New(1 << 20)
	old, young := bytes.Repeat([]byte{1}, 64*sector), bytes.Repeat([]byte{2}, 64*sector)
	d.write(old, 0, int64(len(old)), false)
	if d.Cut(chance, 0)[0] != 0 || d.Cut(chance, 1)[0] != 1 {
		t.Error("a write that is not synced is there for certain, or never")
	}
	d.sync()
	if d.Cut(chance, 0)[0] != 1 {
		t.Error("what was synced is lost")
	}
	d.write(young, 0, int64(len(young)), false)
	image := d.Cut(chance, 0.5)
	news := 0
	for off := 0; off < len(old); off += sector {
		switch s := image[off : off+sector]; {
		case bytes.Equal(s, young[:sector]):
			news++
		case !bytes.Equal(s, old[:sector]):
			t.Error("a sector is torn")
		}
	}
	if news == 0 || news == 64 {
		t.Errorf("%d of 64 sectors are new", news)
	}
	// A durable write is one for itself.
	d.write(young[:sector], 0, sector, true)
	if image := d.Cut(chance, 0); image[0] != 2 || image[sector] != 1 {
		t.Errorf("after a durable write of the first sector: %d, %d", image[0], image[sector])
	}
	if d.write(old, 1<<20-sector, int64(len(old)), false) || d.write(old, -1, 1, false) {
		t.Error("written beyond the end")
	}
}

// TestFile: the kernel passes on what it is asked for.
func TestFile(t *testing.T) {
	d := New(1 << 20)
	m := MountFor(t, d)
	f, err := os.OpenFile(m.Path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := int(f.Fd())
	p, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(p)
	for i := range p {
		p[i] = 7
	}
	at := func(off int) byte { return d.Cut(chance, 0)[off] }
	if _, err := unix.Pwrite(fd, p, 0); err != nil || at(0) != 0 {
		t.Fatalf("%v, %d after a write", err, at(0))
	}
	if err := unix.Fdatasync(fd); err != nil || at(0) != 7 || at(8191) != 7 {
		t.Fatalf("%v, %d after fdatasync", err, at(0))
	}
	if _, err := unix.Pwritev2(fd, [][]byte{p}, 16384, unix.RWF_DSYNC); err != nil || at(16384) != 7 {
		t.Fatalf("%v, %d after RWF_DSYNC", err, at(16384))
	}
	if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err != nil || at(0) != 7 {
		t.Fatalf("%v, %d after a hole was punched", err, at(0))
	}
	if n, err := unix.Pread(fd, p, 0); n != 8192 || err != nil || p[0] != 0 || p[4096] != 7 {
		t.Fatalf("%d, %v: %d %d", n, err, p[0], p[4096])
	}
	if s := d.Stats(); s.Syncs < 1 || s.Durable < 1 {
		t.Errorf("%+v", s)
	}
}
