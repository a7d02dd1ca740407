package hostmed

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/sock"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// port is a socket and the controller that a client finds behind it. It serves one client at
// a time: a vfio-user connection is a device.
type port struct {
	m        *Mediator
	log      hclog.Logger
	cfg      ControllerConfig
	self     *subsys.Controller
	kept     *ctrl.Persistent
	path     string
	home     *ioq.Worker
	listener *net.UnixListener // nil: none, see Config.NoSockets
	inode    uint64
	trace    uint16 // in event records and snapshots; the registry's

	mu      sync.Mutex
	session *session // nil: no client
	closed  bool
}

// listen makes the port of controller c.
func (s *subsystem) listen(c ControllerConfig) (*port, error) {
	p := &port{
		m: s.m, log: s.m.log.With("socket", c.Socket), cfg: c, path: c.Socket, home: s.m.nextHome(),
	}
	var err error
	if p.kept, err = ctrl.OpenPersistent(s.m.state, stateKey(s.NQN(), c.ID), p.log); err != nil {
		return nil, err
	}
	if !s.m.cfg.NoSockets {
		if p.listener, err = sock.Listen(c.Socket, sock.Umask); err != nil {
			return nil, err
		}
		var st unix.Stat_t
		if unix.Stat(c.Socket, &st) == nil {
			p.inode = st.Ino
		}
	}
	p.self = s.AddController(c.ID)
	p.self.Manages = c.Management
	p.self.Limiter().Set(c.Limits, ioq.Now())
	s.m.registry.add(p)
	return p, nil
}

// stateKey is where a controller's counters and features are kept: they belong to its place in its subsystem.
func stateKey(nqn string, cntlid uint16) string {
	sum := sha256.Sum256([]byte(nqn))
	return fmt.Sprintf("controller-%x-%d", sum[:8], cntlid)
}

// accept serves clients one after the other until close.
func (p *port) accept() {
	p.log.Info("listening", "doorbells", p.cfg.Doorbells.String(), "namespaces", len(p.self.Namespaces()))
	var refused refusals
	for {
		conn, err := p.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors or memory: later it may work again.
			p.log.Error("accept", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if err := p.serve(conn); err != nil {
			if tell, dropped := refused.again(time.Now()); tell {
				p.log.Warn("client refused", "error", err, "not_told", dropped)
			}
		}
	}
}

var (
	errBusy    = errors.New("the controller has a client already: end that, or give each guest a socket of its own")
	errHanging = errors.New("commands of the client before have not ended on their medium, which may still write to its memory: connect again when they have, or mend the medium")
)

// leavingPatience is how long a client waits for the one before it to be gone.
const leavingPatience = 3 * time.Second

// free returns the port's last session, which has ended, or says that there is a client. A session that is on its way out is waited for, for a while: a
// medium that hangs keeps it.
func (p *port) free() (old *session, err error) {
	p.mu.Lock()
	old = p.session
	p.mu.Unlock()
	if old == nil {
		return nil, nil
	}
	if !old.hungUp() && !old.gone() {
		return nil, errBusy
	}
	timer := time.NewTimer(leavingPatience)
	defer timer.Stop()
	select {
	case <-old.done:
		return old, nil
	case <-timer.C:
		return nil, errHanging
	}
}

// serve starts a session on conn.
func (p *port) serve(conn *net.UnixConn) error {
	old, err := p.free()
	if err != nil {
		go refuse(conn)
		return err
	}
	fd, err := takeFD(conn)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return unix.Close(fd)
	case p.session != old: // a client in this process came meanwhile
		return errors.Join(errBusy, unix.Close(fd))
	}
	s, err := p.newSession(fd)
	if err != nil {
		return err
	}
	p.session = s
	return nil
}

// takeFD moves the connection out of the Go runtime's poller: it goes to a worker's.
func takeFD(conn *net.UnixConn) (fd int, err error) {
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(f uintptr) { fd, err = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(cerr, err)
}

// refuseWithin is how long a client that is refused may take to go.
const refuseWithin = 5 * time.Second

// refuse answers a second client's VERSION with EBUSY, so that it can say why.
func refuse(conn *net.UnixConn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(refuseWithin))
	var h [vfiouser.HeaderSize]byte
	if _, err := io.ReadFull(conn, h[:]); err != nil {
		return
	}
	binary.LittleEndian.PutUint32(h[4:], vfiouser.HeaderSize)
	binary.LittleEndian.PutUint32(h[8:], vfiouser.FlagReply|vfiouser.FlagError)
	binary.LittleEndian.PutUint32(h[12:], uint32(unix.EBUSY))
	if _, err := conn.Write(h[:]); err == nil {
		// A connection that ends before QEMU has taken the answer makes it abort, and to close one with something unread is a reset.
		_, _ = io.Copy(io.Discard, io.LimitReader(conn, vfiouser.MaxMsg))
	}
}

// close ends the session, if there is one, and removes the socket.
func (p *port) close() error {
	p.m.registry.remove(p)
	var err error
	if p.listener != nil {
		err = p.listener.Close()
	}
	p.mu.Lock()
	p.closed = true
	s := p.session
	p.mu.Unlock()
	if s != nil {
		s.end(errShutdown)
		<-s.done
	}
	err = errors.Join(err, p.kept.Close())
	var st unix.Stat_t
	if p.listener != nil && unix.Stat(p.path, &st) == nil && st.Ino == p.inode {
		err = errors.Join(err, os.Remove(p.path))
	}
	return errors.Join(err, p.kept.Close())
}
