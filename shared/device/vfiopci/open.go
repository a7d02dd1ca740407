package vfiopci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
)

// How a function is opened:
//
//  1. look it up in sysfs: an NVMe controller, which VFIO's driver has
//  2. by its own device and iommufd, where the kernel has both; otherwise by its group and a container
//  3. regions, interrupts, configuration space, the events of its end: vfiopci.go

// paths are where the kernel shows things; tests have their own.
type paths struct{ sys, dev string }

var machine = paths{"/sys", "/dev"}

func (p paths) function(bdf string) string { return filepath.Join(p.sys, "bus/pci/devices", bdf) }

// check looks whether the function is an NVMe controller that VFIO has.
func (p paths) check(bdf string) error {
	dir := p.function(bdf)
	b, err := os.ReadFile(filepath.Join(dir, "class"))
	if err != nil {
		return fmt.Errorf("no such PCI function: %w", err)
	}
	class, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 32)
	if err != nil {
		return err
	}
	if class != pci.ClassNVMe {
		return fmt.Errorf("not an NVMe controller: PCI class %06x, want %06x", class, pci.ClassNVMe)
	}
	driver := p.driver(bdf)
	switch {
	case driver == "":
		return fmt.Errorf("no driver has it, VFIO's neither: give it to VFIO first: guestdrv bind %s: %w", bdf, unix.ENODEV)
	case !strings.Contains(driver, "vfio"):
		return fmt.Errorf("the kernel's driver %s has it: give it to VFIO first, which takes its disks from the kernel: guestdrv bind %s: %w", driver, bdf, unix.EBUSY)
	}
	return nil
}

