// Package sysfspci is a [device.Device] over what Linux shows of a PCI function in sysfs: registers are resource0, mapped; DMA memory is
// pinned memory of this process, whose physical addresses /proc/self/pagemap tells. There are no interrupts: the device is polled.
//
// No IOMMU is asked for, so the device can reach all memory, and a mistake here is one anywhere: this is for experiments and test machines.
// It needs CAP_SYS_ADMIN, and a function that no kernel driver has.
package sysfspci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Scheme is what names of devices of this kind begin with.
const Scheme = "sysfs:"

// IsName reports whether name is a device of this kind, and returns the part after Scheme: the function's address, such as 0000:00:04.0.
func IsName(name string) (string, bool) { return strings.CutPrefix(name, Scheme) }

const (
	sysfs     = "/sys/bus/pci/devices"
	classNVMe = 0x010802
	maxBAR0   = 1 << 24

	pciCommand     = 0x04 // register of the configuration space
	pciMemory      = 1 << 1
	pciBusMaster   = 1 << 2
	pciINTxDisable = 1 << 10
)

// Device is a PCI function.
type Device struct {
	dir    string
	bar    *os.File
	config *os.File
	regs   *shm.Region

	closeOnce sync.Once
	closeErr  error
	unmapOnce sync.Once
	unmapErr  error
	done      chan struct{}
}

var _ device.Device = (*Device)(nil)

