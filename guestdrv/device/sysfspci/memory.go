package sysfspci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/device"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const hugePage = 2 << 20

// AllocDMA returns memory that is contiguous in physical memory too: a huge page, or, for no more than that, an ordinary page.
func (d *Device) AllocDMA(size uint64) (*device.DMARegion, error) {
	switch {
	case size == 0 || size > hugePage:
		return nil, fmt.Errorf("%d bytes of DMA memory in one piece: without an IOMMU there is a huge page of %d at most", size, hugePage)
	case size <= shm.PageSize:
		mem, err := shm.NewMemfd("sysfspci", size)
		if err != nil {
			return nil, err
		}
		return pin(mem, func() error { return nil })
	}
	fd, err := unix.MemfdCreate("sysfspci", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err == nil {
		if err = unix.Ftruncate(fd, hugePage); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, noHugePage(err)
	}
	mem, err := shm.Map(fd, 0, hugePage, true)
	if err != nil {
		unix.Close(fd)
		return nil, noHugePage(err)
	}
	return pin(mem, func() error { return unix.Close(fd) })
}

func noHugePage(err error) error {
	return fmt.Errorf("no huge page of %d bytes is free: make some (echo 32 > /proc/sys/vm/nr_hugepages): %w", hugePage, err)
}

// pin makes mem stay where it is, and finds out where that is.
func pin(mem *shm.Region, done func() error) (_ *device.DMARegion, err error) {
	free := func() error { return errors.Join(mem.Close(), done()) }
	defer func() {
		if err != nil {
			_ = free()
		}
	}()
	b, err := mem.Bytes(0, mem.Len())
	if err != nil {
		return nil, err
	}
	if err := unix.Mlock(b); err != nil {
		return nil, fmt.Errorf("locking %d bytes of DMA memory: %w (raise the limit: ulimit -l unlimited)", len(b), err)
	}
	clear(b) // so that it is there
	entry := make([]byte, 8)
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, fmt.Errorf("physical addresses: %w", err)
	}
	defer f.Close()
	if _, err := f.ReadAt(entry, int64(addressOf(b)/shm.PageSize*8)); err != nil {
		return nil, fmt.Errorf("physical addresses: %w", err)
	}
	physical, err := frame(binary.LittleEndian.Uint64(entry))
	if err != nil {
		return nil, err
	}
	return device.NewDMARegion(mem, physical, free), nil
}

// frame returns the physical address in an entry of pagemap: Documentation/admin-guide/mm/pagemap.rst.
func frame(entry uint64) (uint64, error) {
	const present, number = 1 << 63, 1<<55 - 1
	switch {
	case entry&present == 0:
		return 0, errors.New("DMA memory is not in memory, though it was locked")
	case entry&number == 0:
		return 0, fmt.Errorf("the kernel does not tell physical addresses: run as root, with CAP_SYS_ADMIN: %w", unix.EPERM)
	}
	return entry & number * shm.PageSize, nil
}
