// Package physical is memory as a PCI function without an IOMMU finds it: by the machine's own addresses. [Addresses] reads them, and [Pins] keeps
// memory, also such as other processes share, where it is for as long as a function may use it.
//
// /proc/self/pagemap tells addresses to CAP_SYS_ADMIN of the first user namespace only (Documentation/admin-guide/mm/pagemap.rst).
package physical

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// Addresses returns where each page of b is, which begins at one. page is how large they are, in bytes: ordinary ones, or huge ones that b is known to be made
// of. What holds b there is the caller's to know.
func Addresses(b []byte, page uint64) ([]uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const entry = 8
	step := page / shm.PageSize // entries from one page to the next
	first, n := uint64(addressOf(b))/shm.PageSize, uint64(len(b))/shm.PageSize
	out := make([]uint64, 0, n/step)
	buf := make([]byte, min(n, 4<<10)*entry)
	for at := uint64(0); at < n; {
		some := buf[:min(n-at, uint64(len(buf)/entry))*entry]
		if step > uint64(len(some)/entry) {
			some = buf[:entry]
		}
		if _, err := f.ReadAt(some, int64((first+at)*entry)); err != nil {
			return nil, err
		}
		for i := uint64(0); i < uint64(len(some)); i += step * entry {
			address, err := frame(binary.NativeEndian.Uint64(some[i:]))
			if err != nil {
				return nil, err
			}
			out = append(out, address)
			at += step
		}
	}
	return out, nil
}

// frame returns the address in an entry of pagemap.
func frame(entry uint64) (uint64, error) {
	const present, number = 1 << 63, 1<<55 - 1
	switch {
	case entry&present == 0:
		return 0, errors.New("DMA memory is not in memory, though it was locked")
	case entry&number == 0:
		return 0, fmt.Errorf("/proc/self/pagemap tells them to CAP_SYS_ADMIN of the first user namespace only: run as root of the machine, or use vfio with an IOMMU: %w", unix.EPERM)
	}
	return entry & number * shm.PageSize, nil
}
