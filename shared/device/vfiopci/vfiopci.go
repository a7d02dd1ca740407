// Package vfiopci is a [device.Device] over Linux's VFIO: a PCI function that the kernel's driver vfio-pci has. The function reaches the memory that
// AllocDMA gives and no other, registers are mapped, interrupts are eventfds, and nothing but the rights to two files is needed.
//
// By its IOMMU group and a container, or by its own device and iommufd, or, when that is asked for, without an IOMMU: then it reaches all
// memory, as with package sysfspci, but has interrupts. Taking the function from the kernel's nvme driver is not done here; package pcifn does.
package vfiopci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Scheme is what names of devices of this kind begin with.
const Scheme = "vfio:"

// Options are what Open can be told.
type Options struct {
	// NoIOMMU takes a function that no IOMMU keeps from all memory of the machine. The kernel must allow that: vfio's parameter
	// enable_unsafe_noiommu_mode.
	NoIOMMU bool

	// Faulted is told of each error that PCI Express did not recover from, by a goroutine of its own; nil: the first ends the device. A reset may help.
	Faulted func()
	// Wanted is told, by a goroutine of its own, that the kernel wants the function back, which waits for Close and Unmap: it is being unplugged, or
	// is to get another driver. Until then the device may still work. nil: that ends the device.
	Wanted func()
}

// Device is a PCI function.
type Device struct {
	pci.Registers
	k     kernel
	gone  *pci.Ending
	flags uint32 // of VFIO_DEVICE_GET_INFO

	irqIndex uint32
	vectors  int
	notice   string

	// mu is held for reading by whoever uses a descriptor, for writing by what closes them.
	mu     sync.RWMutex
	closed bool
	fd     int
	space  space
	config int64 // offset of the configuration space in fd

	spaceMu sync.Mutex // one change of space at a time; taken under mu

	faulted, wanted func()

	events    []*os.File
	watching  sync.WaitGroup
	severOnce sync.Once
	closeOnce sync.Once
	closeErr  error
}

var _ device.Device = (*Device)(nil)

// Open takes the NVMe controller at a PCI address, which vfio-pci has.
func Open(bdf string, o Options) (*Device, error) { return open(system{}, machine, bdf, o) }

func open(k kernel, p paths, bdf string, o Options) (*Device, error) {
	bdf, err := pci.ParseAddress(bdf)
	if err != nil {
		return nil, err
	}
	if err := p.check(bdf); err != nil {
		return nil, fmt.Errorf("%s: %w", bdf, err)
	}
	d := &Device{k: k, gone: pci.NewEnding(), faulted: o.Faulted, wanted: o.Wanted}
	d.Registers.Gone, d.Registers.Answers = d.gone, d.answers
	if d.fd, d.space, err = attach(k, p, bdf, o); err != nil {
		return nil, fmt.Errorf("%s: %w", bdf, err)
	}
	if err := d.setup(); err != nil {
		return nil, fmt.Errorf("%s: %w", bdf, errors.Join(err, d.Close(), d.Unmap()))
	}
	return d, nil
}

func (d *Device) setup() error {
	b := words(0, 0, 0, 0)
	if _, err := d.k.ioctl(d.fd, vfioDeviceGetInfo, b); err != nil {
		return fmt.Errorf("VFIO's device: %w", err)
	}
	if d.flags = native.Uint32(b[4:]); d.flags&isPCI == 0 {
		return fmt.Errorf("VFIO's device is no PCI function: flags %#x", d.flags)
	}
	config, err := regionInfo(d.k, d.fd, regionConfig)
	if err != nil {
		return err
	}
	d.config = config.offset
	if err := d.command(pci.CommandMemory|pci.CommandBusMaster|pci.CommandINTxDisable, 0); err != nil {
		return err
	}
	if err := d.mapRegisters(); err != nil {
		return err
	}
	d.irqIndex, d.vectors = irqMSIX, irqCount(d.k, d.fd, irqMSIX)
	if d.vectors == 0 && irqCount(d.k, d.fd, irqMSI) > 0 {
		// Of MSI the machine gives more than one to few; the queues are then polled.
		d.irqIndex, d.vectors = irqMSI, 1
	}
	return d.watch()
}

