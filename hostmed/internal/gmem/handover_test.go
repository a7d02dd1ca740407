package gmem

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// Where memory is in its file, whatever ranges it is mapped by.
func TestLocate(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 16)
	m.mustMap(t, 0x10000, 4*page, 2*page, dup(t, fd), true)  // pages 2 to 5
	m.mustMap(t, 0x14000, 2*page, 6*page, dup(t, fd), true)  // goes on in the file
	m.mustMap(t, 0x16000, 2*page, 12*page, dup(t, fd), true) // does not
	m.mustMap(t, 0x18000, 2*page, 14*page, fd, false)        // does, but is another mapping
	m.mustMap(t, 0x1a000, page, 0, memfd(t, 1), true)        // another file
	m.mustMap(t, 0x1b000, page, 0, -1, true)                 // none
	heap := shm.NewHeap(page)
	if err := m.MapRegion(0x1c000, heap, true); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		iova, n, off uint64
		ok           bool
	}{
		{0x10000, page, 2 * page, true}, {0x12345, 4, 4*page + 0x345, true}, {0x13ffc, 8, 5*page + 0xffc, true}, {0x10000, 6 * page, 2 * page, true},
		{0x15ff0, 32, 0, false}, {0x17000, 2 * page, 0, false}, {0x1a000, page, 0, true}, {0x1a000, 2 * page, 0, false},
		{0x1b000, 4, 0, false}, {0x1c000, 4, 0, false}, {0xf000, page, 0, false}, {0x1d000, 1, 0, false}, {1<<64 - 4, 4, 0, false},
	} {
		f, off, ok := m.Locate(x.iova, x.n)
		if ok != x.ok || off != x.off && ok {
			t.Errorf("%#x, +%#x: %#x, %v", x.iova, x.n, off, ok)
		}
		if !ok {
			if _, err := m.Open(f); !errors.Is(err, unix.EBADF) {
				t.Errorf("%#x opened: %v", x.iova, err)
			}
			continue
		}
		file, err := m.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		r, err := shm.Map(int(file.Fd()), int64(off), x.n, false)
		if err != nil {
			t.Fatal(err)
		}
		var there, here [4]byte
		if err := r.Read(0, there[:]); err != nil || !m.Table().ReadIOVA(x.iova, here[:]) || there != here {
			t.Errorf("%#x: % x in the file, % x in the table, %v", x.iova, there, here, err)
		}
		if _, err := unix.Pwrite(int(file.Fd()), []byte{1}, 0); !errors.Is(err, unix.EBADF) {
			t.Errorf("written: %v", err)
		}
		r.Close()
		file.Close()
	}
}

// What was unmapped cannot be opened any more, and no more descriptors are kept than that.
func TestKeptDescriptors(t *testing.T) {
	m := newMemory(t)
	fds, _ := held(t)
	for i := range uint64(MaxKept + 4) {
		m.mustMap(t, i*page, page, 0, memfd(t, 1), true)
	}
	if n, _ := held(t); n != fds+MaxKept {
		t.Errorf("%d descriptors for %d files", n-fds, MaxKept+4)
	}
	open := func(iova uint64) error {
		f, _, ok := m.Locate(iova, page)
		if !ok {
			t.Fatalf("%#x is not there", iova)
		}
		file, err := m.Open(f)
		if err == nil {
			file.Close()
		}
		return err
	}
	if err := open((MaxKept - 1) * page); err != nil {
		t.Error(err)
	}
	if err := open(MaxKept * page); !errors.Is(err, unix.EBADF) {
		t.Errorf("one too many: %v", err)
	}
	gone, _, _ := m.Locate(0, page)
	m.mustUnmap(t, 0, page)
	if _, err := m.Open(gone); !errors.Is(err, unix.EBADF) {
		t.Errorf("opened after it was unmapped: %v", err)
	}
	m.mustMap(t, 0, page, 0, memfd(t, 1), true) // has the place
	if err := open(0); err != nil {
		t.Error(err)
	}
}