func (p paths) driver(bdf string) string {
	link, err := os.Readlink(filepath.Join(p.function(bdf), "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(link)
}

// group returns the number of the function's IOMMU group, and whether VFIO made it up for a function that no IOMMU stands before.
func (p paths) group(bdf string) (number string, made bool, err error) {
	dir := filepath.Join(p.function(bdf), "iommu_group")
	link, err := os.Readlink(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, fmt.Errorf("it is in no IOMMU group: the machine has no IOMMU, or the kernel does not use it (intel_iommu=on, amd_iommu=on). sysfs:%s goes without: %w",
			bdf, errors.ErrUnsupported)
	}
	if err != nil {
		return "", false, err
	}
	name, _ := os.ReadFile(filepath.Join(dir, "name")) // few groups have one
	return filepath.Base(link), strings.TrimSpace(string(name)) == "vfio-noiommu", nil
}

// others returns the members of the function's group, besides itself, that a driver of the kernel has.
func (p paths) others(bdf string) []string {
	var out []string
	entries, _ := os.ReadDir(filepath.Join(p.function(bdf), "iommu_group", "devices"))
	for _, e := range entries {
		if d := p.driver(e.Name()); e.Name() != bdf && d != "" && d != "pcieport" && !strings.Contains(d, "vfio") {
			out = append(out, e.Name()+" ("+d+")")
		}
	}
	return out
}

// attach opens the function one way or the other.
func attach(k kernel, p paths, bdf string, o Options) (fd int, s space, err error) {
	group, made, err := p.group(bdf)
	if err != nil {
		return -1, nil, err
	}
	if made != o.NoIOMMU {
		if made {
			return -1, nil, fmt.Errorf("no IOMMU keeps it from all memory of the machine: ask for that (vfio:%s,noiommu), or use sysfs:%s: %w", bdf, bdf, errors.ErrUnsupported)
		}
		return -1, nil, fmt.Errorf("noiommu was asked for, and there is an IOMMU: use vfio:%s: %w", bdf, errors.ErrUnsupported)
	}
	if made {
		return attachGroup(k, p, bdf, group, true)
	}
	fd, s, cdevErr := attachDevice(k, p, bdf)
	if cdevErr == nil {
		return fd, s, nil
	}
	fd, s, err = attachGroup(k, p, bdf, group, false)
	if err != nil && !errors.Is(cdevErr, fs.ErrNotExist) {
		err = errors.Join(err, cdevErr)
	}
	return fd, s, err
}

// openError says what a refusal of one of VFIO's files is about.
func openError(path string, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: another process has it: %w", path, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: %w (give the file to this user: chown %d %s)", path, err, os.Getuid(), path)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w (without an IOMMU it needs CAP_SYS_RAWIO of the first user namespace)", path, err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%s: %w (modprobe vfio-pci)", path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// attachDevice goes by the function's own device and iommufd: Documentation/driver-api/vfio.rst. The error is fs.ErrNotExist where the kernel lacks them.
func attachDevice(k kernel, p paths, bdf string) (fd int, s *ioas, err error) {
	names, err := filepath.Glob(filepath.Join(p.function(bdf), "vfio-dev", "vfio*"))
	if err != nil || len(names) == 0 {
		return -1, nil, fmt.Errorf("no vfio-dev: %w", fs.ErrNotExist)
	}
	path := filepath.Join(p.dev, "vfio/devices", filepath.Base(names[0]))
	fd, err = k.open(path)
	if err != nil {
		return -1, nil, openError(path, err)
	}
	s = &ioas{k: k}
	if s.fd, err = k.open(filepath.Join(p.dev, "iommu")); err != nil {
		return -1, nil, errors.Join(openError(filepath.Join(p.dev, "iommu"), err), k.close(fd))
	}
	if err := s.attach(fd); err != nil {
		return -1, nil, errors.Join(fmt.Errorf("%s: %w", path, err), k.close(fd), s.close())
	}
	return fd, s, nil
}

func (s *ioas) attach(device int) error {
	if _, err := s.k.ioctl(device, vfioDeviceBindIOMMUFD, words(0, uint32(s.fd), 0)); err != nil {
		return fmt.Errorf("binding it to iommufd: %w (another process may have it)", err)
	}
	b := words(0, 0)
	if _, err := s.k.ioctl(s.fd, iommuIOASAlloc, b); err != nil {
		return fmt.Errorf("an address space of iommufd: %w", err)
	}
	s.id = native.Uint32(b[8:])
	if _, err := s.k.ioctl(device, vfioDeviceAttachPT, words(0, s.id)); err != nil {
		return fmt.Errorf("giving it an address space of iommufd: %w", err)
	}
	return nil
}

// attachGroup goes by the function's group in a container of its own.
func attachGroup(k kernel, p paths, bdf, group string, made bool) (fd int, s space, err error) {
	path, kind := filepath.Join(p.dev, "vfio", group), type1v2
	if made {
		path, kind = filepath.Join(p.dev, "vfio", "noiommu-"+group), noIOMMU
	}
	name := filepath.Join(p.dev, "vfio/vfio")
	c := container{k: k}
	if c.fd, err = k.open(name); err != nil {
		return -1, nil, openError(name, err)
	}
	if c.group, err = k.open(path); err != nil {
		return -1, nil, errors.Join(openError(path, err), k.close(c.fd))
	}
	if fd, err = c.attach(bdf, kind, p); err != nil {
		return -1, nil, errors.Join(fmt.Errorf("%s: %w", path, err), c.close())
	}
	if made {
		return fd, &physical{c}, nil
	}
	return fd, &c, nil
}

func (c *container) attach(bdf string, kind int, p paths) (fd int, err error) {
	if v, err := c.k.ioctlValue(c.fd, vfioGetAPIVersion, 0); err != nil || v != apiVersion {
		return -1, fmt.Errorf("version %d of VFIO, want %d: %w", v, apiVersion, errors.Join(err, errors.ErrUnsupported))
	}
	if has, err := c.k.ioctlValue(c.fd, vfioCheckExtension, uintptr(kind)); err != nil || has == 0 {
		return -1, fmt.Errorf("the kernel's VFIO lacks IOMMU type %d (modprobe vfio_iommu_type1): %w", kind, errors.Join(err, errors.ErrUnsupported))
	}
	status := words(0)
	if _, err := c.k.ioctl(c.group, vfioGroupGetStatus, status); err != nil {
		return -1, err
	}
	if native.Uint32(status[4:])&viable == 0 {
		return -1, fmt.Errorf("the kernel still has other functions of the IOMMU group, %s: bind those to vfio-pci too, or to no driver: %w",
			strings.Join(p.others(bdf), ", "), unix.EBUSY)
	}
	if _, err := c.k.ioctl(c.group, vfioGroupSetContainer, native.AppendUint32(nil, uint32(c.fd))); err != nil {
		return -1, fmt.Errorf("putting the group into a container: %w", err)
	}
	if _, err := c.k.ioctlValue(c.fd, vfioSetIOMMU, uintptr(kind)); err != nil {
		return -1, fmt.Errorf("IOMMU type %d: %w", kind, err)
	}
	if kind != noIOMMU {
		if c.ranges, err = iovaRanges(c.k, c.fd); err != nil {
			return -1, fmt.Errorf("the IOMMU's addresses: %w", err)
		}
	}
	fd, err = c.k.ioctl(c.group, vfioGroupGetDeviceFD, append([]byte(bdf), 0))
	if err != nil {
		return -1, fmt.Errorf("the function: %w", err)
	}
	return fd, nil
}
