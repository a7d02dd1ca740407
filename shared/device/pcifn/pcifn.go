// Package pcifn says which PCI functions of this machine are NVMe controllers, what drives each, and what its disks are used for; and it gives a
// function to another driver and back. Nothing here happens by itself: opening a device never changes what drives it.
package pcifn

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
)

// Function is a PCI function that is an NVMe controller.
type Function struct {
	Address string `json:"address"` // such as 0000:00:04.0
	Vendor  uint16 `json:"vendor"`
	Device  uint16 `json:"device"`
	Driver  string `json:"driver"` // of the kernel; "": none
	// Model and Serial are what the kernel's nvme driver read; "" while that driver does not have it.
	Model  string `json:"model,omitempty"`
	Serial string `json:"serial,omitempty"`
	// Group is the number of the IOMMU group; "": it is in none. GroupType is how the kernel uses it: identity, DMA, DMA-FQ or unmanaged.
	Group     string `json:"iommu_group,omitempty"`
	GroupType string `json:"iommu_type,omitempty"`
	// NoIOMMU says that VFIO made the group up: nothing stands between the function and memory.
	NoIOMMU bool `json:"noiommu,omitempty"`
	// Others are the other functions of the group that a kernel driver has: as long as there are any, VFIO does not open the function by its group.
	Others []Member `json:"group_in_use,omitempty"`
	Disks  []Disk   `json:"disks"`
}

// Member is a function of an IOMMU group.
type Member struct {
	Address string `json:"address"`
	Driver  string `json:"driver"`
}

// Disk is a namespace that the kernel has a block device of.
type Disk struct {
	Name  string `json:"name"` // such as nvme0n1
	NSID  uint32 `json:"nsid,omitempty"`
	Bytes uint64 `json:"bytes"`
	// Uses are what keeps it from being taken away: "mounted at /srv", "nvme0n1p2 is swap", "nvme0n1 is held by dm-0".
	Uses []string `json:"uses,omitempty"`
}

// Uses returns what all disks of the function are used for.
func (f *Function) Uses() []string {
	var out []string
	for _, d := range f.Disks {
		out = append(out, d.Uses...)
	}
	return out
}

// Translated says that an IOMMU of the machine translates the function's addresses, so that physical ones are not what it reaches.
func (f *Function) Translated() bool {
	return f.Group != "" && !f.NoIOMMU && f.GroupType != "" && f.GroupType != "identity"
}

// VFIO says that a driver of VFIO has the function.
func (f *Function) VFIO() bool { return isVFIO(f.Driver) }

func isVFIO(driver string) bool { return strings.Contains(driver, "vfio") }

// host is where the kernel shows and takes things. Tests have their own.
type host struct {
	sys, proc, dev string
	write          func(path, text string) error
	claim          func(path string) (release func(), err error)
}

var machine = host{sys: "/sys", proc: "/proc", dev: "/dev", write: writeFile, claim: claimDevice}

// List returns the NVMe controllers of the machine, by address.
func List() ([]Function, error) { return machine.list() }

// Lookup returns the NVMe controller at a PCI address.
func Lookup(address string) (*Function, error) { return machine.lookup(address) }

func (h *host) function(address string) string {
	return filepath.Join(h.sys, "bus/pci/devices", address)
}

func (h *host) list() ([]Function, error) {
	entries, err := os.ReadDir(filepath.Join(h.sys, "bus/pci/devices"))
	if err != nil {
		return nil, fmt.Errorf("PCI functions: %w", err)
	}
	out := []Function{}
	for _, e := range entries {
		class, err := number(filepath.Join(h.function(e.Name()), "class"))
		if err != nil || class != pci.ClassNVMe {
			continue
		}
		f, err := h.read(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, *f)
	}
	return out, nil
}

func (h *host) lookup(address string) (*Function, error) {
	address, err := pci.ParseAddress(address)
	if err != nil {
		return nil, err
	}
	class, err := number(filepath.Join(h.function(address), "class"))
	if err != nil {
		return nil, fmt.Errorf("%s: no such PCI function: %w (guestdrv list shows which there are)", address, err)
	}
	if class != pci.ClassNVMe {
		return nil, fmt.Errorf("%s: not an NVMe controller: PCI class %06x, want %06x (guestdrv list shows which there are)", address, class, pci.ClassNVMe)
	}
	return h.read(address)
}

func (h *host) read(address string) (*Function, error) {
	dir := h.function(address)
	f := &Function{Address: address, Driver: h.driver(address), Disks: []Disk{}}
	vendor, err := number(filepath.Join(dir, "vendor"))
	if err != nil {
		return nil, err
	}
	device, err := number(filepath.Join(dir, "device"))
	if err != nil {
		return nil, err
	}
	f.Vendor, f.Device = uint16(vendor), uint16(device)
	if link, err := os.Readlink(filepath.Join(dir, "iommu_group")); err == nil {
		f.Group = filepath.Base(link)
		f.GroupType = text(filepath.Join(dir, "iommu_group/type"))
		f.NoIOMMU = text(filepath.Join(dir, "iommu_group/name")) == "vfio-noiommu"
		f.Others = h.others(address)
	}
	return f, h.readDisks(f)
}

// driver returns the kernel's driver of a function, "" if it has none.
func (h *host) driver(address string) string {
	link, err := os.Readlink(filepath.Join(h.function(address), "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(link)
}

// others returns the members of the function's group that stand against its use by VFIO. Drivers of bridges do no DMA of their own.
func (h *host) others(address string) []Member {
	var out []Member
	entries, _ := os.ReadDir(filepath.Join(h.function(address), "iommu_group/devices"))
	for _, e := range entries {
		if d := h.driver(e.Name()); e.Name() != address && d != "" && d != "pcieport" && !isVFIO(d) {
			out = append(out, Member{e.Name(), d})
		}
	}
	return out
}

// block is the name of a namespace's block device: nvme0n1, or nvme0c1n1 for one path to nvme0n1.
var block = regexp.MustCompile(`^(nvme\d+)(c\d+)?(n\d+)$`)

// readDisks looks for the block devices of what the nvme driver made of the function.
func (h *host) readDisks(f *Function) error {
	controllers, err := filepath.Glob(filepath.Join(h.function(f.Address), "nvme/nvme*"))
	if err != nil {
		return err
	}
	var u uses
	for _, c := range controllers {
		f.Model, f.Serial = text(filepath.Join(c, "model")), text(filepath.Join(c, "serial"))
		entries, err := os.ReadDir(c)
		if err != nil {
			return err
		}
		for _, e := range entries {
			m := block.FindStringSubmatch(e.Name())
			if m == nil {
				continue
			}
			if u.mounts == nil {
				if u, err = h.readUses(); err != nil {
					return err
				}
			}
			d := Disk{Name: m[1] + m[3]}
			nsid, _ := number(filepath.Join(c, e.Name(), "nsid")) // old kernels have none
			d.NSID = uint32(nsid)
			sectors, err := number(filepath.Join(h.sys, "class/block", d.Name, "size"))
			if err != nil {
				if sectors, err = number(filepath.Join(c, e.Name(), "size")); err != nil {
					return err
				}
			}
			d.Bytes = sectors * 512
			d.Uses = h.usesOf(d.Name, &u)
			f.Disks = append(f.Disks, d)
		}
	}
	slices.SortFunc(f.Disks, func(a, b Disk) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

func number(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 0, 64)
}

// text returns what is in a file, "" if it is not there.
func text(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}