var address = regexp.MustCompile(`^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)

// Open takes the NVMe controller at a PCI address.
func Open(bdf string) (*Device, error) { return open(sysfs, bdf) }

func open(root, bdf string) (_ *Device, err error) {
	if !address.MatchString(bdf) {
		return nil, fmt.Errorf("PCI address %q: want one such as 0000:00:04.0", bdf)
	}
	d := &Device{dir: filepath.Join(root, bdf), done: make(chan struct{})}
	defer func() {
		if err != nil {
			d.Close()
			d.Unmap()
			err = fmt.Errorf("%s: %w", bdf, err)
		}
	}()
	if err := d.check(bdf); err != nil {
		return nil, err
	}
	if d.config, err = os.OpenFile(filepath.Join(d.dir, "config"), os.O_RDWR, 0); err != nil {
		return nil, err
	}
	if err := d.mapRegisters(); err != nil {
		return nil, err
	}
	if err := d.write("enable", "1"); err != nil {
		return nil, err
	}
	return d, d.command(pciMemory|pciBusMaster|pciINTxDisable, 0)
}

// check looks whether the function is an NVMe controller that nobody has.
func (d *Device) check(bdf string) error {
	if _, err := os.Stat(d.dir); err != nil {
		return fmt.Errorf("no such PCI function: %w", err)
	}
	class, err := d.number("class")
	if err != nil {
		return err
	}
	if class != classNVMe {
		return fmt.Errorf("not an NVMe controller: PCI class %06x, want %06x", class, classNVMe)
	}
	driver, err := os.Readlink(filepath.Join(d.dir, "driver"))
	switch {
	case err == nil:
		name := filepath.Base(driver)
		return fmt.Errorf("the kernel's driver %s has it, and would lose its disks: take it away first (echo %s > /sys/bus/pci/drivers/%s/unbind): %w",
			name, bdf, name, unix.EBUSY)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return nil
}

func (d *Device) number(file string) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(d.dir, file))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 0, 64)
}

func (d *Device) write(file, text string) error {
	f, err := os.OpenFile(filepath.Join(d.dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// mapRegisters maps BAR0, whose file is as large as it is.
func (d *Device) mapRegisters() (err error) {
	name := filepath.Join(d.dir, "resource0")
	if d.bar, err = os.OpenFile(name, os.O_RDWR, 0); err != nil {
		return fmt.Errorf("BAR0: %w", err)
	}
	fd := int(d.bar.Fd())
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another process has it: %w", unix.EBUSY)
	}
	fi, err := d.bar.Stat()
	if err != nil {
		return err
	}
	size := fi.Size()
	if size < nvme.DoorbellBase+8 || size > maxBAR0 {
		return fmt.Errorf("BAR0 of %#x bytes cannot hold the registers of an NVMe controller", size)
	}
	d.regs, err = shm.Map(fd, 0, uint64(size), true)
	return err
}

// command sets and clears bits of the function's command register.
func (d *Device) command(set, clear uint16) error {
	var b [2]byte
	if _, err := d.config.ReadAt(b[:], pciCommand); err != nil {
		return fmt.Errorf("PCI command register: %w", err)
	}
	v := (uint16(b[0])|uint16(b[1])<<8)&^clear | set
	if _, err := d.config.WriteAt([]byte{byte(v), byte(v >> 8)}, pciCommand); err != nil {
		return fmt.Errorf("PCI command register: %w", err)
	}
	return nil
}

func accessError(off uint32, err error) error {
	return fmt.Errorf("register %s: %w", nvme.RegisterName(off), err)
}

// Read32 reads a register.
func (d *Device) Read32(off uint32) (uint32, error) {
	w, err := d.regs.Word32(uint64(off))
	if err != nil {
		return 0, accessError(off, err)
	}
	return w.Load(), nil
}

// Read64 reads a register.
func (d *Device) Read64(off uint32) (uint64, error) {
	w, err := d.regs.Word64(uint64(off))
	if err != nil {
		return 0, accessError(off, err)
	}
	return w.Load(), nil
}

// Write32 writes a register.
func (d *Device) Write32(off uint32, v uint32) error {
	w, err := d.regs.Word32(uint64(off))
	if err != nil {
		return accessError(off, err)
	}
	store32(w, v)
	return nil
}

// Write64 writes a register.
func (d *Device) Write64(off uint32, v uint64) error {
	w, err := d.regs.Word64(uint64(off))
	if err != nil {
		return accessError(off, err)
	}
	store64(w, v)
	return nil
}

// RegisterSpace returns the size of BAR0.
func (d *Device) RegisterSpace() uint64 { return d.regs.Len() }

// Doorbell returns a doorbell register. It is no memory: each value has to be written.
func (d *Device) Doorbell(off uint32) device.Doorbell {
	w, err := d.regs.Word32(uint64(off))
	if err != nil {
		return device.Doorbell{Ring: func(uint32) error { return fmt.Errorf("doorbell at %#x: %w", off, err) }}
	}
	return device.Doorbell{Ring: func(v uint32) error {
		store32(w, v)
		return nil
	}}
}

// MaxInterrupts returns 0: there are none this way.
func (d *Device) MaxInterrupts() int { return 0 }

// Interrupts fails for any n above 0.
func (d *Device) Interrupts(n int) ([]int, error) {
	if n > 0 {
		return nil, fmt.Errorf("%d interrupt vectors wanted: a device in sysfs has none to give", n)
	}
	return nil, nil
}

// Reset resets the function by the kernel, which keeps its configuration space. The error is [errors.ErrUnsupported] if the function cannot be reset.
func (d *Device) Reset() error {
	err := d.write("reset", "1")
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the function has no reset: %w", errors.ErrUnsupported)
	}
	return err
}

// Done is closed by Close only: a function that is pulled out reads as all ones.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why Done is closed.
func (d *Device) Err() error {
	select {
	case <-d.done:
		return fmt.Errorf("%w: it was closed", device.ErrGone)
	default:
		return nil
	}
}

// PeerPID returns 0: nobody serves the device.
func (d *Device) PeerPID() int { return 0 }

// Close takes the right to reach memory away from the function and gives it back.
func (d *Device) Close() error {
	d.closeOnce.Do(func() {
		close(d.done)
		if d.config != nil {
			d.closeErr = errors.Join(d.command(0, pciBusMaster), d.write("enable", "0"), d.config.Close())
		}
		if d.bar != nil {
			d.closeErr = errors.Join(d.closeErr, d.bar.Close())
		}
	})
	return d.closeErr
}

// Unmap takes the registers away.
func (d *Device) Unmap() error {
	d.unmapOnce.Do(func() {
		if d.regs != nil {
			d.unmapErr = d.regs.Close()
		}
	})
	return d.unmapErr
}