// mapRegisters maps what it may of BAR0; the rest is reached by reading and writing the device.
func (d *Device) mapRegisters() error {
	bar, err := regionInfo(d.k, d.fd, regionBAR0)
	if err != nil {
		return err
	}
	const need = regionRead | regionWrite
	if bar.size < nvme.DoorbellBase+8 || bar.size > pci.MaxBAR0 || bar.flags&need != need {
		return fmt.Errorf("BAR0 of %#x bytes, flags %#x: cannot hold the registers of an NVMe controller", bar.size, bar.flags)
	}
	d.Registers.Size, d.Registers.Slow = bar.size, &file{d, bar.offset}
	if len(bar.mapable) == 0 {
		d.notice = "registers are not mapped: the kernel does not offer it"
	}
	for _, s := range bar.mapable {
		mem, err := d.k.mmap(d.fd, bar.offset+int64(s.begin), s.end-s.begin)
		if err != nil {
			d.notice = fmt.Sprintf("registers from %#x on are not mapped: %v", s.begin, err)
			continue
		}
		d.Registers.Areas = append(d.Registers.Areas, pci.Area{Off: s.begin, Mem: mem})
	}
	return nil
}

// file is a region, read and written by system calls.
type file struct {
	d      *Device
	offset int64
}

func (f *file) ReadBAR(p []byte, off uint64) error {
	return f.d.with(func() error { return f.d.k.pread(f.d.fd, p, f.offset+int64(off)) })
}

func (f *file) WriteBAR(p []byte, off uint64) error {
	return f.d.with(func() error { return f.d.k.pwrite(f.d.fd, p, f.offset+int64(off)) })
}

var errClosed = fmt.Errorf("%w: it was closed", device.ErrGone)

// with calls f while the descriptors are open.
func (d *Device) with(f func() error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return errClosed
	}
	return f()
}

// withSpace is with for what changes the memory that the function reaches. To pin much memory takes long: registers do not wait for it.
func (d *Device) withSpace(f func() error) error {
	return d.with(func() error {
		d.spaceMu.Lock()
		defer d.spaceMu.Unlock()
		return f()
	})
}

// readCommand reads the function's command register. A descriptor must be open.
func (d *Device) readCommand() (uint16, error) {
	return pci.ReadCommand(func(p []byte, off int64) error { return d.k.pread(d.fd, p, d.config+off) })
}

// answers is [pci.Registers].Answers.
func (d *Device) answers() error {
	return d.with(func() error {
		_, err := d.readCommand()
		return err
	})
}

// command sets and clears bits of the function's command register. A descriptor must be open.
func (d *Device) command(set, clear uint16) error {
	v, err := d.readCommand()
	if err != nil {
		return err
	}
	var b [2]byte
	binary.LittleEndian.PutUint16(b[:], v&^clear|set)
	if err := d.k.pwrite(d.fd, b[:], d.config+pci.RegCommand); err != nil {
		return fmt.Errorf("PCI command register: %w", err)
	}
	return nil
}

// endings are the events by which VFIO tells that the function is going.
var endings = map[uint32]string{
	irqError: "PCI Express reports an error that it did not recover from",
	irqReq:   "the kernel wants it back: it is being unplugged, or its driver changed",
}

// watch waits for the events of the function's end, as far as it has any.
func (d *Device) watch() error {
	for index, why := range endings {
		if irqCount(d.k, d.fd, index) == 0 {
			continue
		}
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return fmt.Errorf("eventfd: %w", err)
		}
		f := os.NewFile(uintptr(fd), "vfio event")
		d.events = append(d.events, f)
		if err := setIRQs(d.k, d.fd, index, []int{fd}); err != nil {
			return fmt.Errorf("VFIO's event %d: %w", index, err)
		}
		told := d.faulted
		if index == irqReq {
			told = d.wanted
		}
		d.watching.Go(func() {
			var b [8]byte
			for {
				if _, err := f.Read(b[:]); err != nil {
					return
				}
				if told == nil {
					d.gone.End(fmt.Errorf("%w: %s", device.ErrGone, why))
					return
				}
				told()
			}
		})
	}
	return nil
}

// MapDMA lets the function reach mem, whole pages of this process, until UnmapDMA, and returns at which IOVA. The kernel pins it. Memory that this
// process may only read the function may only read too.
func (d *Device) MapDMA(mem []byte) (iova uint64, err error) {
	at, size := addressOfBytes(mem), uint64(len(mem))
	err = d.withSpace(func() (err error) {
		iova, err = d.space.mapDMA(at, size, true)
		if errors.Is(err, unix.EFAULT) {
			iova, err = d.space.mapDMA(at, size, false)
		}
		return err
	})
	if err != nil {
		return 0, mapError(size, "give the guest less memory", err)
	}
	return iova, nil
}

