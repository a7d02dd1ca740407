package hostnvme

import (
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/dmaguard"
	"github.com/shadowbell/shadowbell/shared/device/physical"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// exposed is a function that no IOMMU stands before. It finds memory by physical addresses, and nothing but what hostmed writes into its commands keeps it from any other:
//
//   - All memory that it is told of is pinned before it is, and unpinned when no command names it any more, or when the function was severed. See package physical.
//   - When this process dies a guard stops the function, and the memory is pinned until it has: package dmaguard.
//   - A function that was left running is stopped before it gets memory: sysfspci does that, and the kernel for VFIO.
type exposed struct {
	Function
	pins  *physical.Pins
	guard *dmaguard.Guard
}

// expose makes fn a function that moves data to and from memory of guests. lost is told if nothing would stop it any more.
func expose(address string, fn Function, lost func(error)) (_ *exposed, err error) {
	f := &exposed{Function: fn}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), fn.Unmap())
		}
	}()
	if f.pins, err = physical.NewPins(); err != nil {
		return nil, err
	}
	hold, err := f.pins.File()
	if err != nil {
		return nil, err
	}
	defer hold.Close()
	f.guard, err = dmaguard.Start(address, hold, lost)
	return f, err
}

// MapPages is of pager.
func (f *exposed) MapPages(mem []byte) (addresses []uint64, err error) { return f.pins.Pin(mem) }

// UnmapPages is of pager.
func (f *exposed) UnmapPages(mem []byte) error { return f.pins.Unpin(mem) }

// AllocDMA pins what the function's own way gives: huge pages do not move by themselves, but they are to be there as long as the guard holds them.
func (f *exposed) AllocDMA(size uint64) (*device.DMARegion, error) {
	mem, err := f.Function.AllocDMA(size)
	if err != nil {
		return nil, err
	}
	b, err := mem.Bytes(0, mem.Len())
	if err == nil {
		err = f.hold(b, mem)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%d bytes of DMA memory: %w", size, err), mem.Free())
	}
	return mem.Wrap(func(mem *device.DMARegion) error { return errors.Join(f.pins.Unpin(b), mem.Free()) }), nil
}

// hold pins b, the bytes of mem, which must be where it was.
func (f *exposed) hold(b []byte, mem *device.DMARegion) error {
	addresses, err := f.pins.Pin(b)
	if err != nil {
		return err
	}
	for i, a := range addresses {
		if at := mem.IOVAOf(uint64(i) * shm.PageSize); at != a {
			return errors.Join(fmt.Errorf("a page of it has moved from %#x to %#x before it was pinned: try again", at, a), f.pins.Unpin(b))
		}
	}
	return nil
}

// Close gives the function up. If it could not be stopped the guard tries that too, and holds the memory until then.
func (f *exposed) Close() error {
	err := f.Function.Close()
	if f.guard != nil {
		err = errors.Join(err, f.guard.Release(err == nil))
	}
	if f.pins != nil {
		err = errors.Join(err, f.pins.Close())
	}
	return err
}
