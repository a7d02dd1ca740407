// Package devices opens a [device.Device] by its name. A name is a scheme and what the scheme's package makes of the rest:
//
//	pci:ADDRESS            the PCI function ADDRESS, such as 0000:00:04.0 or 00:04.0, by vfio or sysfs, as its driver allows
//	vfio:ADDRESS           the same by VFIO: behind an IOMMU, with interrupts
//	vfio:ADDRESS,noiommu   the same by VFIO without an IOMMU
//	sysfs:ADDRESS          the same by sysfs: polled, without an IOMMU
//	vfio-user:PATH         the server that listens on the socket PATH, or on PATH/cntrl if PATH is a directory
//
// Every program that takes a device on its command line goes through here, so that a new kind of device is new in all of them. Opening never
// takes a function from a driver of the kernel; package pcifn does that.
package devices

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/device/vfiouser"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/shared/device/sysfspci"
	"github.com/shadowbell/shadowbell/shared/device/vfiopci"
)

// Scheme is what names of PCI functions begin with whose way is to be chosen.
const Scheme = "pci:"

// Usage is what a name may be, for the help of programs.
const Usage = "vfio-user:PATH, pci:ADDRESS, vfio:ADDRESS or sysfs:ADDRESS"

// Open opens the device that name says. ctx ends the attempt only.
func Open(ctx context.Context, name string) (device.Device, error) {
	scheme, rest, _ := strings.Cut(name, ":")
	var dev device.Device
	var err error
	switch scheme += ":"; scheme {
	case Scheme:
		var way string
		if way, _, err = Choose(rest); err == nil {
			return Open(ctx, way)
		}
	case vfiopci.Scheme:
		address, option, has := strings.Cut(rest, ",")
		if has && option != "noiommu" {
			err = fmt.Errorf("%s: option %q: there is noiommu only", address, option)
			break
		}
		dev, err = opened(vfiopci.Open(address, vfiopci.Options{NoIOMMU: has}))
	case sysfspci.Scheme:
		dev, err = opened(sysfspci.Open(rest))
	case vfiouser.Scheme:
		if rest == "" {
			return nil, unknown(name)
		}
		dev, err = opened(vfiouser.Open(ctx, vfiouser.Path(rest)))
	default:
		return nil, unknown(name)
	}
	if err != nil {
		return nil, fmt.Errorf("%s%w", scheme, err)
	}
	return dev, nil
}

// opened keeps a nil pointer from becoming an interface that is not nil.
func opened[D device.Device](dev D, err error) (device.Device, error) {
	if err != nil {
		return nil, err
	}
	return dev, nil
}

func unknown(name string) error { return fmt.Errorf("device %q: unknown kind, want %s", name, Usage) }

// Choose returns the name by which the PCI function at address is best opened as it is now, and why. The error says what to change if it cannot be.
func Choose(address string) (name, why string, err error) {
	f, err := pcifn.Lookup(address)
	if err != nil {
		return "", "", err
	}
	return Way(f)
}

// Way is Choose for a function that was looked up.
func Way(f *pcifn.Function) (name, why string, err error) {
	switch {
	case f.VFIO() && f.NoIOMMU:
		return vfiopci.Scheme + f.Address + ",noiommu", f.Driver + " has it, without an IOMMU", nil
	case f.VFIO():
		return vfiopci.Scheme + f.Address, f.Driver + " has it", nil
	case f.Driver != "":
		return "", "", fmt.Errorf("%s: the kernel's driver %s has it: guestdrv bind %s takes it away, and its disks: %w", f.Address, f.Driver, f.Address, unix.EBUSY)
	case f.Translated():
		return "", "", fmt.Errorf("%s: an IOMMU translates its addresses, so that it needs VFIO: guestdrv bind %s: %w", f.Address, f.Address, unix.ENODEV)
	case f.Group != "":
		return sysfspci.Scheme + f.Address, "no driver has it, and its IOMMU group is not translated", nil
	}
	return sysfspci.Scheme + f.Address, "no driver has it, and there is no IOMMU", nil
}

// OnThisMachine says that the device of this name is hardware, which to open takes rights on the machine itself: files of root, capabilities that
// count outside of every user namespace.
func OnThisMachine(name string) bool {
	for _, scheme := range []string{Scheme, vfiopci.Scheme, sysfspci.Scheme} {
		if strings.HasPrefix(name, scheme) {
			return true
		}
	}
	return false
}

// Notice returns what the user should know about how dev was opened, "" if nothing: it works, but not as well as it might.
func Notice(dev device.Device) string {
	if n, ok := dev.(interface{ Notice() string }); ok {
		return n.Notice()
	}
	return ""
}
