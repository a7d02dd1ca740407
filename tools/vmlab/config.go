package vmlab

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"time"
)

// Machine is a QEMU machine type.
type Machine string

// The machines that the lab knows.
const (
	Q35     Machine = "q35"     // PCIe, hot-plug, firmware; the default
	PC      Machine = "pc"      // i440FX: conventional PCI
	Microvm Machine = "microvm" // PCIe without firmware tables: what serverless platforms run
)

// Firmware is what starts a machine that boots from a disk.
type Firmware string

// Both are Debian's builds. SeaBIOS is the default, and what a kernel is loaded by on q35 and pc.
const (
	SeaBIOS Firmware = "seabios"
	OVMF    Firmware = "ovmf"
)

// Boot is where the kernel comes from.
type Boot int

const (
	// Direct loads the stock kernel and the lab's initramfs, whose init starts the agent.
	Direct Boot = iota
	// RootDisk loads the stock kernel alone; Append must say root=. The agent must be in that file system (see Lab.InstallAgent).
	RootDisk
	// FromDisk loads nothing: the firmware starts what is on the disk with the lowest bootindex.
	FromDisk
)

// Kernel is which of the lab's two a guest runs.
type Kernel string

const (
	// Stable is the stock kernel of Debian stable.
	Stable Kernel = "stable"
	// Backports is the newest that Debian has for it, with newerModules only.
	Backports Kernel = "backports"
)

// Config is a machine to boot. The zero value is a q35 with 2 CPUs, 512 MiB and no disk.
type Config struct {
	Machine   Machine
	Firmware  Firmware
	Boot      Boot
	Kernel    Kernel // Stable if empty
	CPUs      int
	MemoryMiB int
	// Devices are plugged in from the start, in this order on the bus.
	Devices []Device
	// Ports is the number of PCIe root ports for VM.HotAdd; q35 only, at most 12.
	Ports int
	// VIOMMU gives the machine an Intel IOMMU, which its kernel uses; q35 only.
	VIOMMU bool
	// Nested gives the machine's CPUs what KVM needs, so that it can have guests of its own: Lab.NestedImage.
	Nested bool
	// Backend is the rest of the memory's -object, after memory-backend-: "memfd,share=on" if empty. "ram" hands out no descriptors: DMA
	// by messages.
	Backend string
	// Append goes to the kernel's command line.
	Append string
	// Programs of this module's tools, such as guestdrv, are built and put into /usr/bin of a Direct guest.
	Programs []string
	// Files are put into a Direct guest: path in the guest to path here.
	Files map[string]string
	// Initramfs is what a Direct guest boots instead of the lab's own. There is no agent in it, so NoAgent goes with it.
	Initramfs *Initramfs
	// Reboot lets the guest restart; otherwise a restart ends the machine.
	Reboot bool
	// NoAgent is for guests without one: Start does not wait, and only the console and QMP work.
	NoAgent bool
	// Args go to QEMU as they are.
	Args []string
	// Within is how long the guest may take until its agent answers; 0: 3 minutes, since others may be at work on the machine.
	Within time.Duration
}

const (
	defaultWithin = 3 * time.Minute
	maxPorts      = 12

	// Of bus 0, where each device has its place: a test finds its disk by that.
	firstDeviceSlot = 2
	firstPortSlot   = 0x10
	agentSlot       = 0x1e
)

// Device is a device as QEMU's -device and device_add take it, and the file behind it.
type Device struct {
	Props map[string]any
	file  string
}

// VFIOUser is the device that a vfio-user server presents at socket.
func VFIOUser(socket string) Device {
	return Device{Props: map[string]any{"driver": "vfio-user-pci", "socket": map[string]any{"type": "unix", "path": socket}}}
}

// QEMUNVMe is QEMU's own NVMe controller with a raw image as its namespace: what ours is compared with.
func QEMUNVMe(image, serial string) Device {
	return Device{Props: map[string]any{"driver": "nvme", "serial": serial, "max_ioqpairs": 4}, file: image}
}

// With returns the device with one property more, such as bootindex or x-no-posted-writes.
func (d Device) With(name string, value any) Device {
	d.Props = maps.Clone(d.Props)
	d.Props[name] = value
	return d
}

// check fills in what is not said and refuses what cannot be.
func (c *Config) check() error {
	if c.Machine == "" {
		c.Machine = Q35
	}
	if c.Firmware == "" {
		c.Firmware = SeaBIOS
	}
	if c.Kernel == "" {
		c.Kernel = Stable
	}
	if c.CPUs == 0 {
		c.CPUs = 2
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 512
	}
	if c.Backend == "" {
		c.Backend = "memfd,share=on"
	}
	if c.Within == 0 {
		c.Within = defaultWithin
	}
	if c.Kernel != Stable && (c.Boot != Direct || c.Initramfs != nil) {
		return fmt.Errorf("the modules of kernel %s go with the lab's initramfs only: use Boot: Direct, and no initramfs of its own", c.Kernel)
	}
	if c.Initramfs != nil {
		c.NoAgent = true
		if c.Boot != Direct || c.Programs != nil || c.Files != nil {
			return fmt.Errorf("a guest with an initramfs of its own is booted directly, and has its programs and files in that")
		}
	}
	switch c.Machine {
	case Q35:
	case PC, Microvm:
		if c.Ports > 0 || c.VIOMMU {
			return fmt.Errorf("machine %s has neither root ports nor a vIOMMU here: use %s", c.Machine, Q35)
		}
		if c.Machine == Microvm && (c.Boot == FromDisk || c.Firmware == OVMF) {
			return fmt.Errorf("machine %s boots a kernel, not a disk, and without OVMF", c.Machine)
		}
	default:
		return fmt.Errorf("machine %q: use %s, %s or %s", c.Machine, Q35, PC, Microvm)
	}
	if n := firstPortSlot - firstDeviceSlot; len(c.Devices) > n {
		return fmt.Errorf("%d devices: at most %d", len(c.Devices), n)
	}
	if c.Ports > maxPorts {
		return fmt.Errorf("%d root ports: at most %d", c.Ports, maxPorts)
	}
	return nil
}

