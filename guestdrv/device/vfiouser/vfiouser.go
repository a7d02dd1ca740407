// Package vfiouser is a [device.Device] served by another process over a unix socket: registers and doorbells are
// messages or a mapped page, DMA memory is a sealed memfd that the server maps, interrupts are eventfds.
//
// The protocol itself is in shared/vfiouser. The server is not trusted: what it says is checked against what this side can bear, and
// memory of its making is mapped only if it cannot be taken away again.
package vfiouser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

const (
	// dmaBase is where DMA memory begins in IOVA space: above 4 GiB, so that a 32-bit mistake
	// shows, and never 0.
	dmaBase = 1 << 32

	// maxBAR0 bounds what is believed about the size of BAR0.
	maxBAR0 = 1 << 24

	pciCommand = 0x04 // register of the configuration space
	pciClass   = 0x08 // class code in the upper 24 bits
	classNVMe  = 0x010802

	pciMemory      = 1 << 1
	pciBusMaster   = 1 << 2
	pciINTxDisable = 1 << 10
)

// Device is a controller behind a vfio-user socket.
type Device struct {
	client   *vfiouser.Client
	bar0     uint64 // bytes
	vectors  int
	page     *shm.Region // the doorbell page, from DoorbellBase on; nil: messages
	nextIOVA atomic.Uint64

	// Unmapped says why a doorbell page that the server offered was not mapped; "" otherwise.
	Unmapped string
}

var _ device.Device = (*Device)(nil)

// Path returns the socket that name means: name itself, or cntrl in it if it is a directory, as libvfio-user's servers have it.
func Path(name string) string {
	if st, err := os.Stat(name); err == nil && st.IsDir() {
		return filepath.Join(name, "cntrl")
	}
	return name
}

