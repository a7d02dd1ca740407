// Package sysfspci is a [device.Device] over what Linux shows of a PCI function in sysfs: registers are resource0, mapped; DMA memory is
// huge pages of this process, whose physical addresses /proc/self/pagemap tells. There are no interrupts: the device is polled.
//
// There is no IOMMU between the function and the machine's memory, so a mistake here is one anywhere: this is for guests without one, whose
// only disk the function is, for experiments and for test machines. If the process is killed with reads under way, the function may still write to
// the pages that it had, unless package dmaguard or another process stops it. It needs a function that no kernel driver has, root's files, and CAP_SYS_ADMIN.
package sysfspci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Scheme is what names of devices of this kind begin with.
const Scheme = "sysfs:"

// Device is a PCI function.
type Device struct {
	pci.Registers
	dir  string
	gone *pci.Ending

	// Open for as long as the Device is: a locked sandbox opens nothing.
	bar, config *os.File
	reset       *os.File // nil: it has none

	mu      sync.Mutex // of what is done to the command register
	severed bool

	severOnce, closeOnce sync.Once
	closeErr             error
}

var _ device.Device = (*Device)(nil)

// Open takes the NVMe controller at a PCI address. Nothing is taken from the kernel for it: a function with a driver is an error.
func Open(bdf string) (*Device, error) { return open(pci.Devices, bdf) }

func open(root, bdf string) (_ *Device, err error) {
	if bdf, err = pci.ParseAddress(bdf); err != nil {
		return nil, err
	}
	d := &Device{dir: filepath.Join(root, bdf), gone: pci.NewEnding()}
	d.Registers.Gone, d.Registers.Answers = d.gone, d.answers
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
	if err := d.mapRegisters(); err != nil {
		return nil, err
	}
	if err := d.enable(); err != nil {
		return nil, err
	}
	return d, nil
}

