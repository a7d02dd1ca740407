package hostmed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

var errShutdown = errors.New("hostmed is shutting down")

// maxFaults is how many queue failures of one client wait for the session at the most; more of them say nothing new.
const maxFaults = 16

// session is one client: its connection, its memory and its controller.
//
// The socket is in the epoll set of the home worker, which takes doorbell writes out of the stream itself, so
// that a doorbell wakes the thread that does the work (Ready). Every other message it
// hands to the session's goroutine (run), and reads on when that one is answered: messages keep their order.
// The goroutine owns the controller.
type session struct {
	p    *port
	log  hclog.Logger
	fd   int // -1 at the end, which is written under mu, and always for a client in this process (attach.go)
	home *ioq.Worker

	mem  *gmem.Memory
	data *ioq.Controller
	ctl  *ctrl.Controller
	cfg  *pci.ConfigSpace
	msix *pci.MSIX
	disp *vfiouser.Dispatcher // nil: the client is in this process

	// The PCI function's state, the goroutine's (interrupts.go):
	master     bool // bus mastering is on
	masterLost bool // and was, when not
	held       bool // the controller is held
	unmaskFD   int  // -1: none

	advised uint32       // causes that were told, the goroutine's (advice.go)
	retired []gmem.Range // unmapped, but a medium still moves data there; the goroutine's

	errors     []inspect.QueueError // of queues; the goroutine's
	inspecting chan struct{}        // has room while no snapshot is being taken

	// The home worker's:
	recv *vfiouser.Receiver
	busy bool // a message is with the goroutine
	open bool // VERSION is done
	buf  [vfiouser.RegionAccessSize]byte

	// From workers to the goroutine:
	signal  chan struct{} // capacity 1
	kicked  atomic.Bool   // queue 0's doorbell has moved
	stalled atomic.Bool   // busy, for those who only look
	unmask  atomic.Bool   // the client has unmasked INTx by its eventfd
	ended   atomic.Bool   // media have ended what a reset or an unmap did not wait for
	overdue atomic.Uint64 // overdueBit and what PinOverdue is to be called with; 0: it is not
	asleep  atomic.Bool   // in D3hot; the goroutine's, which the home worker reads
	mu      sync.Mutex    // guards the rest; nothing is called with it held
	msg     vfiouser.Message
	have    bool
	faults  []ioq.QueueError
	calls   []call
	closed  bool  // calls are not taken any more
	over    error // why the session ends; nil: it does not

	done chan struct{}
}

