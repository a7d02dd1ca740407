package vfiouser

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

// function is a PCI function with registers that are plain memory.
type function struct {
	class    uint32
	info     vfiouser.DeviceInfo
	bar0     vfiouser.RegionInfo
	vectors  uint32
	config   [256]byte
	regs     [0x2000]byte
	irqs     []int
	maps     []*shm.Region
	mapError error
	resets   int
}

func newFunction() *function {
	const rw = vfiouser.RegionRead | vfiouser.RegionWrite
	return &function{
		class: 0x010802, vectors: 4,
		info: vfiouser.DeviceInfo{Flags: vfiouser.DevicePCI | vfiouser.DeviceReset, NumRegions: 9, NumIRQs: 5},
		bar0: vfiouser.RegionInfo{Flags: rw, Size: 0x2000, FD: -1},
	}
}

func (f *function) Info() vfiouser.DeviceInfo { return f.info }

func (f *function) RegionInfo(i uint32) (vfiouser.RegionInfo, bool) {
	switch i {
	case vfiouser.RegionBAR0:
		return f.bar0, true
	case vfiouser.RegionConfig:
		return vfiouser.RegionInfo{Flags: vfiouser.RegionRead | vfiouser.RegionWrite, Size: 256, FD: -1}, true
	}
	return vfiouser.RegionInfo{}, false
}

func (f *function) IRQInfo(i uint32) (vfiouser.IRQInfo, bool) {
	return vfiouser.IRQInfo{Flags: vfiouser.IRQEventFD, Count: f.vectors}, i == vfiouser.IRQMSIX
}

func (f *function) SetIRQs(s vfiouser.SetIRQs, fds []int) error {
	f.irqs = append(f.irqs, fds...)
	return nil
}

func (f *function) DMAMap(m vfiouser.DMAMap, fd int) error {
	defer unix.Close(fd)
	if f.mapError != nil {
		return f.mapError
	}
	if shm.CanShrink(fd) {
		return errors.New("DMA memory that its owner can take away")
	}
	r, err := shm.Map(fd, int64(m.Offset), m.Size, true)
	f.maps = append(f.maps, r)
	return err
}

func (f *function) DMAUnmap(iova, size uint64, flags uint32) error { return nil }

func (f *function) RegionRead(i uint32, off uint64, p []byte) error {
	if i == vfiouser.RegionConfig {
		binary.LittleEndian.PutUint32(f.config[8:], f.class<<8)
		copy(p, f.config[off:])
		return nil
	}
	copy(p, f.regs[off:])
	return nil
}

func (f *function) RegionWrite(i uint32, off uint64, p []byte) error {
	if i == vfiouser.RegionConfig {
		copy(f.config[off:], p)
		return nil
	}
	copy(f.regs[off:], p)
	return nil
}

// Reset is one of the configuration space too: what the client has to set again is checked at the end.
func (f *function) Reset() error {
	f.resets++
	clear(f.config[:])
	return nil
}

func (f *function) close() {
	for _, fd := range f.irqs {
		unix.Close(fd)
	}
	for _, r := range f.maps {
		r.Close()
	}
	closeFD(f.bar0.FD)
}

// serve answers one client with f and returns the socket. wait returns when the client is gone.
func serve(t *testing.T, f *function) (path string, wait func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vu")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "cntrl")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		disp := vfiouser.NewDispatcher(f, vfiouser.DefaultCapabilities())
		var recv *vfiouser.Receiver
		_ = raw.Control(func(fd uintptr) { recv = vfiouser.NewReceiver(int(fd), 0) })
		defer recv.Close()
		_ = raw.Read(func(fd uintptr) bool { return pump(int(fd), recv, disp) })
	}()
	t.Cleanup(func() {
		ln.Close()
		<-done
		f.close()
		os.RemoveAll(dir)
	})
	return path, func() { <-done }
}

// pump answers what has come; true when the client is gone.
func pump(fd int, recv *vfiouser.Receiver, disp *vfiouser.Dispatcher) bool {
	for {
		eof, err := recv.Fill()
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if eof || err != nil {
			return true
		}
		for {
			m, ok, err := recv.Next()
			if err != nil {
				return true
			}
			if !ok {
				break
			}
			reply, send, err := disp.Handle(m)
			if err != nil || send && vfiouser.SendMessage(fd, reply.Header, reply.Payload, reply.FDs) != nil {
				return true
			}
		}
	}
}

