package shm_test

import (
	"errors"
	"testing"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestStitch(t *testing.T) {
	notHeldMore(t)
	a, err := shm.NewMemfd("shm-test", 8*shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	b, err := shm.NewMemfd("shm-test", 2*shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var parts []*shm.Region
	for _, p := range []struct {
		of     *shm.Region
		off, n uint64
	}{{a, 5, 1}, {b, 0, 2}, {a, 1, 2}, {a, 1, 1}} {
		v, err := p.of.View(p.off*shm.PageSize, p.n*shm.PageSize)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, v)
	}
	short, err := a.View(0, 100)
	if err != nil {
		t.Fatal(err)
	}
	r, err := shm.Stitch(append(parts, short))
	if err != nil {
		t.Fatal(err)
	}
	if r.Len() != 6*shm.PageSize+100 || r.FD() != -1 {
		t.Errorf("%d bytes, descriptor %d", r.Len(), r.FD())
	}
	at := uint64(0)
	for i, p := range append(parts, short) {
		if !r.Overlaps(r) || r.Overlaps(p) {
			t.Error("the stitched memory is where its parts are")
		}
		if err := p.Write(p.Len()-1, []byte{byte(i + 1)}); err != nil {
			t.Fatal(err)
		}
		got := []byte{0}
		if err := r.Read(at+p.Len()-1, got); err != nil || got[0] != byte(i+1) {
			t.Errorf("part %d: %d, %v", i, got[0], err)
		}
		at += p.Len()
	}
	// The parts go first.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := shm.Guard(func() { _ = r.Zero(0, r.Len()) }); err != nil {
		t.Error(err)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
}

func TestStitchRefuses(t *testing.T) {
	notHeldMore(t)
	m, err := shm.NewMemfd("shm-test", 4*shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	odd, _ := m.View(8, shm.PageSize)
	short, _ := m.View(0, 100)
	page, _ := m.View(0, shm.PageSize)
	none, _ := m.View(0, 0)
	for name, parts := range map[string][]*shm.Region{
		"nothing": nil, "odd": {page, odd}, "short inside": {short, page}, "empty": {none}, "private memory": {shm.NewHeap(shm.PageSize), page},
	} {
		if r, err := shm.Stitch(parts); err == nil {
			t.Errorf("%s: stitched %d bytes", name, r.Len())
		}
	}
	// All of the process have a limit, and what is closed, or failed, counts no more.
	var many []*shm.Region
	for range 1000 {
		many = append(many, page)
	}
	var open []*shm.Region
	for range shm.MaxStitched / 1000 {
		r, err := shm.Stitch(many)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, r)
	}
	if _, err := shm.Stitch(many); !errors.Is(err, shm.ErrTooManyParts) {
		t.Errorf("past the limit: %v", err)
	}
	for _, r := range open {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	r, err := shm.Stitch(many)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