// newSession starts the session of the client behind the connection fd, or, if that is -1, of one in this process.
func (p *port) newSession(fd int) (_ *session, err error) {
	s := &session{
		p: p, log: p.log, fd: fd, home: p.home, mem: gmem.New(),
		signal: make(chan struct{}, 1), done: make(chan struct{}), unmaskFD: -1, inspecting: make(chan struct{}, 1),
	}
	defer func() {
		if err != nil && fd >= 0 {
			unix.Close(fd)
		}
	}()
	vectors, sub, ns := p.cfg.Queues+1, p.self.Subsystem(), namespaces(p.self)
	if s.cfg, err = pci.New(pci.Params{Vectors: vectors, BAR0Size: pci.BAR0Size(p.cfg.Queues, p.cfg.DSTRD)}); err != nil {
		return nil, err
	}
	s.msix = pci.NewMSIX(s.cfg)
	s.msix.Pending = func(v int) bool { return s.data.Pending(v) }
	s.msix.Mask = func(v int, on bool) { s.data.MaskVectors(v, 1, ioq.MaskTable, on) }
	s.data, err = ioq.NewController(ioq.Config{
		Workers: p.m.workers, Home: p.home, Memory: s.mem, Namespaces: ns, Self: p.self, Mode: p.cfg.Doorbells, DSTRD: p.cfg.DSTRD,
		MaxQueues: p.cfg.Queues, Vectors: vectors, MDTSBytes: uint32(p.cfg.MDTS), Trace: p.trace,
		PageSize: func() uint32 { return s.ctl.PageSize() },
		OnAdmin:  s.kickAdmin,
		OnError:  s.fault,

		OnPin: s.pinLater,

		OnStopped: s.mediaEnded, OnReleased: s.mediaEnded,

		HeapDoorbells: fd < 0,

		InterruptMask: func() uint32 { return s.ctl.InterruptMask() },
	})
	if err != nil {
		return nil, err
	}
	s.mem.Opened, s.mem.Closing = s.data.MemoryAdded, s.data.MemoryRemoved
	s.ctl = ctrl.New(ctrl.Config{
		CNTLID: p.self.ID, SubNQN: sub.NQN(), Serial: sub.Serial(), Model: sub.Model(), Firmware: "1.0", Self: p.self,
		Namespaces: ns, MaxIOQueues: p.cfg.Queues, MaxDepth: p.cfg.Depth, MDTSBytes: uint32(p.cfg.MDTS), Vectors: vectors,
		Mode: p.cfg.Doorbells, DSTRD: p.cfg.DSTRD, VID: nvme.PCIVendorGoogle, SSVID: nvme.PCIVendorGoogle, Logger: p.log, Stats: s.stats, IOErrors: s.data.TakeIOErrors,
		Wake: s.kickAdmin, Persistent: p.kept, Dump: s.data.String,
	}, s.data, guestMemory{s.mem, s})
	if fd >= 0 {
		if err = s.receive(); err != nil {
			err = errors.Join(err, s.data.Close())
			s.ctl.Close()
			return nil, err
		}
	}
	s.log.Info("client connected")
	p.self.Connect(member{s})
	s.do(call{run: s.updateNamespaces}) // they may have changed before Connect
	go s.run()
	return s, nil
}

// receive makes the home worker read the client's messages.
func (s *session) receive() (err error) {
	s.recv = vfiouser.NewReceiver(s.fd, vfiouser.MaxMsg)
	s.disp = vfiouser.NewDispatcher(&device{s}, vfiouser.Capabilities{MaxDMAMaps: gmem.MaxMaps})
	s.disp.OnError = func(h vfiouser.Header, err error) {
		s.log.Debug("message refused", "message", h.String(), "error", err)
	}
	s.home.Call(func() { err = s.home.Add(s.fd, s) })
	return err
}

// Ready reads what has come. It runs on the home worker's thread.
func (s *session) Ready(uint32) {
	// One recvmsg for each turn: what rang has its commands fetched before the socket is looked at again, and a client
	// that floods it has its next turn after the queues had theirs.
	if s.busy || !s.take() {
		return
	}
	eof, err := s.recv.Fill()
	switch {
	case err == unix.EAGAIN:
	case eof && err == nil:
		s.hangUp(io.EOF)
	case err != nil:
		s.hangUp(err)
	default:
		s.take()
	}
}

// take handles the messages that are in the buffer; false if reading must not go on now.
func (s *session) take() bool {
	for {
		m, ok, err := s.recv.Next()
		if err != nil {
			s.hangUp(err)
			return false
		}
		if !ok {
			return true
		}
		if s.open && m.Cmd == vfiouser.CmdRegionWrite && m.IsCommand() && len(m.FDs) == 0 {
			if done, err := s.doorbell(&m); err != nil {
				s.hangUp(err)
				return false
			} else if done {
				continue
			}
		}
		s.busy = true
		s.stalled.Store(true)
		s.home.Modify(s.fd, false)
		s.mu.Lock()
		s.msg, s.have = m, true
		s.mu.Unlock()
		s.wake()
		return false
	}
}

