package hostnvme

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/physical"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// bareFunction is a function without an IOMMU, as far as memory goes.
type bareFunction struct {
	device.Device
	severed, closed, unmapped int
	moved                     uint64 // what it says too much of where its memory is
	closeErr                  error
}

func (f *bareFunction) Sever()       { f.severed++ }
func (f *bareFunction) Close() error { f.closed++; return f.closeErr }
func (f *bareFunction) Unmap() error { f.unmapped++; return nil }

func (f *bareFunction) AllocDMA(size uint64) (*device.DMARegion, error) {
	mem, err := shm.NewMemfd("test", size)
	if err != nil {
		return nil, err
	}
	b, _ := mem.Bytes(0, size)
	clear(b)
	at, err := physical.Addresses(b, page)
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	for i := range at {
		at[i] += f.moved
	}
	return device.NewDMARuns(mem, page, at, mem.Close)
}

// exposedTo makes f such a function, on a machine that tells where memory is.
func exposedTo(t *testing.T, f *bareFunction) *exposed {
	t.Helper()
	const nowhere = "fffe:1f:1f.7"
	e, err := expose(nowhere, f, func(err error) { t.Error(err) })
	if err == nil {
		var mem *device.DMARegion
		if mem, err = f.AllocDMA(page); err == nil {
			err = mem.Free()
		}
	}
	switch {
	case (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS)) && os.Getenv("CI") != "true":
		t.Skip(err)
	case err != nil:
		t.Fatal(err)
	}
	return e
}

// TestMemoryOfAnExposedFunction: a guest's and hostmed's own are pinned as long as they are the function's, and where they are said to be.
func TestMemoryOfAnExposedFunction(t *testing.T) {
	f := &bareFunction{}
	e := exposedTo(t, f)
	own, err := e.AllocDMA(16 * page)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := shm.NewMemfd("guest", 64*page)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	b, _ := guest.Bytes(0, guest.Len())
	at, err := e.MapPages(b)
	if err != nil {
		t.Fatal(err)
	}
	clear(b)
	want, err := physical.Addresses(b, page)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(at, want) {
		t.Errorf("the guest's pages are said to be at %#x, and are at %#x", at, want)
	}
	heap := heap(t, page)
	if _, err := e.MapPages(heap); err == nil {
		t.Error("memory of this process alone was pinned")
	}
	if err := errors.Join(e.UnmapPages(b), own.Free()); err != nil {
		t.Error(err)
	}

	f.moved = page
	if _, err := e.AllocDMA(4 * page); err == nil || !strings.Contains(err.Error(), "moved") {
		t.Errorf("memory that is elsewhere: %v", err)
	}
	if err := e.Close(); err != nil || f.closed != 1 {
		t.Errorf("closed %d times: %v", f.closed, err)
	}
	if _, err := e.MapPages(b); err == nil {
		t.Error("memory was pinned for a function that is closed")
	}
	if err := e.UnmapPages(b); err != nil {
		t.Error(err)
	}
}

// TestExposedFunctionThatCannotBeStopped: the guard tries too, and Close says so.
func TestExposedFunctionThatCannotBeStopped(t *testing.T) {
	f := &bareFunction{closeErr: unix.EIO}
	e := exposedTo(t, f)
	if err := e.Close(); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if err := e.guard.Release(true); err != nil {
		t.Error(err)
	}
}
