package vfiopci

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// space is the memory that a function reaches.
type space interface {
	alloc(size uint64) (*device.DMARegion, error)
	// mapDMA lets the function reach size bytes at the address at of this process, and returns where; without write it may only read them.
	mapDMA(at, size uint64, write bool) (iova uint64, err error)
	unmapDMA(iova, size uint64) error
	// unmapAll takes everything back at once.
	unmapAll() error
	// way names it in messages.
	way() string
	close() error
}

// newMemory returns memory that is not at addresses of the machine: huge pages if there are any free, since the IOMMU then has less to look
// up, otherwise ordinary ones.
func newMemory(size uint64) (*shm.Region, error) {
	if size == 0 {
		return nil, errors.New("0 bytes of DMA memory")
	}
	if size >= pci.HugePage {
		if mem, err := pci.NewHugePages(size); err == nil {
			return mem, nil
		}
	}
	return shm.NewMemfd("nvme-dma", size)
}

// mapError says what a refusal to pin memory is about. less is how there can be less of it.
func mapError(size uint64, less string, err error) error {
	err = fmt.Errorf("%d bytes of DMA memory: %w", size, err)
	if !errors.Is(err, unix.ENOMEM) {
		return err
	}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) != nil || limit.Cur == unix.RLIM_INFINITY {
		return err
	}
	return fmt.Errorf("%w: this process may pin %d bytes: raise that (ulimit -l %d, LimitMEMLOCK= of a systemd unit), or %s",
		err, limit.Cur, (size>>10)+(16<<10), less)
}

// allocMapped is alloc of a space that maps.
func allocMapped(size uint64, s space) (*device.DMARegion, error) {
	mem, err := newMemory(size)
	if err != nil {
		return nil, err
	}
	iova, err := s.mapDMA(addressOf(mem), mem.Len(), true)
	if err != nil {
		return nil, errors.Join(mapError(mem.Len(), "ask for less (Options.DMASize)", err), mem.Close())
	}
	return device.NewDMARegion(mem, iova, func() error { return errors.Join(s.unmapDMA(iova, mem.Len()), mem.Close()) }), nil
}

// container is a VFIO container of type 1 and the one group in it.
type container struct {
	k         kernel
	fd, group int
	ranges    []span // where memory may go
	taken     []span // sorted
}

func (c *container) way() string { return "VFIO group" }

func (c *container) alloc(size uint64) (*device.DMARegion, error) {
	return allocMapped(size, c)
}

func (c *container) mapDMA(at, size uint64, write bool) (uint64, error) {
	iova, err := c.place(size)
	if err != nil {
		return 0, err
	}
	flags := uint32(dmaRead)
	if write {
		flags |= dmaWrite
	}
	if _, err := c.k.ioctl(c.fd, vfioIOMMUMapDMA, with64(words(flags), at, iova, size)); err != nil {
		c.leave(iova)
		return 0, err
	}
	return iova, nil
}

func (c *container) unmapDMA(iova, size uint64) error {
	if _, err := c.k.ioctl(c.fd, vfioIOMMUUnmapDMA, with64(words(0), iova, size)); err != nil {
		return fmt.Errorf("taking %d bytes at %#x from the function: %w", size, iova, err)
	}
	c.leave(iova)
	return nil
}

// unmapAll goes by what was given: to take back all in one call needs Linux 5.12.
func (c *container) unmapAll() (err error) {
	for _, s := range slices.Clone(c.taken) {
		err = errors.Join(err, c.unmapDMA(s.begin, s.end-s.begin))
	}
	return err
}

// floors are where IOVAs are looked for, one after the other: above what 32-bit addresses might be mistaken for, then anywhere but in the
// lowest part, where an address of 0 might be.
var floors = []uint64{1 << 32, 1 << 20}

// place takes the lowest IOVAs that are free, and that the IOMMU allows.
func (c *container) place(size uint64) (uint64, error) {
	const align = pci.HugePage
	ranges := c.ranges
	if ranges == nil {
		ranges = []span{{0, 1 << 39}} // the least that an IOMMU of today reaches
	}
	for _, floor := range floors {
		for _, r := range ranges {
			at := max(r.begin, floor)
			for _, t := range append(slices.Clone(c.taken), span{^uint64(0), 0}) {
				at = (at + align - 1) &^ (align - 1)
				if at < floor {
					break // around the end
				}
				if last := at + size - 1; last >= at && last <= r.end-1 && last < t.begin {
					c.take(span{at, at + size})
					return at, nil
				}
				at = max(at, t.end)
			}
		}
	}
	return 0, fmt.Errorf("the IOMMU has no %d free addresses in one piece: %w", size, unix.ENOSPC)
}

func (c *container) take(s span) {
	i, _ := slices.BinarySearchFunc(c.taken, s.begin, func(t span, at uint64) int {
		if t.begin < at {
			return -1
		}
		return 1
	})
	c.taken = slices.Insert(c.taken, i, s)
}

func (c *container) leave(iova uint64) {
	c.taken = slices.DeleteFunc(c.taken, func(t span) bool { return t.begin == iova })
}

func (c *container) close() error { return errors.Join(c.k.close(c.group), c.k.close(c.fd)) }

// ioas is an address space of iommufd.
type ioas struct {
	k  kernel
	fd int
	id uint32
}

func (s *ioas) way() string { return "VFIO device and iommufd" }

func (s *ioas) alloc(size uint64) (*device.DMARegion, error) {
	return allocMapped(size, s)
}

func (s *ioas) mapDMA(at, size uint64, write bool) (uint64, error) {
	flags := uint32(ioasRead)
	if write {
		flags |= ioasWrite
	}
	b := with64(words(flags, s.id, 0), at, size, 0)
	if _, err := s.k.ioctl(s.fd, iommuIOASMap, b); err != nil {
		return 0, err
	}
	return native.Uint64(b[32:]), nil
}

func (s *ioas) unmapDMA(iova, size uint64) error {
	if _, err := s.k.ioctl(s.fd, iommuIOASUnmap, with64(words(s.id), iova, size)); err != nil {
		return fmt.Errorf("taking %d bytes at %#x from the function: %w", size, iova, err)
	}
	return nil
}

// unmapAll is one call: an IOVA of 0 and all of the length.
func (s *ioas) unmapAll() error {
	if _, err := s.k.ioctl(s.fd, iommuIOASUnmap, with64(words(s.id), 0, ^uint64(0))); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("taking all memory from the function: %w", err)
	}
	return nil
}

func (s *ioas) close() error { return s.k.close(s.fd) }

// physical is all memory of the machine: a group of the mode without an IOMMU.
type physical struct {
	container
}

func (p *physical) way() string { return "VFIO without an IOMMU" }

func (p *physical) alloc(size uint64) (*device.DMARegion, error) {
	mem, err := pci.NewPhysical(size)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of DMA memory: %w", size, err)
	}
	return mem, nil
}

func (p *physical) unmapAll() error { return nil }

// mapDMA is refused: nothing keeps memory that others share with this process where it is.
func (p *physical) mapDMA(uint64, uint64, bool) (uint64, error) {
	return 0, fmt.Errorf("memory of others for a function without an IOMMU: %w", errors.ErrUnsupported)
}
