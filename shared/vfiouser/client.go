package vfiouser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How a call goes:
//
//  1. It takes a slot, and puts its message together in it.
//  2. The message is sent whole, one caller at a time.
//  3. The reader goroutine finds the slot by the reply's message ID, copies the reply in,
//     and wakes the caller.
//  4. The caller takes what it wants and gives the slot back. If it stopped waiting
//     before, the slot stays out of use until its late reply has come.
//
// The first error of the connection ends it: each caller gets that error, at once.

const (
	// DefaultTimeout is the limit of a call whose context has no deadline.
	DefaultTimeout = 5 * time.Second

	slotBits  = 6
	slotCount = 1<<slotBits - 1 // calls under way at one time
	postedID  = 1<<slotBits - 1 // the ID of commands that get no reply
)

var (
	// ErrClosed says that Close was called.
	ErrClosed = errors.New("vfio-user client is closed")
	// ErrPeerGone says that the server ended the connection.
	ErrPeerGone = errors.New("vfio-user server closed the connection")
)

// ClientConfig holds what a Client can be told; the zero value is good.
type ClientConfig struct {
	Timeout time.Duration // of a call whose context has no deadline; 0: DefaultTimeout
}

// Client is the driver's end of a connection. It is safe for concurrent use. Calls
// made by one goroutine are executed in their order, posted ones too.
//
// Every call ends by its context's deadline, or after the configured time if it has
// none, with an error that is os.ErrDeadlineExceeded; when the context is cancelled; or
// at once when the connection is lost. A command that the server refuses gives an error
// that wraps its unix.Errno, and leaves the connection as it was.
//
// After NewClient it makes no system calls but sendmsg, recvmsg, close and those of
// the Go runtime (epoll, futex, and reads and writes of its wake-up descriptor).
type Client struct {
	conn    *net.UnixConn
	raw     syscall.RawConn
	timeout time.Duration
	cred    unix.Ucred

	free  chan *slot
	slots [slotCount]slot

	// sending is the lock for tx and posted: a channel, so that waiting for it can be
	// given up.
	sending chan struct{}
	tx      outgoing
	posted  [smallCall]byte

	mu   sync.Mutex // guards what follows, and the slots' state
	err  error
	caps Capabilities

	done    chan struct{} // closed once err is set
	stopped chan struct{} // closed when the reader has ended
}

// Dial connects to the socket at path and negotiates the version.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	c, err := NewClient(conn.(*net.UnixConn), ClientConfig{})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if _, err := c.Negotiate(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// NewClient takes over conn, a stream socket, also if it fails, and starts the reader.
// Negotiate must be the first call.
func NewClient(conn *net.UnixConn, cfg ClientConfig) (*Client, error) {
	sys, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &Client{
		conn:    conn,
		raw:     sys,
		timeout: cfg.Timeout,
		free:    make(chan *slot, slotCount),
		sending: make(chan struct{}, 1),
		caps:    protocolCapabilities(),
		done:    make(chan struct{}),
		stopped: make(chan struct{}),
	}
	if c.timeout <= 0 {
		c.timeout = DefaultTimeout
	}
	if err := c.readCred(); err != nil {
		conn.Close()
		return nil, err
	}
	c.tx.conn = conn
	c.tx.try = c.tx.send
	for i := range c.slots {
		c.slots[i].init(i)
		c.free <- &c.slots[i]
	}
	go c.readLoop()
	return c, nil
}

func (c *Client) readCred() error {
	var err error
	ctlErr := c.raw.Control(func(fd uintptr) { c.cred, err = peerOf(int(fd)) })
	if err = errors.Join(ctlErr, err); err != nil {
		return fmt.Errorf("the socket's peer: %w", err)
	}
	return nil
}

// FD returns the socket, which stays the client's.
func (c *Client) FD() int {
	at := -1
	_ = c.raw.Control(func(fd uintptr) { at = int(fd) }) // fails only once the socket is closed
	return at
}

// PeerCred returns the server's process, user and group when it called listen. The process is numbered as in /proc, 0 if it is not there.
func (c *Client) PeerCred() unix.Ucred { return c.cred }

// Done is closed when the connection is lost or closed.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns why Done is closed, or nil: ErrClosed, ErrPeerGone, ErrProtocol or the
// socket's error.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Capabilities returns the server's limits; before Negotiate, the protocol's defaults.
func (c *Client) Capabilities() Capabilities {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.caps
}

// Close ends the connection, and all calls under way with ErrClosed. It may be called
// more than once.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	<-c.stopped
	return nil
}

// fail ends the connection; the first cause counts.
func (c *Client) fail(err error) {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = err
		close(c.done)
	}
	c.mu.Unlock()
	if first {
		_ = c.conn.Close()
	}
}

// slot is one call under way. Its fields below state are guarded by Client.mu while
// state is slotWaiting or slotLost, and otherwise belong to whoever holds the slot.
type slot struct {
	index uint16
	gen   uint16
	timer *time.Timer
	ready chan struct{} // cap 1: the reply is here

	state slotState
	cmd   Command
	reply Header
	data  []byte // the reply's payload: in in, or on the heap
	fds   []int

	// Two, since a server that lies can answer what is still being sent.
	out, in [smallCall]byte
}

