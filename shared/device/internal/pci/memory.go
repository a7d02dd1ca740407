package pci

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/physical"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// HugePage is the size of the huge pages that are used, in bytes.
const HugePage = 2 << 20

// freeHugePages is where the kernel tells how many there are.
const freeHugePages = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"

// NewHugePages returns size bytes, rounded up, of zeroed memory in huge pages, all of them there.
func NewHugePages(size uint64) (*shm.Region, error) {
	n := size/HugePage + min(size%HugePage, 1)
	mem, err := newHugePages(n * HugePage)
	if err != nil {
		free, _ := os.ReadFile(freeHugePages) // without it the message only says less
		return nil, fmt.Errorf("%d huge pages of %d bytes wanted, %s free: make some (echo %d > /proc/sys/vm/nr_hugepages): %w",
			n, HugePage, strings.TrimSpace(string(free)), n, err)
	}
	return mem, nil
}

func newHugePages(size uint64) (*shm.Region, error) {
	fd, err := unix.MemfdCreate("nvme-dma", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) // the mapping keeps the memory
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	mem, err := shm.Map(fd, 0, size, true)
	if err != nil {
		return nil, err
	}
	b, err := mem.Bytes(0, size)
	if err == nil {
		// Pages that a limit of the control group denies would be a SIGBUS at the first touch; this way they are an error.
		if err = unix.Madvise(b, unix.MADV_POPULATE_WRITE); errors.Is(err, unix.EINVAL) {
			clear(b) // Linux before 5.14
			err = nil
		}
	}
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return mem, nil
}

// NewPhysical returns size bytes of zeroed memory, rounded up, whose IOVAs are physical addresses, for a function without an IOMMU. It
// is made of huge pages, which the kernel does not move; for no more than an ordinary page one of those will do.
func NewPhysical(size uint64) (*device.DMARegion, error) {
	if size == 0 {
		return nil, errors.New("0 bytes of DMA memory")
	}
	mem, err := NewHugePages(size)
	page := uint64(HugePage)
	if err != nil && size <= shm.PageSize {
		page = shm.PageSize
		mem, err = newLockedPage()
	}
	if err != nil {
		return nil, err
	}
	r, err := physicalRegion(mem, page)
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return r, nil
}

func newLockedPage() (*shm.Region, error) {
	mem, err := shm.NewMemfd("nvme-dma", shm.PageSize)
	if err != nil {
		return nil, err
	}
	b, err := mem.Bytes(0, mem.Len())
	if err == nil {
		if err = unix.Mlock(b); err != nil {
			err = fmt.Errorf("locking %d bytes of DMA memory: %w (raise the limit: ulimit -l unlimited)", len(b), err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	clear(b) // so that it is there
	return mem, nil
}

// physicalRegion finds out where the pages of mem are.
func physicalRegion(mem *shm.Region, page uint64) (*device.DMARegion, error) {
	b, err := mem.Bytes(0, mem.Len())
	if err != nil {
		return nil, err
	}
	addresses, err := physical.Addresses(b, page)
	if err != nil {
		return nil, fmt.Errorf("physical addresses: %w", err)
	}
	run, iovas := joinRuns(addresses, page)
	return device.NewDMARuns(mem, run, iovas, mem.Close)
}

// joinRuns returns the longest runs that pages at these addresses make: all of them together, if each follows the one before.
func joinRuns(addresses []uint64, page uint64) (run uint64, iovas []uint64) {
	run, iovas = page, addresses
	for len(iovas) > 1 {
		joined := make([]uint64, 0, (len(iovas)+1)/2)
		for i := 0; i < len(iovas); i += 2 {
			if i+1 < len(iovas) && iovas[i]+run != iovas[i+1] {
				return run, iovas
			}
			joined = append(joined, iovas[i])
		}
		run, iovas = 2*run, joined
	}
	return run, iovas
}