// doorbell takes a write to a doorbell register; done is false if it is none.
func (s *session) doorbell(m *vfiouser.Message) (done bool, err error) {
	off, region, count, data, ok := vfiouser.ParseRegionAccess(m.Payload)
	if !ok || region != vfiouser.RegionBAR0 || off < nvme.DoorbellBase || count != 4 || len(data) != 4 {
		return false, nil
	}
	if !s.asleep.Load() {
		s.data.Doorbell(s.home, off-nvme.DoorbellBase, binary.LittleEndian.Uint32(data))
	}
	if m.Flags&vfiouser.FlagNoReply != 0 {
		return true, nil
	}
	// A client that does not read its replies is not waited for on this thread.
	h := vfiouser.Header{ID: m.ID, Cmd: m.Cmd, Flags: vfiouser.FlagReply}
	copy(s.buf[:], m.Payload)
	return true, vfiouser.SendMessageTimeout(s.fd, h, s.buf[:], nil, 0)
}

// hangUp ends the reading; the goroutine does the rest.
func (s *session) hangUp(err error) {
	s.busy = true
	s.home.Remove(s.fd)
	s.end(err)
}

// end makes the goroutine tear the session down.
func (s *session) end(why error) {
	s.mu.Lock()
	if s.over == nil {
		s.over = why
	}
	s.mu.Unlock()
	s.wake()
}

func (s *session) hungUp() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over != nil
}

// gone reports whether the client has closed its end, which the home worker may not have come to read yet.
func (s *session) gone() (gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disp == nil {
		return false // its Close says so by itself
	}
	if s.fd < 0 {
		return true
	}
	p := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	for err == unix.EINTR { // the runtime's preemption; "not gone" would turn away who comes next
		n, err = unix.Poll(p, 0)
	}
	return err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}

// kickAdmin makes the goroutine look at the admin queue. Any goroutine may call it.
func (s *session) kickAdmin() {
	s.kicked.Store(true)
	s.wake()
}

func (s *session) wake() {
	select {
	case s.signal <- struct{}{}:
	default:
	}
}

// fault takes note of a failed queue. It is called on a worker's thread.
func (s *session) fault(e ioq.QueueError) {
	e.At = inspect.Now()
	s.mu.Lock()
	if len(s.faults) < maxFaults {
		s.faults = append(s.faults, e)
	}
	s.mu.Unlock()
	s.wake()
}

// run is the session's goroutine.
func (s *session) run() {
	defer close(s.done)
	for range s.signal {
		// The admin queue and its pages are guest memory too: a fault there is the end of the session (R36).
		if err := shm.Guard(s.turn); err != nil {
			s.end(fmt.Errorf("controller failed: %w", err))
		}
		if s.hungUp() {
			break
		}
	}
	s.tearDown()
}

// turn does what there is to do.
func (s *session) turn() {
	s.mu.Lock()
	m, have := s.msg, s.have
	faults := s.faults
	s.msg, s.have, s.faults = vfiouser.Message{}, false, nil
	s.mu.Unlock()
	for _, f := range faults {
		s.queueFailed(f)
	}
	s.runCalls()
	if s.kicked.Swap(false) && s.ctl.AdminKick() {
		s.kicked.Store(true) // more than one turn's worth
		s.wake()
	}
	if s.ended.Swap(false) {
		s.ctl.Settle(0)
		s.release()
	}
	if s.unmask.Swap(false) {
		(&device{s}).checkPin(true)
	}
	if rung := s.overdue.Swap(0); rung != 0 {
		s.data.PinOverdue(s.ctl.AdminUnconsumed(), uint32(rung))
	}
	if have {
		s.handle(m)
	}
}

// mediaEnded is called on a worker's thread.
func (s *session) mediaEnded() {
	s.ended.Store(true)
	s.wake()
}

// release unmaps what the client has unmapped before, once no medium moves data there any more.
func (s *session) release() {
	if len(s.retired) == 0 || !s.data.Released() {
		return
	}
	if err := s.mem.Release(s.retired); err != nil {
		s.log.Error("unmapping the client's memory", "error", err)
	}
	s.retired = nil
}