// Open connects to the server at the socket path, checks that it is an NVMe controller, and maps its doorbell page where it offers one.
func Open(ctx context.Context, path string) (*Device, error) {
	client, err := vfiouser.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	d := &Device{client: client}
	d.nextIOVA.Store(dmaBase)
	if err := d.setup(ctx); err != nil {
		client.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

func (d *Device) setup(ctx context.Context) error {
	info, err := d.client.DeviceInfo(ctx)
	if err != nil {
		return err
	}
	if info.Flags&vfiouser.DevicePCI == 0 || info.NumRegions <= vfiouser.RegionConfig || info.NumIRQs <= vfiouser.IRQMSIX {
		return fmt.Errorf("not a PCI device: flags %#x, %d regions, %d interrupt types", info.Flags, info.NumRegions, info.NumIRQs)
	}
	if err := d.configSpace(ctx); err != nil {
		return err
	}
	irq, err := d.client.IRQInfo(ctx, vfiouser.IRQMSIX)
	if err != nil {
		return err
	}
	if irq.Flags&vfiouser.IRQEventFD != 0 {
		d.vectors = int(min(irq.Count, 2048)) // MSI-X has no more
	}
	return d.registers(ctx)
}

// configSpace checks the class code and lets the function reach memory.
func (d *Device) configSpace(ctx context.Context) error {
	region, err := d.region(ctx, vfiouser.RegionConfig)
	if err != nil {
		return err
	}
	closeFD(region.FD)
	const need = vfiouser.RegionRead | vfiouser.RegionWrite
	if region.Size < 64 || region.Flags&need != need {
		return fmt.Errorf("PCI configuration space of %d bytes, flags %#x", region.Size, region.Flags)
	}
	var b [4]byte
	if err := d.client.RegionRead(ctx, vfiouser.RegionConfig, pciClass, b[:]); err != nil {
		return err
	}
	if class := binary.LittleEndian.Uint32(b[:]) >> 8; class != classNVMe {
		return fmt.Errorf("not an NVMe controller: PCI class %06x, want %06x", class, classNVMe)
	}
	if err := d.client.RegionRead(ctx, vfiouser.RegionConfig, pciCommand, b[:2]); err != nil {
		return err
	}
	binary.LittleEndian.PutUint16(b[:], binary.LittleEndian.Uint16(b[:])|pciMemory|pciBusMaster|pciINTxDisable)
	return d.client.RegionWrite(ctx, vfiouser.RegionConfig, pciCommand, b[:2])
}

func (d *Device) region(ctx context.Context, index uint32) (vfiouser.RegionInfo, error) {
	return d.client.RegionInfo(ctx, index)
}

// registers looks at BAR0 and maps its first page of doorbells.
func (d *Device) registers(ctx context.Context) error {
	region, err := d.region(ctx, vfiouser.RegionBAR0)
	if err != nil {
		return err
	}
	defer closeFD(region.FD)
	const need = vfiouser.RegionRead | vfiouser.RegionWrite
	if region.Size < nvme.DoorbellBase+8 || region.Size > maxBAR0 || region.Flags&need != need {
		return fmt.Errorf("BAR0 of %#x bytes, flags %#x: cannot hold the registers of an NVMe controller", region.Size, region.Flags)
	}
	d.bar0 = region.Size
	if region.Flags&vfiouser.RegionMmap == 0 || !coversDoorbells(&region) {
		return nil
	}
	if err := d.mapDoorbells(&region); err != nil {
		// Messages work too, so this is no reason to do without the device.
		d.Unmapped = err.Error()
	}
	return nil
}

func coversDoorbells(r *vfiouser.RegionInfo) bool {
	const begin, end = nvme.DoorbellBase, nvme.DoorbellBase + shm.PageSize
	if len(r.Areas) == 0 {
		return r.Size >= end
	}
	for _, a := range r.Areas {
		if a.Offset <= begin && a.Offset+a.Size >= end {
			return true
		}
	}
	return false
}

func (d *Device) mapDoorbells(r *vfiouser.RegionInfo) error {
	if r.FD < 0 {
		return errors.New("the server offers its doorbell page without a file descriptor")
	}
	off := r.Offset + nvme.DoorbellBase
	if off < r.Offset || int64(off) < 0 {
		return fmt.Errorf("the server's doorbell page lies at offset %#x of a file", off)
	}
	// A store to memory that its owner has cut off is a SIGBUS, and here it would be ours (R36).
	if shm.CanShrink(r.FD) {
		return errors.New("the server's doorbell page is in a file that is not sealed against shrinking (F_SEAL_SHRINK)")
	}
	page, err := shm.Map(r.FD, int64(off), shm.PageSize, true)
	if err != nil {
		return fmt.Errorf("the server's doorbell page: %w", err)
	}
	d.page = page
	return nil
}

// closeFD closes what came with a region, if anything did.
func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// wrap makes a lost connection known as such.
func wrap(err error) error {
	if errors.Is(err, vfiouser.ErrPeerGone) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("%w: %w", device.ErrGone, err)
	}
	return err
}

// Read32 reads a register of BAR0.
func (d *Device) Read32(off uint32) (uint32, error) {
	var b [4]byte
	err := d.client.RegionRead(context.Background(), vfiouser.RegionBAR0, uint64(off), b[:])
	if err != nil {
		return 0, readError(off, err)
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

// Read64 reads a register of BAR0.
func (d *Device) Read64(off uint32) (uint64, error) {
	var b [8]byte
	err := d.client.RegionRead(context.Background(), vfiouser.RegionBAR0, uint64(off), b[:])
	if err != nil {
		return 0, readError(off, err)
	}
	return binary.LittleEndian.Uint64(b[:]), nil
}

func readError(off uint32, err error) error {
	return fmt.Errorf("reading %s: %w", nvme.RegisterName(off), wrap(err))
}

// Write32 writes a register of BAR0 and waits until it is done.
func (d *Device) Write32(off uint32, v uint32) error {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	return d.write(off, b[:])
}

// Write64 writes a register of BAR0 and waits until it is done.
func (d *Device) Write64(off uint32, v uint64) error {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	return d.write(off, b[:])
}

func (d *Device) write(off uint32, b []byte) error {
	if err := d.client.RegionWrite(context.Background(), vfiouser.RegionBAR0, uint64(off), b); err != nil {
		return fmt.Errorf("writing %s: %w", nvme.RegisterName(off), wrap(err))
	}
	return nil
}

// RegisterSpace returns the size of BAR0 in bytes.
func (d *Device) RegisterSpace() uint64 { return d.bar0 }

// Doorbell returns the doorbell at off. To ring it is a posted message, or a store where the page is mapped.
func (d *Device) Doorbell(off uint32) device.Doorbell {
	if d.page != nil {
		if w, err := d.page.Word32(uint64(off - nvme.DoorbellBase)); off >= nvme.DoorbellBase && err == nil {
			return device.Doorbell{Mapped: w, Ring: func(v uint32) error {
				w.Store(v)
				return nil
			}}
		}
	}
	var b [4]byte // one caller at a time: the queue that owns the doorbell
	return device.Doorbell{Ring: func(v uint32) error {
		binary.LittleEndian.PutUint32(b[:], v)
		return wrap(d.client.RegionWritePosted(context.Background(), vfiouser.RegionBAR0, uint64(off), b[:]))
	}}
}

// AllocDMA returns memory in a sealed memfd that the server has been told of.
func (d *Device) AllocDMA(size uint64) (*device.DMARegion, error) {
	mem, err := shm.NewMemfd("guestdrv-dma", size)
	if err != nil {
		return nil, err
	}
	iova := d.nextIOVA.Add(mem.Len()) - mem.Len()
	err = d.client.DMAMap(context.Background(), iova, mem.Len(), 0, mem.FD(), vfiouser.DMARead|vfiouser.DMAWrite)
	if err != nil {
		mem.Close()
		return nil, fmt.Errorf("%d bytes of DMA memory: %w", mem.Len(), wrap(err))
	}
	return device.NewDMARegion(mem, iova, func() error {
		var err error
		select {
		case <-d.client.Done(): // the server drops its mappings with the connection
		default:
			err = d.client.DMAUnmap(context.Background(), iova, mem.Len())
		}
		return errors.Join(err, mem.Close())
	}), nil
}

// MaxInterrupts returns the number of MSI-X vectors.
func (d *Device) MaxInterrupts() int { return d.vectors }

// Interrupts makes n eventfds and hands them to the server.
func (d *Device) Interrupts(n int) ([]int, error) {
	return device.EventFDs(n, d.vectors, func(fds []int) error {
		const flags = vfiouser.IRQSetDataEventFD | vfiouser.IRQSetTrigger
		return wrap(d.client.SetIRQs(context.Background(), vfiouser.IRQMSIX, 0, flags, fds))
	})
}

// Reset asks the server for a function reset, and then lets the function reach memory again: the configuration space was reset too.
func (d *Device) Reset() error {
	err := d.client.Reset(context.Background())
	if err == nil {
		err = d.configSpace(context.Background())
	}
	return wrap(err)
}

// Done is closed when the connection has ended.
func (d *Device) Done() <-chan struct{} { return d.client.Done() }

// Err returns why Done is closed.
func (d *Device) Err() error { return wrap(d.client.Err()) }

// Isolated says that the device can reach no memory but what AllocDMA gave: an address of anything else is an error, and harms nobody.
func (d *Device) Isolated() bool { return true }

// Notice says why the doorbells of a server that offers to have them mapped are messages all the same.
func (d *Device) Notice() string {
	if d.Unmapped == "" {
		return ""
	}
	return "doorbells are not mapped: " + d.Unmapped
}

// Files returns the socket.
func (d *Device) Files() device.Files {
	return device.Files{VFIODevice: -1, Sockets: []int{d.client.FD()}}
}

// PeerPID returns the server's process id.
func (d *Device) PeerPID() int { return int(d.client.PeerCred().Pid) }

// Close ends the connection.
func (d *Device) Close() error { return d.client.Close() }

// Unmap takes the doorbell page away.
func (d *Device) Unmap() error {
	if d.page == nil {
		return nil
	}
	return d.page.Close()
}

// Scheme is what names of devices of this kind begin with.
const Scheme = "vfio-user:"

// IsName reports whether name is a device of this kind, and returns the part after Scheme.
func IsName(name string) (string, bool) { return strings.CutPrefix(name, Scheme) }