// UnmapDMA takes back what MapDMA gave, of which nothing is in use any more. After Close the function has lost it already.
func (d *Device) UnmapDMA(iova, size uint64) error {
	err := d.withSpace(func() error { return d.space.unmapDMA(iova, size) })
	if errors.Is(err, errClosed) {
		return nil
	}
	return err
}

// AllocDMA returns memory at one range of IOVAs; without an IOMMU, in huge pages that lie where they lie.
func (d *Device) AllocDMA(size uint64) (*device.DMARegion, error) {
	var mem *device.DMARegion
	err := d.withSpace(func() (err error) {
		mem, err = d.space.alloc(size)
		return err
	})
	if err != nil {
		return nil, err
	}
	return mem.Wrap(d.freeing), nil
}

// freeing keeps the release of memory from using descriptors that were closed: with those the kernel has taken it from the function.
func (d *Device) freeing(mem *device.DMARegion) error {
	err := d.withSpace(mem.Free)
	if errors.Is(err, errClosed) {
		return mem.Close()
	}
	return err
}

// MaxInterrupts returns the number of MSI-X vectors; 1 for a function that has MSI only; 0 if it must be polled.
func (d *Device) MaxInterrupts() int { return d.vectors }

// Interrupts makes n eventfds and hands them to the kernel.
func (d *Device) Interrupts(n int) ([]int, error) {
	return device.EventFDs(n, d.vectors, func(fds []int) error {
		return d.with(func() error { return setIRQs(d.k, d.fd, d.irqIndex, fds) })
	})
}

// The kernel does not wait for the lock that a reset needs.
const (
	resetTries = 50
	resetPause = 10 * time.Millisecond
)

// Reset resets the function. VFIO keeps its interrupts and most of its configuration space; what may be lost of that is set again. The error is
// [errors.ErrUnsupported] if the function cannot be reset.
func (d *Device) Reset() error {
	return d.with(func() error {
		if d.flags&canReset == 0 {
			return fmt.Errorf("the function has no reset: %w", errors.ErrUnsupported)
		}
		for try := 1; ; try++ {
			_, err := d.k.ioctlValue(d.fd, vfioDeviceReset, 0)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EAGAIN) || try == resetTries {
				return fmt.Errorf("resetting the function: %w", err)
			}
			time.Sleep(resetPause)
		}
		return d.command(pci.CommandMemory|pci.CommandBusMaster|pci.CommandINTxDisable, 0)
	})
}

// Files are what Reset and Close use.
func (d *Device) Files() device.Files { return device.Files{VFIODevice: d.fd} }

// Isolated says whether the device can reach no memory but what AllocDMA gave.
func (d *Device) Isolated() bool {
	_, all := d.space.(*physical)
	return !all
}

// Way says how VFIO was asked: "VFIO group", "VFIO device and iommufd" or "VFIO without an IOMMU".
func (d *Device) Way() string { return d.space.way() }

// Notice says why registers are not mapped, if they are not.
func (d *Device) Notice() string { return d.notice }

// Done is closed by Close, when the kernel wants the function back, and when its registers read as all ones.
func (d *Device) Done() <-chan struct{} { return d.gone.Done() }

// Err returns why Done is closed.
func (d *Device) Err() error { return d.gone.Err() }

// PeerPID returns 0: nobody serves the device.
func (d *Device) PeerPID() int { return 0 }

// Sever is the first half of Close, which takes no time: the function reaches no memory any more, and neither descriptors nor registers are used again
// but by Close. To give back a function that does not answer takes the kernel a minute or more.
func (d *Device) Sever() { d.sever(d.space.unmapAll) }

func (d *Device) sever(unmap func() error) {
	d.severOnce.Do(func() {
		gone := d.gone.Err() != nil
		d.gone.End(errClosed)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.closed = true
		err := d.command(0, pci.CommandBusMaster)
		if gone {
			err = nil
		}
		d.closeErr = errors.Join(err, unmap())
	})
}

// Close takes the right to reach memory away from the function and gives it back to the kernel, which has it when Unmap was called too.
func (d *Device) Close() error {
	// Descriptors that are closed take the memory back too, without an ioctl, which guestdrv's sandbox does not let through.
	d.sever(func() error { return nil })
	d.closeOnce.Do(func() {
		d.closeErr = errors.Join(d.closeErr, d.k.close(d.fd), d.space.close())
		for _, f := range d.events {
			d.closeErr = errors.Join(d.closeErr, f.Close())
		}
		d.watching.Wait()
	})
	return d.closeErr
}
