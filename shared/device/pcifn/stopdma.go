package pcifn

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	regCommand = 0x04
	busMaster  = 1 << 2
	// letGo is how long the kernel may take to let go of what a process had that has ended.
	letGo = time.Second
)

// StopDMA takes the right to read and write memory away from a function: bit 2 of its command register. It is for a function without an IOMMU whose
// driver, a process, has died: the pages that the function still knows are somebody else's soon. A function that a driver of the kernel has is left alone, and so is one
// that another process drives by now, which has stopped it first.
func StopDMA(address string) error { return machine.stopDMA(address) }

// AwaitStopped waits until a function has not got that right any more, or limit has passed. Of one that VFIO has the kernel takes it when the
// process's descriptors are closed, which is a moment after its end.
func AwaitStopped(address string, limit time.Duration) { machine.awaitStopped(address, limit) }

func (h *host) stopDMA(address string) error {
	address, err := ParseAddress(address)
	if err != nil {
		return err
	}
	if h.driver(address) != "" {
		return nil
	}
	say := func(err error) error { return fmt.Errorf("stopping DMA of %s: %w", address, err) }
	release, err := h.lock(address)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return say(err)
	}
	defer release()
	f, err := os.OpenFile(filepath.Join(h.function(address), "config"), os.O_RDWR, 0)
	if err != nil {
		return say(err)
	}
	defer f.Close()
	var b [2]byte
	if _, err := f.ReadAt(b[:], regCommand); err != nil {
		return say(err)
	}
	b[0] &^= busMaster
	if _, err := f.WriteAt(b[:], regCommand); err != nil {
		return say(err)
	}
	return nil
}

// lock takes the lock that a process has which drives the function by sysfs. Where BAR0 cannot be opened none does.
func (h *host) lock(address string) (release func(), err error) {
	fd, err := unix.Open(filepath.Join(h.function(address), "resource0"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return func() {}, nil
	}
	for deadline := time.Now().Add(letGo); ; time.Sleep(2 * time.Millisecond) {
		if err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return func() { unix.Close(fd) }, nil
		}
		if time.Now().After(deadline) {
			unix.Close(fd)
			return nil, err
		}
	}
}

func (h *host) awaitStopped(address string, limit time.Duration) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if on, err := h.mayReach(address); !on || err != nil {
			return
		}
	}
}

// mayReach says whether a function may reach memory. One that does not answer may not.
func (h *host) mayReach(address string) (bool, error) {
	f, err := os.Open(filepath.Join(h.function(address), "config"))
	if err != nil {
		return false, err
	}
	defer f.Close()
	var b [2]byte
	if _, err := f.ReadAt(b[:], regCommand); err != nil {
		return false, err
	}
	return b[0]&busMaster != 0 && b != [2]byte{0xff, 0xff}, nil
}
