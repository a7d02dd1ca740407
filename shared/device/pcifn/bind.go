package pcifn

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
)

// The drivers that Bind knows.
const (
	VFIO = "vfio-pci"
	None = "none" // no driver at all, for sysfs
	nvme = "nvme"
)

// How a function changes its driver:
//
//  1. refuse what is in use, and claim its disks so that it stays unused
//  2. driver_override names the one driver that may have it, so that no other comes between
//  3. the old driver lets go (unbind), the new one is asked (drivers_probe): Documentation/ABI/testing/sysfs-bus-pci
//  4. if it does not take the function, all is put back

// Bind takes a function from the kernel's nvme driver, or from whatever has it, and gives it to driver: VFIO or None. It is refused
// if a disk of the function is mounted, swap, or part of something, with unix.EBUSY; the error names that. The function keeps its driver until Unbind, a
// restart, or somebody else's change of driver_override.
func Bind(address, driver string) error { return machine.bind(address, driver) }

// Unbind gives a function back to the kernel, which finds its disks again. It is refused while a process drives it.
func Unbind(address string) error { return machine.unbind(address) }

// usedError says what a function is used for.
func usedError(address string, uses []string) error {
	return fmt.Errorf("%s is in use: %s; end that first: %w", address, strings.Join(uses, ", "), unix.EBUSY)
}

func (h *host) bind(address, driver string) error {
	f, err := h.lookup(address)
	if err != nil {
		return err
	}
	if f.Driver == driver || f.Driver == "" && driver == None {
		return nil
	}
	switch driver {
	case None:
	case VFIO:
		if err := h.vfioPossible(f); err != nil {
			return fmt.Errorf("%s: %w", f.Address, err)
		}
	default:
		return fmt.Errorf("driver %q: %s or %s", driver, VFIO, None)
	}
	release, err := h.idle(f)
	if err != nil {
		return err
	}
	defer release()
	if err := h.change(f, driver); err != nil {
		// Whoever had it has it again: a function that nobody has is no disk.
		return errors.Join(fmt.Errorf("%s: %w", f.Address, err), h.change(f, ""))
	}
	return nil
}

// vfioPossible says why vfio-pci would not take the function.
func (h *host) vfioPossible(f *Function) error {
	if _, err := os.Stat(filepath.Join(h.sys, "bus/pci/drivers", VFIO)); err != nil {
		return fmt.Errorf("the driver %s is not there: load it first (modprobe %s): %w", VFIO, VFIO, err)
	}
	if f.Group == "" && text(filepath.Join(h.sys, "module/vfio/parameters/enable_unsafe_noiommu_mode")) != "Y" {
		return fmt.Errorf("it is in no IOMMU group, so %s cannot take it: the machine has no IOMMU, or the kernel does not use it (intel_iommu=on); without one, sysfs:%s works after guestdrv bind %s --driver none, and vfio:%s,noiommu once vfio's parameter enable_unsafe_noiommu_mode is Y: %w",
			VFIO, f.Address, f.Address, f.Address, errors.ErrUnsupported)
	}
	return nil
}

// idle refuses a function that somebody uses, and sees to it that nobody begins to before release is called.
func (h *host) idle(f *Function) (release func(), err error) {
	if uses := f.Uses(); len(uses) > 0 {
		return nil, usedError(f.Address, uses)
	}
	if f.Driver != nvme {
		return h.undriven(f)
	}
	var releases []func()
	release = func() {
		for _, r := range releases {
			r()
		}
	}
	for _, d := range f.Disks {
		r, err := h.claim(filepath.Join(h.dev, d.Name))
		switch {
		case err == nil:
			releases = append(releases, r)
		case errors.Is(err, unix.EBUSY):
			release()
			return nil, usedError(f.Address, []string{d.Name + " is held by something that this process does not see, such as a mount in another mount namespace"})
		case !errors.Is(err, fs.ErrNotExist):
			release()
			return nil, fmt.Errorf("%s: looking whether %s is in use: %w", f.Address, d.Name, err)
		}
	}
	return release, nil
}

// undriven refuses a function that a process drives: through VFIO, or through sysfs, where it holds a lock.
func (h *host) undriven(f *Function) (release func(), err error) {
	busy := usedError(f.Address, []string{"a process drives it"})
	if f.VFIO() && f.Group != "" {
		name := f.Group
		if f.NoIOMMU {
			name = "noiommu-" + name
		}
		fd, err := unix.Open(filepath.Join(h.dev, "vfio", name), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EBUSY) {
			return nil, busy
		}
		if err == nil {
			unix.Close(fd)
		}
		return func() {}, nil
	}
	fd, err := unix.Open(filepath.Join(h.function(f.Address), "resource0"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return func() {}, nil // without the file nobody can have mapped it
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unix.Close(fd)
		return nil, busy
	}
	return func() { unix.Close(fd) }, nil
}

// change gives the function to a driver; "": to whichever the kernel chooses.
func (h *host) change(f *Function, driver string) error {
	dir := h.function(f.Address)
	override := driver + "\n"
	if err := h.write(filepath.Join(dir, "driver_override"), override); err != nil {
		return err
	}
	if now := h.driver(f.Address); now != "" && now != driver && (driver != "" || now != nvme) {
		if err := h.write(filepath.Join(dir, "driver/unbind"), f.Address); err != nil {
			return err
		}
	}
	if driver == None {
		return nil
	}
	if err := h.write(filepath.Join(h.sys, "bus/pci/drivers_probe"), f.Address); err != nil {
		return fmt.Errorf("giving it to %s: %w", orKernel(driver), err)
	}
	switch now := h.driver(f.Address); {
	case now == "" && driver == "":
		return fmt.Errorf("no driver of the kernel took it: load one (modprobe %s), it takes the function by itself; otherwise dmesg says why not", nvme)
	case now == "" || driver != "" && now != driver:
		return fmt.Errorf("%s did not take it (dmesg says why)", driver)
	}
	return nil
}

func orKernel(driver string) string {
	if driver == "" {
		return "the kernel"
	}
	return driver
}

func (h *host) unbind(address string) error {
	f, err := h.lookup(address)
	if err != nil {
		return err
	}
	if f.Driver == nvme {
		return nil
	}
	release, err := h.idle(f)
	if err != nil {
		return err
	}
	defer release()
	if err := h.change(f, ""); err != nil {
		return fmt.Errorf("%s: %w", f.Address, err)
	}
	return nil
}

// WaitDisks waits until the kernel's nvme driver shows a disk of the function, and returns what it then is. After Unbind the driver looks for
// namespaces on its own time; a controller may also have none.
func WaitDisks(address string, limit time.Duration) (*Function, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		f, err := Lookup(address)
		if err != nil || len(f.Disks) > 0 || time.Now().After(deadline) {
			return f, err
		}
	}
}

// ParseAddress returns a PCI address in full: 00:04.0 is 0000:00:04.0.
func ParseAddress(s string) (string, error) { return pci.ParseAddress(s) }

// writeFile writes to a file of sysfs.
func writeFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (only root of the machine may)", err)
	}
	return err
}
