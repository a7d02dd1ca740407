// Package devices opens a [device.Device] by its name. A name is a scheme and what the scheme's package makes of the rest:
//
//	vfio-user:PATH    the server that listens on the socket PATH, or on PATH/cntrl if PATH is a directory
//	sysfs:ADDRESS     the PCI function ADDRESS, such as 0000:00:04.0, by sysfs: polled, without an IOMMU, for test machines
//
// Every program that takes a device on its command line goes through here, so that a new kind of device is new in all of them.
package devices

import (
	"context"
	"fmt"

	"github.com/shadowbell/shadowbell/guestdrv/device"
	"github.com/shadowbell/shadowbell/guestdrv/device/sysfspci"
	"github.com/shadowbell/shadowbell/guestdrv/device/vfiouser"
)

// Open opens the device that name says. ctx ends the attempt only.
func Open(ctx context.Context, name string) (device.Device, error) {
	if path, ok := vfiouser.IsName(name); ok && path != "" {
		dev, err := vfiouser.Open(ctx, vfiouser.Path(path))
		if err != nil {
			return nil, fmt.Errorf("%s%w", vfiouser.Scheme, err)
		}
		return dev, nil
	}
	if bdf, ok := sysfspci.IsName(name); ok {
		dev, err := sysfspci.Open(bdf)
		if err != nil {
			return nil, fmt.Errorf("%s%w", sysfspci.Scheme, err)
		}
		return dev, nil
	}
	return nil, fmt.Errorf("device %q: unknown kind, want %sPATH or %sADDRESS", name, vfiouser.Scheme, sysfspci.Scheme)
}

// Notice returns what the user should know about how dev was opened, "" if nothing: it works, but not as well as it might.
func Notice(dev device.Device) string {
	if n, ok := dev.(interface{ Notice() string }); ok {
		return n.Notice()
	}
	return ""
}