// smallCall is the size in bytes of a message or a reply's payload that needs no
// allocation: any register access.
const smallCall = 64

// slotState: free -> waiting -> answered -> free, or waiting -> lost -> free.
type slotState uint8

const (
	slotFree slotState = iota
	slotWaiting
	slotAnswered
	slotLost // the caller is gone, the reply is still to come
)

func (s *slot) init(i int) {
	s.index = uint16(i)
	s.ready = make(chan struct{}, 1)
}

func (s *slot) id() uint16 { return s.gen<<slotBits | s.index }

// deadline returns when a call with this context must end.
func (c *Client) deadline(ctx context.Context) time.Time {
	if t, ok := ctx.Deadline(); ok {
		return t
	}
	return time.Now().Add(c.timeout)
}

// call sends a command and waits for its reply. On success the caller has the slot, with
// the reply in data and fds, and gives it back with release. What is sent is payload
// followed by more; neither is kept.
func (c *Client) call(ctx context.Context, cmd Command, payload, more []byte, fds []int) (*slot, error) {
	deadline := c.deadline(ctx)
	s, err := c.acquire(ctx, deadline)
	if err != nil {
		return nil, callError(cmd, err)
	}
	h := Header{ID: s.id(), Cmd: cmd, Size: uint32(HeaderSize + len(payload) + len(more))}
	msg := h.Append(s.out[:0])
	msg = append(append(msg, payload...), more...)

	c.mu.Lock()
	s.state, s.cmd, s.data, s.fds = slotWaiting, cmd, nil, nil
	c.mu.Unlock()
	if err := c.send(ctx, deadline, msg, fds); err != nil {
		if c.abandon(s, errors.Is(err, errNotSent)) {
			c.release(s)
		}
		return nil, callError(cmd, err)
	}
	if err := c.await(ctx, deadline, s); err != nil {
		return nil, callError(cmd, err)
	}
	if s.reply.Flags&FlagError != 0 {
		errno := unix.Errno(s.reply.Errno)
		c.release(s)
		if errno == 0 {
			errno = unix.EIO
		}
		return nil, callError(cmd, errno)
	}
	return s, nil
}

func callError(cmd Command, err error) error { return fmt.Errorf("%s: %w", cmd, err) }

// acquire takes a free slot.
func (c *Client) acquire(ctx context.Context, deadline time.Time) (*slot, error) {
	select {
	case <-c.done:
		return nil, c.Err()
	default:
	}
	if err := ctx.Err(); err != nil {
		return nil, expired(err)
	}
	select {
	case s := <-c.free:
		s.gen++
		return s, nil
	default:
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case s := <-c.free:
		s.gen++
		return s, nil
	case <-timer.C:
		return nil, fmt.Errorf("%d calls wait for an answer: %w", slotCount, timedOut(ctx))
	case <-ctx.Done():
		return nil, expired(ctx.Err())
	case <-c.done:
		return nil, c.Err()
	}
}

// expired makes a context's deadline look like any other.
func expired(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
	}
	return err
}

// timedOut is the error of a call whose time is up: its context's too, if it had the
// deadline from there.
func timedOut(ctx context.Context) error {
	if _, ok := ctx.Deadline(); ok {
		return expired(context.DeadlineExceeded)
	}
	return os.ErrDeadlineExceeded
}

// await waits for the reply. After an error the slot is no longer the caller's.
func (c *Client) await(ctx context.Context, deadline time.Time, s *slot) error {
	left := time.Until(deadline)
	if s.timer == nil {
		s.timer = time.NewTimer(left)
	} else {
		s.timer.Reset(left)
	}
	var err error
	select {
	case <-s.ready:
	case <-s.timer.C:
		err = fmt.Errorf("no reply in %v: %w", left.Round(time.Microsecond), timedOut(ctx))
	case <-ctx.Done():
		err = expired(ctx.Err())
	case <-c.done:
		err = c.Err()
	}
	s.timer.Stop()
	if err == nil || c.abandon(s, false) {
		return nil
	}
	return err
}

// abandon ends the wait for a reply. If it has come all the same, the caller still has
// the slot and the result is true. free says that no reply can come.
func (c *Client) abandon(s *slot, free bool) (answered bool) {
	c.mu.Lock()
	switch {
	case s.state == slotAnswered:
		answered = true
	case free:
		s.state = slotFree
	default:
		s.state = slotLost
	}
	c.mu.Unlock()
	if answered {
		<-s.ready
	} else if free {
		c.free <- s
	}
	return answered
}

// release gives back a slot whose reply the caller has taken, and closes descriptors it
// left.
func (c *Client) release(s *slot) {
	closeAll(s.fds)
	s.data, s.fds = nil, nil
	c.mu.Lock()
	s.state = slotFree
	c.mu.Unlock()
	c.free <- s
}
