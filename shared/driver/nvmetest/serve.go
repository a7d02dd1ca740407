package nvmetest

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// Server serves a Device on a socket, one client at a time.
type Server struct {
	d      *Device
	ln     *net.UnixListener
	wg     sync.WaitGroup
	mu     sync.Mutex
	conn   *net.UnixConn
	closed bool

	message func(cmd vfiouser.Command) bool
}

// Serve listens on the socket at path. message, if it is not nil, sees each message; false ends the connection.
func (d *Device) Serve(path string, message func(cmd vfiouser.Command) bool) (*Server, error) {
	d.mu.Lock()
	if d.cfg.Mapped && d.page == nil {
		if err := d.mapDoorbells(); err != nil {
			d.mu.Unlock()
			return nil, err
		}
	}
	d.mu.Unlock()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	s := &Server{d: d, ln: ln, message: message}
	s.wg.Add(1)
	go s.accept()
	return s, nil
}

// mapDoorbells puts BAR0's doorbell page into a file, at the offset that it has in BAR0.
func (d *Device) mapDoorbells() (err error) {
	const size = 0x2000
	if d.cfg.Unsealed {
		var fd int
		if fd, err = unix.MemfdCreate("bar0", unix.MFD_CLOEXEC); err != nil {
			return err
		}
		d.barFD = fd
		if err = unix.Ftruncate(fd, size); err != nil {
			return err
		}
		d.bar, err = shm.Map(fd, 0, size, true)
	} else if d.bar, err = shm.NewMemfd("bar0", size); err == nil {
		d.barFD, err = unix.FcntlInt(uintptr(d.bar.FD()), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err == nil {
		d.page, err = d.bar.View(0x1000, 0x1000)
	}
	return err
}

func (s *Server) accept() {
	defer s.wg.Done()
	for {
		conn, err := s.ln.AcceptUnix()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conn = conn
		closed := s.closed
		s.mu.Unlock()
		if !closed {
			s.session(conn)
		}
		conn.Close()
	}
}

// Hangup ends the connection under way.
func (s *Server) Hangup() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.Close()
	}
}

// Close ends the server, not the Device.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	if s.conn != nil {
		s.conn.Close()
	}
	s.mu.Unlock()
	s.ln.Close()
	s.wg.Wait()
}

// session serves one client until it goes.
func (s *Server) session(conn *net.UnixConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	disp := vfiouser.NewDispatcher(&function{d: s.d}, vfiouser.DefaultCapabilities())
	var recv *vfiouser.Receiver
	_ = raw.Control(func(fd uintptr) { recv = vfiouser.NewReceiver(int(fd), 0) })
	if recv == nil {
		return
	}
	defer recv.Close()
	_ = raw.Read(func(fd uintptr) bool {
		for {
			eof, err := recv.Fill()
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if eof || err != nil || !s.handle(int(fd), recv, disp) {
				return true
			}
		}
	})
	s.d.disconnect()
}

func (s *Server) handle(fd int, recv *vfiouser.Receiver, disp *vfiouser.Dispatcher) bool {
	for {
		m, ok, err := recv.Next()
		if err != nil || !ok {
			return err == nil
		}
		if s.message != nil && !s.message(m.Cmd) {
			for _, f := range m.FDs {
				unix.Close(f)
			}
			return false
		}
		reply, send, err := disp.Handle(m)
		if err != nil {
			return false
		}
		if send && vfiouser.SendMessage(fd, reply.Header, reply.Payload, reply.FDs) != nil {
			return false
		}
	}
}

// disconnect forgets the driver.
func (d *Device) disconnect() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cc = 0
	d.reset()
	d.dropVectors()
	for _, m := range d.mem {
		m.reg.Close()
	}
	d.mem = nil
}

// function is the Device as a PCI function.
type function struct {
	d      *Device
	config [256]byte
}

func (f *function) Info() vfiouser.DeviceInfo {
	return vfiouser.DeviceInfo{Flags: vfiouser.DeviceReset | vfiouser.DevicePCI, NumRegions: vfiouser.NumRegions, NumIRQs: vfiouser.NumIRQs}
}

func (f *function) RegionInfo(i uint32) (vfiouser.RegionInfo, bool) {
	const rw = vfiouser.RegionRead | vfiouser.RegionWrite
	switch i {
	case vfiouser.RegionConfig:
		return vfiouser.RegionInfo{Index: i, Flags: rw, Size: uint64(len(f.config)), FD: -1}, true
	case vfiouser.RegionBAR0:
		r := vfiouser.RegionInfo{Index: i, Flags: rw, Size: barSize, FD: -1}
		if f.d.bar != nil {
			r.Flags |= vfiouser.RegionMmap
			r.Areas = []vfiouser.MmapArea{{Offset: 0x1000, Size: 0x1000}}
			r.FD = f.d.barFD
		}
		return r, true
	}
	return vfiouser.RegionInfo{}, false
}

func (f *function) IRQInfo(i uint32) (vfiouser.IRQInfo, bool) {
	if i != vfiouser.IRQMSIX {
		return vfiouser.IRQInfo{}, false
	}
	return vfiouser.IRQInfo{Index: i, Flags: vfiouser.IRQEventFD, Count: uint32(len(f.d.vectors))}, true
}

func (f *function) SetIRQs(s vfiouser.SetIRQs, fds []int) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.ownFDs = true
	if s.DisableAll() {
		f.d.dropVectors()
		return nil
	}
	for i, fd := range fds {
		f.d.vectors[int(s.Start)+i] = fd
	}
	return nil
}

func (f *function) DMAMap(m vfiouser.DMAMap, fd int) error {
	if fd < 0 {
		return unix.EINVAL
	}
	reg, err := shm.Map(fd, int64(m.Offset), m.Size, true)
	unix.Close(fd)
	if err != nil {
		return err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.mem = append(f.d.mem, mapping{m.IOVA, reg})
	return nil
}

func (f *function) DMAUnmap(iova, size uint64, flags uint32) error { return nil }

func (f *function) RegionRead(i uint32, off uint64, p []byte) error {
	if i == vfiouser.RegionConfig {
		binary.LittleEndian.PutUint32(f.config[8:], 0x010802<<8)
		copy(p, f.config[off:])
		return nil
	}
	switch v := f.d.read(uint32(off), len(p)); len(p) {
	case 4:
		binary.LittleEndian.PutUint32(p, uint32(v))
	case 8:
		binary.LittleEndian.PutUint64(p, v)
	default:
		return unix.EINVAL
	}
	return nil
}

func (f *function) RegionWrite(i uint32, off uint64, p []byte) error {
	if i == vfiouser.RegionConfig {
		copy(f.config[off:], p)
		return nil
	}
	switch len(p) {
	case 4:
		f.d.write(uint32(off), uint64(binary.LittleEndian.Uint32(p)))
	case 8:
		f.d.write(uint32(off), binary.LittleEndian.Uint64(p))
	default:
		return unix.EINVAL
	}
	return nil
}

func (f *function) Reset() error { return f.d.resetFunction() }

// TempSocket returns a path for a socket in a new directory, short enough for one, and what removes it.
func TempSocket() (path string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "nvmetest")
	if err != nil {
		return "", nil, err
	}
	return dir + "/s", func() { os.RemoveAll(dir) }, nil
}