func (s *session) queueFailed(f ioq.QueueError) {
	s.failed(f)
	s.log.Debug("queue failed", "queue", f.QID, "kind", f.Kind.String(), "error", f.Err)
	switch f.Kind {
	case ioq.BadSQTail, ioq.BadCQHead:
		s.ctl.QueueError(f.QID, ctrl.BadDoorbellValue)
	case ioq.NoQueue:
		s.ctl.QueueError(f.QID, ctrl.BadDoorbellRegister)
	case ioq.MemoryFault:
		s.end(f.Err)
	}
}

// handle answers one message and lets the worker read on.
func (s *session) handle(m vfiouser.Message) {
	if m.Cmd != vfiouser.CmdRegionRead { // a driver may look at CSTS for ever
		s.p.m.controlled()
	}
	reply, send, err := s.disp.Handle(m)
	if err == nil && send {
		err = vfiouser.SendMessage(s.fd, reply.Header, reply.Payload, reply.FDs)
	}
	if err != nil {
		s.end(err)
		return
	}
	open := s.disp.Negotiated()
	s.home.Post(func() {
		s.busy, s.open = false, open
		s.stalled.Store(false)
		s.home.Modify(s.fd, true)
		s.Ready(0)
	})
}

// tearDown gives back all that the client had. Its writes stay; what it did not flush is flushed
// when the mediator ends.
func (s *session) tearDown() {
	s.mu.Lock()
	why := s.over
	s.mu.Unlock()
	if s.log.IsDebug() {
		s.log.Debug("queues of a client that goes", "state", s.data.String())
	}
	s.p.self.Disconnect()
	s.dropCalls()
	did := s.data.Stats()
	(&device{s}).setUnmask(-1)
	if err := s.data.Close(); err != nil {
		s.log.Error("stopping the queues", "error", err)
	}
	s.ctl.Close()
	s.release()
	if err := errors.Join(s.disconnect(), s.mem.Close()); err != nil {
		s.log.Error("ending a session", "error", err)
	}
	if s.disp != nil && !s.disp.Negotiated() && errors.Is(why, vfiouser.ErrProtocol) {
		why = fmt.Errorf("%w (%w)", errVersion, why)
	}
	args := append([]any{"reason", why}, fields(did)...)
	switch {
	case errors.Is(why, io.EOF), errors.Is(why, errShutdown):
		s.log.Info("client disconnected", args...)
	default:
		s.log.Warn("client dropped", args...)
	}
}

// disconnect takes the connection from the home worker and closes it.
func (s *session) disconnect() error {
	if s.disp == nil {
		return nil
	}
	s.home.Call(func() {
		s.busy = true
		s.home.Remove(s.fd)
		s.recv.Close()
	})
	s.mu.Lock()
	fd := s.fd
	s.fd = -1
	s.mu.Unlock()
	for _, fd := range s.msg.FDs {
		unix.Close(fd)
	}
	return unix.Close(fd)
}

func (s *session) stats() ctrl.IOStats {
	d := s.data.Stats()
	return ctrl.IOStats{
		ReadBytes: d.BytesRead, WriteBytes: d.BytesWritten, ReadCommands: d.Reads, WriteCommands: d.Writes,
		MediaErrors: d.MediaErrors, Busy: d.Busy,
	}
}

// guestMemory gives the controller what is mapped at the moment.
type guestMemory struct {
	*gmem.Memory
	s *session
}

func (g guestMemory) View(iova, n uint64) (*shm.Region, error) {
	r, err := g.Table().View(iova, n)
	if err != nil {
		g.s.advise("the controller cannot use the client's memory", err)
	}
	return r, err
}

func (g guestMemory) ReadIOVA(iova uint64, p []byte) bool  { return g.Table().ReadIOVA(iova, p) }
func (g guestMemory) WriteIOVA(iova uint64, p []byte) bool { return g.Table().WriteIOVA(iova, p) }