// kernelArgs make a stock kernel start fast under emulation: no self-tests, no mitigations, no calibration loops. A virtual CPU that gets
// no time on a busy machine has not stalled.
const kernelArgs = "rcupdate.rcu_cpu_stall_timeout=300 console=ttyS0 quiet panic=-1 mitigations=off init_on_alloc=0 cryptomgr.notests apparmor=0 security=none audit=0 nokaslr no_timer_check random.trust_cpu=on"

// kernelLine is kernelArgs, and under emulation the rate of the TSC. microvm has no timer that the kernel could measure it by, and hangs
// when it tries; elsewhere the measurement goes wrong on a machine that is busy, and what a kernel knows late it corrects by a jump:
// over the seconds that UEFI took, which looks like a soft lockup.
func kernelLine(accel string) string {
	if accel == tcg {
		return fmt.Sprintf("%s tsc_early_khz=%d tsc=reliable", kernelArgs, tscKHz())
	}
	return kernelArgs
}

// minMaxCPUs is the least number of CPUs that a machine may get. Where it is 1, QEMU's emulation takes the guest's locked instructions for
// ordinary ones, because no other CPU could see the difference. A mediator in another process does: without the barrier in them a driver
// whose tail store is such an instruction, as Go's are, loads the event index too early, and a wake-up is lost (R1).
const minMaxCPUs = 2

// arguments are QEMU's. dir is the machine's directory, where its initramfs and its flash are.
func (c *Config) arguments(l *Lab, accel, dir string) ([]string, error) {
	kind, rest, _ := strings.Cut(c.Backend, ",")
	memory := fmt.Sprintf("memory-backend-%s,id=mem,size=%dM", kind, c.MemoryMiB)
	if rest != "" {
		memory += "," + rest
	}
	machine := string(c.Machine) + ",memory-backend=mem"
	if c.Machine == Microvm {
		machine += ",pcie=on,rtc=on"
	}
	if c.VIOMMU {
		machine += ",kernel-irqchip=split"
	}
	args := []string{
		"-L", filepath.Join(l.root(), "usr/share/qemu"), "-L", filepath.Join(l.root(), "usr/share/seabios"),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-smp", fmt.Sprintf("cpus=%d,maxcpus=%d", c.CPUs, max(c.CPUs, minMaxCPUs)), "-m", fmt.Sprint(c.MemoryMiB), "-object", memory, "-machine", machine,
	}
	switch {
	case accel == kvm:
		args = append(args, "-accel", "kvm", "-cpu", "host")
	case c.Nested: // QEMU emulates AMD's
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand,+svm,+npt")
	default:
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand")
	}
	if !c.Reboot {
		args = append(args, "-no-reboot")
	}
	if c.VIOMMU {
		args = append(args, "-device", "intel-iommu,intremap=on,caching-mode=on") // before what is behind it
	}
	if c.Firmware == OVMF {
		args = append(args,
			"-drive", "if=pflash,format=raw,readonly=on,file="+filepath.Join(l.root(), "usr/share/OVMF/OVMF_CODE_4M.fd"),
			"-drive", "if=pflash,format=raw,file="+filepath.Join(dir, flashFile))
	}
	args = append(args, c.kernel(l, accel, dir)...)
	for i := range c.Ports {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=port%d,chassis=%d,slot=%d,addr=%#x", i, i+1, i+1, firstPortSlot+i))
	}
	for i, d := range c.Devices {
		if d.file != "" {
			drive := fmt.Sprintf("drive%d", i)
			args = append(args, "-drive", fmt.Sprintf("file=%s,if=none,id=%s,format=raw,cache=unsafe", strings.ReplaceAll(d.file, ",", ",,"), drive))
			d = d.With("drive", drive)
		}
		if d.Props["bus"] == nil && d.Props["addr"] == nil {
			d = d.With("addr", fmt.Sprintf("%#x", firstDeviceSlot+i))
		}
		b, err := json.Marshal(d.Props)
		if err != nil {
			return nil, err
		}
		args = append(args, "-device", string(b))
	}
	return append(args, c.Args...), nil
}

const (
	initrdFile = "initrd"
	flashFile  = "flash.fd"
)

func (c *Config) kernel(l *Lab, accel, dir string) []string {
	if c.Boot == FromDisk {
		return nil
	}
	image := "vmlinux"
	if c.Machine == Microvm || c.Firmware == OVMF {
		image = "bzImage" // neither enters a vmlinux
	}
	line := kernelLine(accel)
	args := []string{"-kernel", filepath.Join(l.kernelDir(c.Kernel), image)}
	if c.Boot == Direct {
		args = append(args, "-initrd", filepath.Join(dir, initrdFile))
	}
	return append(args, "-append", strings.TrimSpace(line+" "+c.Append))
}