// check looks whether the function is an NVMe controller that nobody has, and that reaches memory by physical addresses.
func (d *Device) check(bdf string) error {
	if _, err := os.Stat(d.dir); err != nil {
		return fmt.Errorf("no such PCI function: %w", err)
	}
	class, err := d.number("class")
	if err != nil {
		return err
	}
	if class != pci.ClassNVMe {
		return fmt.Errorf("not an NVMe controller: PCI class %06x, want %06x", class, pci.ClassNVMe)
	}
	driver, err := os.Readlink(filepath.Join(d.dir, "driver"))
	switch {
	case err == nil:
		name := filepath.Base(driver)
		return fmt.Errorf("the kernel's driver %s has it, and would lose its disks: take it away first with guestdrv bind %s --driver none (echo %s > /sys/bus/pci/drivers/%s/unbind): %w",
			name, bdf, bdf, name, unix.EBUSY)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return d.checkIOMMU()
}

// checkIOMMU refuses a function whose addresses an IOMMU translates: the physical ones would be others, or none.
func (d *Device) checkIOMMU() error {
	b, err := os.ReadFile(filepath.Join(d.dir, "iommu_group", "type"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("its IOMMU group: %w", err)
	}
	if kind := strings.TrimSpace(string(b)); kind != "identity" {
		return fmt.Errorf("an IOMMU is between it and memory (its group is of type %s), so physical addresses are not what it would reach: use vfio:, or start the kernel with iommu=pt: %w",
			kind, errors.ErrUnsupported)
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

// explain says what a refusal of a file in sysfs is about.
func explain(what string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: %w (the file is root's: run as root)", what, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w (it needs CAP_SYS_ADMIN of the first user namespace, and a kernel that is not locked down: see /sys/kernel/security/lockdown; vfio: needs neither)", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func (d *Device) open(file string, flags int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(d.dir, file), flags, 0)
	if err != nil {
		return nil, explain(file, err)
	}
	return f, nil
}

// mapRegisters maps BAR0, whose file is as large as it is.
func (d *Device) mapRegisters() (err error) {
	if d.bar, err = d.open("resource0", os.O_RDWR); err != nil {
		return fmt.Errorf("BAR0: %w", err)
	}
	fd := int(d.bar.Fd())
	if err := lock(fd); err != nil {
		return fmt.Errorf("another process has it: %w", unix.EBUSY)
	}
	fi, err := d.bar.Stat()
	if err != nil {
		return err
	}
	size := fi.Size()
	if size < nvme.DoorbellBase+8 || size > pci.MaxBAR0 {
		return fmt.Errorf("BAR0 of %#x bytes cannot hold the registers of an NVMe controller", size)
	}
	mem, err := shm.Map(fd, 0, uint64(size), true)
	if err != nil {
		return explain("BAR0", err)
	}
	d.Registers.Size, d.Registers.Areas = mem.Len(), []pci.Area{{Mem: mem}}
	return nil
}

// lockPatience is for who stops the function of a process that was killed: see pcifn.StopDMA.
const lockPatience = 200 * time.Millisecond

func lock(fd int) error {
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(2 * time.Millisecond) {
		if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// enable wakes the function up and lets it reach memory. The kernel counts who has enabled it; that count is given back at once, since a locked
// sandbox no longer can, and of what it takes with it, bus mastering, the command register is the only place.
func (d *Device) enable() (err error) {
	if d.config, err = d.open("config", os.O_RDWR); err != nil {
		return err
	}
	if d.reset, err = d.open("reset", os.O_WRONLY); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	enable, err := d.open("enable", os.O_WRONLY)
	if err != nil {
		return err
	}
	for _, v := range []string{"1", "0"} {
		if _, err = enable.WriteAt([]byte(v), 0); err != nil {
			err = explain("enable", err)
			break
		}
	}
	if err = errors.Join(err, enable.Close()); err != nil {
		return err
	}
	if err := d.command(pci.CommandMemory|pci.CommandINTxDisable, pci.CommandBusMaster); err != nil {
		return err
	}
	if err := d.stop(); err != nil {
		return err
	}
	return d.command(pci.CommandBusMaster, 0)
}

// stop disables a controller that a process which was killed has left running. It knows queues and doorbell pages in memory that is the next
// one's now, maybe ours: so that comes before bus mastering goes on, and before memory is taken. NVMe Base 2.0c 3.5.1.
func (d *Device) stop() error {
	cc, err := d.Read32(nvme.RegCC)
	if err != nil || cc&1 == 0 {
		return err
	}
	limit := d.limit()
	if err := d.Write32(nvme.RegCC, cc&^1); err != nil {
		return err
	}
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		status, err := d.Read32(nvme.RegCSTS)
		if err != nil || !nvme.CSTS(status).RDY() {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the controller is left running by another process and does not stop within %v: CSTS=%#x, CC=%#x", limit, status, cc&^1)
		}
	}
}

// limit is how long the controller may take to stop (CAP.TO).
func (d *Device) limit() time.Duration {
	v, err := d.Read64(nvme.RegCAP)
	if err != nil {
		return time.Second
	}
	return max(nvme.CAP(v).Timeout(), time.Second)
}

// readCommand reads the function's command register.
func (d *Device) readCommand() (uint16, error) {
	return pci.ReadCommand(func(p []byte, off int64) error {
		_, err := d.config.ReadAt(p, off)
		return err
	})
}

// answers is [pci.Registers].Answers.
func (d *Device) answers() error {
	_, err := d.readCommand()
	return err
}

// command sets and clears bits of the function's command register. Once the function was severed it gets no right back.
func (d *Device) command(set, clear uint16) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.severed {
		set &^= pci.CommandBusMaster
	}
	v, err := d.readCommand()
	if err != nil {
		return err
	}
	var b [2]byte
	binary.LittleEndian.PutUint16(b[:], v&^clear|set)
	if _, err := d.config.WriteAt(b[:], pci.RegCommand); err != nil {
		return explain("PCI command register", err)
	}
	return nil
}

// AllocDMA returns memory in huge pages, contiguous for the function over one of them or more.
func (d *Device) AllocDMA(size uint64) (*device.DMARegion, error) {
	mem, err := pci.NewPhysical(size)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of DMA memory: %w", size, err)
	}
	return mem, nil
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
	if d.reset == nil {
		return fmt.Errorf("the function has no reset: %w", errors.ErrUnsupported)
	}
	if _, err := d.reset.WriteAt([]byte("1"), 0); err != nil {
		return explain("reset", err)
	}
	return d.command(pci.CommandMemory|pci.CommandBusMaster|pci.CommandINTxDisable, 0)
}

// Files are what Reset and Close use.
func (d *Device) Files() device.Files {
	f := device.Files{VFIODevice: -1, Write: []int{int(d.config.Fd())}}
	if d.reset != nil {
		f.Write = append(f.Write, int(d.reset.Fd()))
	}
	return f
}

// Done is closed by Close, and when the registers read as all ones.
func (d *Device) Done() <-chan struct{} { return d.gone.Done() }

// Err returns why Done is closed.
func (d *Device) Err() error { return d.gone.Err() }

// PeerPID returns 0: nobody serves the device.
func (d *Device) PeerPID() int { return 0 }

// Sever is the first half of Close, which takes no time: the function has no right to reach memory any more.
func (d *Device) Sever() {
	d.severOnce.Do(func() {
		gone := d.gone.Err() != nil
		d.gone.End(fmt.Errorf("%w: it was closed", device.ErrGone))
		if d.config == nil {
			return
		}
		d.mu.Lock()
		d.severed = true
		d.mu.Unlock()
		if err := d.command(0, pci.CommandBusMaster); !gone {
			d.closeErr = err
		}
	})
}

// Close takes the right to reach memory away from the function, and gives it up.
func (d *Device) Close() error {
	d.Sever()
	d.closeOnce.Do(func() {
		for _, f := range []*os.File{d.config, d.reset, d.bar} {
			if f != nil {
				d.closeErr = errors.Join(d.closeErr, f.Close())
			}
		}
	})
	return d.closeErr
}
