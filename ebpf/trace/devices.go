package trace

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Device is an NVMe controller as the kernel's driver has it.
type Device struct {
	Name     string // nvme0
	Instance uint16
	Model    string
	Serial   string
	Address  string // PCI, or what the transport has
	Disks    []Disk
}

// Disk is a namespace of a Device.
type Disk struct {
	Name      string // nvme0n1
	NSID      uint32
	BlockSize uint32 // bytes of a logical block
}

const sysfs = "/sys"

// Devices returns the NVMe controllers of this machine, by instance; none where there is no driver.
func Devices() ([]Device, error) { return devicesOf(sysfs) }

func devicesOf(sys string) ([]Device, error) {
	entries, err := os.ReadDir(filepath.Join(sys, "class/nvme"))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var devices []Device
	for _, e := range entries {
		n, err := strconv.ParseUint(strings.TrimPrefix(e.Name(), "nvme"), 10, 16)
		if err != nil {
			continue
		}
		dir := filepath.Join(sys, "class/nvme", e.Name())
		d := Device{Name: e.Name(), Instance: uint16(n), Model: attribute(dir, "model"), Serial: attribute(dir, "serial"), Address: attribute(dir, "address")}
		// With multipath the disk of a path is hidden and called nvme0c0n1.
		names, err := filepath.Glob(filepath.Join(dir, "nvme*n*"))
		if err != nil {
			return nil, err
		}
		for _, disk := range names {
			nsid, err := strconv.ParseUint(attribute(disk, "nsid"), 10, 32)
			if err != nil {
				continue // gone meanwhile, or no disk
			}
			size, err := strconv.ParseUint(attribute(disk, "queue/logical_block_size"), 10, 32)
			if err != nil {
				continue
			}
			d.Disks = append(d.Disks, Disk{Name: filepath.Base(disk), NSID: uint32(nsid), BlockSize: uint32(size)})
		}
		devices = append(devices, d)
	}
	slices.SortFunc(devices, func(a, b Device) int { return int(a.Instance) - int(b.Instance) })
	return devices, nil
}

// attribute returns a file of sysfs; "" if it is not there.
func attribute(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// FindDevice returns the controller that a user names: nvme0, its disk nvme0n1 or a partition of that, with or without /dev/.
func FindDevice(name string) (Device, error) {
	devices, err := Devices()
	if err != nil {
		return Device{}, err
	}
	return findDevice(devices, name)
}

func findDevice(devices []Device, name string) (Device, error) {
	base := strings.TrimPrefix(name, "/dev/")
	var known []string
	for _, d := range devices {
		known = append(known, d.Name)
		if base == d.Name || strings.HasPrefix(base, d.Name+"n") {
			return d, nil
		}
		for _, disk := range d.Disks {
			if base == disk.Name {
				return d, nil
			}
		}
	}
	if len(known) == 0 {
		return Device{}, fmt.Errorf("no device %s: the kernel has no NVMe controller", name)
	}
	return Device{}, fmt.Errorf("no device %s: there is %s", name, strings.Join(known, ", "))
}

// diskNames finds the names of disks by their numbers.
type diskNames struct {
	mu    sync.Mutex
	known map[uint32]string
}

func newDiskNames() *diskNames { return &diskNames{known: map[uint32]string{}} }

// name takes a number as the kernel has it inside: 12 bits of major, 20 of minor.
func (d *diskNames) name(dev uint32) string {
	number := fmt.Sprintf("%d:%d", dev>>20, dev&(1<<20-1))
	d.mu.Lock()
	defer d.mu.Unlock()
	if name, ok := d.known[dev]; ok {
		return name
	}
	to, err := os.Readlink(filepath.Join(sysfs, "dev/block", number))
	if err != nil {
		return number // gone; a new one may get the number
	}
	d.known[dev] = filepath.Base(to)
	return d.known[dev]
}
