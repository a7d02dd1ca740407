package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type listCmd struct {
	JSON bool `name:"json" help:"Print one JSON array."`
}

// Help is what stands below the arguments.
func (listCmd) Help() string {
	return `Shows the PCI functions of this machine that are NVMe controllers: address, vendor and device, the kernel's driver, the IOMMU group and how the kernel uses it, what the kernel knows of the disks, and how guestdrv would open each as it is now. It changes nothing and needs no rights, but sees the mounts of its own mount namespace only.

Sockets of vfio-user servers are not looked for: they are DEVICE vfio-user:PATH.`
}

// listed is a function and how it would be opened.
type listed struct {
	pcifn.Function
	Open string `json:"open,omitempty"` // a DEVICE; empty: not as it is
	Why  string `json:"why"`
}

// Run prints what there is.
func (l *listCmd) Run(out *cli.Output) error {
	functions, err := pcifn.List()
	if err != nil {
		return err
	}
	list := []listed{}
	for _, f := range functions {
		list = append(list, howToOpen(f))
	}
	if l.JSON {
		e := json.NewEncoder(out.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(list)
	}
	_, err = fmt.Fprint(out.Stdout, listTable(list))
	return err
}

func howToOpen(f pcifn.Function) listed {
	name, why, err := devices.Way(&f)
	switch {
	case err == nil && len(f.Others) > 0 && f.VFIO():
		var others []string
		for _, o := range f.Others {
			others = append(others, fmt.Sprintf("%s (%s)", o.Address, o.Driver))
		}
		return listed{f, "", "the kernel still has others of its IOMMU group, which must be bound to vfio-pci or to nothing too: " + strings.Join(others, ", ")}
	case err == nil:
		return listed{f, name, why}
	case len(f.Uses()) > 0:
		return listed{f, "", "in use: " + strings.Join(f.Uses(), ", ")}
	}
	return listed{f, "", "guestdrv bind " + f.Address + " first"}
}

// listTable is the list for people.
func listTable(list []listed) string {
	if len(list) == 0 {
		return "no PCI function of this machine is an NVMe controller\n"
	}
	var b strings.Builder
	for i, f := range list {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s  %04x:%04x", f.Address, f.Vendor, f.Device)
		if f.Model != "" {
			fmt.Fprintf(&b, "  %s", f.Model)
		}
		b.WriteByte('\n')
		t := text.Table{Left: map[int]bool{1: true}}
		t.Add("driver", or(f.Driver, "none"))
		group := "no group"
		if f.Group != "" {
			group = "group " + f.Group
			if f.GroupType != "" {
				group += ", " + f.GroupType
			}
		}
		t.Add("IOMMU", group)
		for _, d := range f.Disks {
			t.Add("disk", strings.Join(append([]string{d.Name + ", " + size.Bytes(d.Bytes).Human()}, d.Uses...), "; "))
		}
		if f.Open != "" {
			t.Add("opened as", fmt.Sprintf("%s: %s", f.Open, f.Why))
		} else {
			t.Add("opened as", "nothing: "+f.Why)
		}
		b.WriteString(t.String())
	}
	return b.String()
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

type bindCmd struct {
	Address string `arg:"" help:"PCI address, such as 0000:00:04.0 or 00:04.0; guestdrv list shows which there are."`
	Driver  string `default:"auto" enum:"auto,vfio-pci,none" placeholder:"NAME" help:"vfio-pci: for vfio:, behind an IOMMU; none: for sysfs:; auto: vfio-pci if the function is in an IOMMU group, otherwise none (${default})."`
}

// Help is what stands below the arguments.
func (bindCmd) Help() string {
	return `Takes a PCI function from the kernel's nvme driver, so that guestdrv can have it: the kernel loses its disks, what is on them stays. guestdrv unbind gives it back; so does a restart, since nothing is written to any disk or configuration. Opening a device never does this by itself.

It is refused if a disk of the function, or a partition, is mounted (in any mount namespace), is swap, or is part of something: LVM, dm-crypt, md, bcache, ZFS, a loop device. The message names that. What merely has a disk open, such as dd or a virtual machine's disk, is not seen, and gets I/O errors.

vfio-pci must be loaded (modprobe vfio-pci), and all functions of the IOMMU group must leave the kernel before VFIO opens one of them: guestdrv list names those that have not. It takes root. To let a user drive the function, give away the group's file: chown USER /dev/vfio/GROUP.

Examples

  guestdrv list
  guestdrv bind 0000:00:04.0
  guestdrv identify pci:0000:00:04.0
  guestdrv unbind 0000:00:04.0`
}

// Run takes the function.
func (c *bindCmd) Run(out *cli.Output) error {
	f, err := pcifn.Lookup(c.Address)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	driver := c.Driver
	if driver == "auto" {
		driver = pcifn.VFIO
		if f.Group == "" {
			driver = pcifn.None
		}
	}
	if err := pcifn.Bind(f.Address, driver); err != nil {
		return bindError(err)
	}
	if f, err = pcifn.Lookup(c.Address); err != nil {
		return err
	}
	_, err = fmt.Fprint(out.Stdout, listTable([]listed{howToOpen(*f)}))
	return err
}

func bindError(err error) error {
	if errors.Is(err, syscall.EBUSY) || errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, errors.ErrUnsupported) {
		return cli.UsageError{Err: err}
	}
	return err
}

type unbindCmd struct {
	Address string        `arg:"" help:"PCI address, such as 0000:00:04.0 or 00:04.0."`
	Wait    time.Duration `default:"5s" placeholder:"TIME" help:"How long to wait until the kernel shows a disk (${default})."`
}

// Help is what stands below the arguments.
func (unbindCmd) Help() string {
	return `Gives a function that guestdrv bind took back to the kernel, whose nvme driver finds its disks again. It is refused while a process drives the function.`
}

// Run gives the function back.
func (c *unbindCmd) Run(out *cli.Output) error {
	if err := pcifn.Unbind(c.Address); err != nil {
		return bindError(err)
	}
	f, err := pcifn.Lookup(c.Address)
	if err == nil {
		f, err = pcifn.WaitDisks(f.Address, c.Wait)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(out.Stdout, listTable([]listed{howToOpen(*f)}))
	return err
}
