package hostmed

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// device is the PCI function that a session's client sees. Its methods run on the session's goroutine.
type device struct{ *session }

var _ vfiouser.Device = (*device)(nil)

func (d *device) Info() vfiouser.DeviceInfo {
	return vfiouser.DeviceInfo{
		Flags: vfiouser.DeviceReset | vfiouser.DevicePCI, NumRegions: vfiouser.NumRegions, NumIRQs: vfiouser.NumIRQs,
	}
}

func (d *device) RegionInfo(i uint32) (vfiouser.RegionInfo, bool) {
	r := vfiouser.RegionInfo{Index: i, Flags: vfiouser.RegionRead | vfiouser.RegionWrite, FD: -1}
	switch i {
	case vfiouser.RegionBAR0:
		r.Size = d.cfg.BARSize(pci.BARRegisters)
		if bar := d.data.Doorbells(); bar != nil {
			r.Flags |= vfiouser.RegionMmap
			r.FD = bar.FD()
			r.Areas = []vfiouser.MmapArea{{Offset: nvme.DoorbellBase, Size: bar.Len() - nvme.DoorbellBase}}
		}
	case vfiouser.RegionConfig:
		r.Size = pci.ConfigSize
	case pci.BARTable, pci.BARPBA:
		r.Size = d.cfg.BARSize(int(i))
	default:
		return r, false
	}
	return r, true
}

func (d *device) DMAMap(m vfiouser.DMAMap, fd int) error {
	if fd >= 0 && shm.CanShrink(fd) && d.log.IsDebug() {
		d.log.Debug("client memory is not sealed against shrinking", "iova", fmt.Sprintf("%#x", m.IOVA))
	}
	if fd < 0 {
		d.unshared(&m)
	}
	if err := d.mem.Map(m.IOVA, m.Size, m.Offset, fd, m.Flags&vfiouser.DMAWrite != 0); err != nil {
		d.advise("memory of the client refused", err)
		return err
	}
	d.ctl.MemoryGained()
	d.data.Mapped()
	return nil
}

// Messages are answered within a while, whatever the media do: QEMU takes a server that does not answer for 5 s for dead, and its guest then has no
// disk any more. A command that a medium does not end cannot be taken back from the kernel, nor is its memory free before it has ended. So what such a command
// needs stays mapped here, where it is nobody else's, until it has ended, and the client is told: by CSTS.RDY, which stays 1, and by EBUSY.
const (
	resetPatience = 2 * time.Second
	unmapPatience = 2 * time.Second
)

// DMAUnmap takes the ranges out, makes everybody let go of them, and only then unmaps them and answers (R25, R35). Queues in
// them are parked. The answer EBUSY says that the ranges are out, but that commands of before may still move data there: the client may map
// them again, but had better not use the memory for something else.
func (d *device) DMAUnmap(iova, size uint64, flags uint32) error {
	if flags&vfiouser.UnmapAll != 0 {
		iova, size = 0, 0
	}
	gone, err := d.mem.Unmap(iova, size)
	if err != nil || len(gone) == 0 {
		return err
	}
	for i := range gone {
		d.ctl.MemoryLost(gone[i].IOVA, gone[i].Size)
	}
	patience := unmapPatience
	if !d.ctl.Settle(0) { // which was waited for in vain
		patience = 0
	}
	if !d.data.Unmapped(gone, patience) {
		d.retired = append(d.retired, gone...)
		d.log.Warn("memory that the client takes back is still used by commands that their medium does not end", "iova", fmt.Sprintf("%#x", iova), "size", fmt.Sprintf("%#x", size))
		return fmt.Errorf("commands in flight still use the memory: %w", unix.EBUSY)
	}
	return d.mem.Release(gone)
}

func (d *device) RegionRead(i uint32, off uint64, p []byte) error {
	if i != vfiouser.RegionConfig && d.asleep.Load() {
		for k := range p {
			p[k] = 0xff // nobody answers: PCI PM 1.2 5.4.1
		}
		return nil
	}
	switch {
	case i == vfiouser.RegionConfig:
		if pci.HasStatus(off, len(p)) {
			d.cfg.SetInterruptStatus(d.interruptStatus())
		}
		return d.cfg.Read(off, p)
	case i == pci.BARTable:
		return d.msix.ReadTable(off, p)
	case i == pci.BARPBA:
		return d.msix.ReadPBA(off, p)
	case i == vfiouser.RegionBAR0 && off < nvme.DoorbellBase:
		return d.ctl.ReadReg(off, p)
	case i == vfiouser.RegionBAR0:
		clear(p) // reading a doorbell is undefined: NVMe PCIe Transport 1.0c 3.1.2
		return nil
	}
	return fmt.Errorf("region %d: %w", i, unix.EINVAL)
}

func (d *device) RegionWrite(i uint32, off uint64, p []byte) error {
	if i != vfiouser.RegionConfig && d.asleep.Load() {
		return nil
	}
	switch {
	case i == vfiouser.RegionConfig:
		ev, err := d.cfg.Write(off, p)
		d.configChanged(ev)
		return err
	case i == pci.BARTable:
		return d.msix.WriteTable(off, p)
	case i == pci.BARPBA:
		return nil // read-only
	case i == vfiouser.RegionBAR0 && off < nvme.DoorbellBase:
		err := d.ctl.WriteReg(off, p)
		if off < nvme.RegINTMC+4 && off+uint64(len(p)) > nvme.RegINTMC {
			d.checkPin(false)
		}
		return err
	case i == vfiouser.RegionBAR0:
		return fmt.Errorf("doorbell write of %d bytes at %#x: doorbells are written as 4 aligned bytes: %w", len(p), off, unix.EINVAL)
	}
	return fmt.Errorf("region %d: %w", i, unix.EINVAL)
}

// Reset is DEVICE_RESET. The answer EBUSY says that the device is reset, but that commands of before may still move data, until CSTS.RDY is 0.
func (d *device) Reset() error {
	d.cfg.Reset()
	d.reset()
	if !d.ctl.Settle(resetPatience) {
		return fmt.Errorf("commands of before the reset have not ended: %w", unix.EBUSY)
	}
	return nil
}

// reset is what an FLR does to all but the configuration space.
func (d *device) reset() {
	d.ctl.Reset()
	d.msix.Reset()
	d.data.MaskVectors(0, int(d.cfg.Vectors()), ioq.MaskTable, false)
	d.master, d.masterLost = false, false
	d.power()
	d.interruptsChanged()
}