func TestRegistersMemoryInterrupts(t *testing.T) {
	f := newFunction()
	path, wait := serve(t, f)
	d, err := Open(ctx, Path(filepath.Dir(path)))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write64(nvme.RegASQ, 0x1122334455667788); err != nil {
		t.Fatal(err)
	}
	if v, err := d.Read64(nvme.RegASQ); v != 0x1122334455667788 || err != nil {
		t.Errorf("%#x, %v", v, err)
	}
	if err := d.Write32(nvme.RegCC, 7); err != nil {
		t.Fatal(err)
	}
	if v, err := d.Read32(nvme.RegCC); v != 7 || err != nil {
		t.Errorf("%#x, %v", v, err)
	}
	if _, err := d.Read32(0x2000); err == nil || !strings.Contains(err.Error(), "reg+0x2000") {
		t.Errorf("a register outside BAR0: %v", err)
	}
	bell := d.Doorbell(0x1008)
	if bell.Mapped != nil {
		t.Error("a doorbell that is mapped, of a device that offers none")
	}
	if err := bell.Ring(99); err != nil {
		t.Fatal(err)
	}
	if v, err := d.Read32(0x1008); v != 99 || err != nil { // in order, though posted
		t.Errorf("doorbell %d, %v", v, err)
	}
	a, err := d.AllocDMA(8000)
	if err != nil {
		t.Fatal(err)
	}
	b, err := d.AllocDMA(4096)
	if err != nil {
		t.Fatal(err)
	}
	if a.Len() != 8192 || a.IOVA != dmaBase || b.IOVA != dmaBase+8192 {
		t.Errorf("%d bytes at %#x, then %#x", a.Len(), a.IOVA, b.IOVA)
	}
	if err := a.Write(5, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if d.MaxInterrupts() != 4 || d.RegisterSpace() != 0x2000 || d.PeerPID() != os.Getpid() {
		t.Error(d.MaxInterrupts(), d.RegisterSpace(), d.PeerPID())
	}
	if _, err := d.Interrupts(5); err == nil {
		t.Error("more vectors than there are")
	}
	fds, err := d.Interrupts(4)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*device.DMARegion{a, b} {
		if err := r.Free(); err != nil {
			t.Error(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(d.Close(), d.Unmap(), d.Unmap()); err != nil {
		t.Error(err)
	}
	wait()
	if f.resets != 1 || len(f.irqs) != 4 {
		t.Errorf("%d resets, %d vectors", f.resets, len(f.irqs))
	}
	if cmd := binary.LittleEndian.Uint16(f.config[4:]); cmd != 0x406 {
		t.Errorf("PCI command register %#x", cmd)
	}
	var hello [5]byte
	if err := f.maps[0].Read(5, hello[:]); err != nil || string(hello[:]) != "hello" {
		t.Errorf("%q, %v", hello, err)
	}
	// The vectors are the same objects on both sides.
	one := [8]byte{1}
	for i, fd := range f.irqs {
		if _, err := unix.Write(fd, one[:]); err != nil {
			t.Fatal(err)
		}
		var got [8]byte
		if n, err := unix.Read(fds[i], got[:]); n != 8 || err != nil || got != one {
			t.Errorf("vector %d: %d, %v", i, n, err)
		}
		unix.Close(fds[i])
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*function)
		says   string
	}{
		"other class":    {func(f *function) { f.class = 0x020000 }, "PCI class 020000"},
		"no PCI":         {func(f *function) { f.info.Flags = 0 }, "not a PCI device"},
		"few regions":    {func(f *function) { f.info.NumRegions = 1 }, "not a PCI device"},
		"short BAR0":     {func(f *function) { f.bar0.Size = 0x1000 }, "BAR0 of 0x1000 bytes"},
		"endless BAR0":   {func(f *function) { f.bar0.Size = 1 << 62 }, "BAR0"},
		"read-only BAR0": {func(f *function) { f.bar0.Flags = vfiouser.RegionRead }, "BAR0"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFunction()
			tc.change(f)
			path, _ := serve(t, f)
			d, err := Open(ctx, path)
			if err == nil {
				d.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// doorbellFile returns a file whose second page is the doorbell page.
func doorbellFile(t *testing.T, size int64, seal bool) int {
	t.Helper()
	fd, err := unix.MemfdCreate("bar0", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	if seal {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func TestMappedDoorbells(t *testing.T) {
	area := []vfiouser.MmapArea{{Offset: 0x1000, Size: 0x1000}}
	for name, tc := range map[string]struct {
		size  int64
		seal  bool
		off   uint64
		areas []vfiouser.MmapArea
		says  string // why not; "": mapped
		plain bool   // not offered
	}{
		"area":               {size: 0x2000, seal: true, areas: area},
		"whole region":       {size: 0x2000, seal: true},
		"unsealed":           {size: 0x2000, areas: area, says: "F_SEAL_SHRINK"},
		"file too short":     {size: 0x1000, seal: true, areas: area, says: "outside"},
		"offset of 2^64":     {size: 0x2000, seal: true, off: ^uint64(0xFFF), areas: area, says: "offset"},
		"offset of 2^63":     {size: 0x2000, seal: true, off: 1 << 63, areas: area, says: "offset"},
		"area of other page": {size: 0x2000, seal: true, areas: []vfiouser.MmapArea{{Offset: 0, Size: 0x1000}}, plain: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFunction()
			f.bar0.Flags |= vfiouser.RegionMmap
			f.bar0.Areas, f.bar0.Offset, f.bar0.FD = tc.areas, tc.off, doorbellFile(t, tc.size, tc.seal)
			path, wait := serve(t, f)
			d, err := Open(ctx, path)
			if err != nil {
				t.Fatal(err)
			}
			bell := d.Doorbell(0x1004)
			if mapped := tc.says == "" && !tc.plain; (bell.Mapped != nil) != mapped || !strings.Contains(d.Unmapped, tc.says) {
				t.Errorf("mapped: %v, %q", bell.Mapped != nil, d.Unmapped)
			}
			if err := bell.Ring(5); err != nil {
				t.Error(err)
			}
			if bell.Mapped != nil {
				var b [4]byte
				if _, err := unix.Pread(f.bar0.FD, b[:], 0x1004); err != nil || b[0] != 5 {
					t.Errorf("% x, %v", b, err)
				}
			}
			d.Close()
			if bell.Mapped != nil {
				bell.Mapped.Store(6) // mapped until Unmap
			}
			if err := d.Unmap(); err != nil {
				t.Error(err)
			}
			wait()
		})
	}
}

func TestRefusedMemory(t *testing.T) {
	f := newFunction()
	f.mapError = unix.ENOMEM
	path, _ := serve(t, f)
	d, err := Open(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.AllocDMA(4096); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("got %v", err)
	}
}

func TestServerThatIsNoServer(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if d, err := Open(short, filepath.Join(dir, "s")); err == nil {
		d.Close()
		t.Fatal("opened")
	} else if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestDeathOfTheServer(t *testing.T) {
	f := newFunction()
	dir := t.TempDir()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	hangup := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		raw, _ := conn.SyscallConn()
		disp := vfiouser.NewDispatcher(f, vfiouser.DefaultCapabilities())
		var recv *vfiouser.Receiver
		_ = raw.Control(func(fd uintptr) { recv = vfiouser.NewReceiver(int(fd), 0) })
		go func() { <-hangup; conn.Close() }()
		_ = raw.Read(func(fd uintptr) bool { return pump(int(fd), recv, disp) })
	}()
	d, err := Open(ctx, filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	close(hangup)
	<-d.Done()
	if err := d.Err(); !errors.Is(err, device.ErrGone) {
		t.Errorf("Err: %v", err)
	}
	if _, err := d.Read32(0); !errors.Is(err, device.ErrGone) {
		t.Errorf("read: %v", err)
	}
	if err := d.Doorbell(0x1000).Ring(1); !errors.Is(err, device.ErrGone) {
		t.Errorf("ring: %v", err)
	}
	d.Close()
	<-ended
}
