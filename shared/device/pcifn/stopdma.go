package pcifn

import (
	"fmt"
	"os"
	"path/filepath"
)

// StopDMA takes the right to read and write memory away from a function: bit 2 of its command register. It is for a function without an IOMMU whose
// driver, a process, has died: the pages that the function still knows are somebody else's soon. A function that a driver of the kernel has is left alone.
func StopDMA(address string) error { return machine.stopDMA(address) }

func (h *host) stopDMA(address string) error {
	const command, master = 0x04, 1 << 2
	address, err := ParseAddress(address)
	if err != nil {
		return err
	}
	if h.driver(address) != "" {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(h.function(address), "config"), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("stopping DMA of %s: %w", address, err)
	}
	defer f.Close()
	var b [2]byte
	if _, err := f.ReadAt(b[:], command); err != nil {
		return fmt.Errorf("stopping DMA of %s: %w", address, err)
	}
	b[0] &^= master
	if _, err := f.WriteAt(b[:], command); err != nil {
		return fmt.Errorf("stopping DMA of %s: %w", address, err)
	}
	return nil
}
