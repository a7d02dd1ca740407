package vfiouser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errNotSent says that not one byte of a message left.
var errNotSent = errors.New("not sent")

// outgoing is the message that is being sent.
type outgoing struct {
	conn     *net.UnixConn
	try      func(fd uintptr) bool // kept, so that sending allocates nothing
	buf, oob []byte
	errno    unix.Errno

	ctx      context.Context // of the caller whose message it is
	deadline time.Time
	disarm   func() // set while the socket has a deadline
}

// send is called by the runtime's poller whenever the socket may have room. The
// deadline is put on the socket only when it has none.
func (o *outgoing) send(fd uintptr) (finished bool) {
	for {
		n, errno := sendmsg(int(fd), o.buf, nil, o.oob)
		switch errno {
		case 0:
			o.oob = nil
			if o.buf = o.buf[n:]; len(o.buf) == 0 {
				return true
			}
		case unix.EINTR:
		case unix.EAGAIN:
			if o.disarm == nil {
				o.arm()
			}
			return false
		default:
			o.errno = errno
			return true
		}
	}
}

// arm makes the wait for room end with the caller's deadline or context.
func (o *outgoing) arm() {
	_ = o.conn.SetWriteDeadline(o.deadline)
	fired := make(chan struct{})
	stop := context.AfterFunc(o.ctx, func() {
		_ = o.conn.SetWriteDeadline(time.Unix(1, 0))
		close(fired)
	})
	o.disarm = func() {
		if !stop() {
			<-fired
		}
		_ = o.conn.SetWriteDeadline(time.Time{})
	}
}

// lockSend takes the right to send.
func (c *Client) lockSend(ctx context.Context, deadline time.Time) error {
	select {
	case c.sending <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case c.sending <- struct{}{}:
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: server does not read: %w", errNotSent, timedOut(ctx))
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errNotSent, expired(ctx.Err()))
	case <-c.done:
		return c.Err()
	}
}

// send sends one whole message.
func (c *Client) send(ctx context.Context, deadline time.Time, msg []byte, fds []int) error {
	if err := c.lockSend(ctx, deadline); err != nil {
		return err
	}
	err := c.sendLocked(ctx, deadline, msg, fds)
	<-c.sending
	return err
}

func (c *Client) sendLocked(ctx context.Context, deadline time.Time, msg []byte, fds []int) error {
	o := &c.tx
	o.buf, o.oob, o.errno = msg, nil, 0
	o.ctx, o.deadline, o.disarm = ctx, deadline, nil
	if len(fds) != 0 {
		o.oob = unix.UnixRights(fds...)
	}
	err := c.raw.Write(o.try)
	if o.disarm != nil {
		o.disarm()
	}
	unsent := len(o.buf) == len(msg)
	o.buf, o.oob, o.ctx = nil, nil, nil
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = timedOut(ctx)
		if cause := ctx.Err(); cause != nil {
			err = expired(cause)
		}
		if unsent {
			return fmt.Errorf("%w: server does not read: %w", errNotSent, err)
		}
		err = fmt.Errorf("server stopped reading in the middle of a message: %w", err)
	}
	switch {
	case err != nil:
		c.fail(err)
	case o.errno == 0:
		return nil
	case o.errno == unix.EPIPE || o.errno == unix.ECONNRESET:
		c.fail(ErrPeerGone)
	case unsent && !fatalSend(o.errno):
		return fmt.Errorf("%w: sendmsg: %w", errNotSent, o.errno)
	default:
		c.fail(fmt.Errorf("sendmsg: %w", o.errno))
	}
	return c.Err()
}

// fatalSend reports whether the socket, rather than what was sent, is at fault.
func fatalSend(errno unix.Errno) bool {
	switch errno {
	case unix.EBADF, unix.ETOOMANYREFS, unix.EINVAL, unix.ENOMEM, unix.ENOBUFS, unix.EMSGSIZE:
		return false // e.g. a descriptor that is not open
	}
	return true
}

// readLoop is the reader goroutine.
func (c *Client) readLoop() {
	defer close(c.stopped)
	rx := incoming{}
	rx.init(c.raw)
	defer rx.close()
	for {
		if err := rx.fill(); err != nil {
			c.fail(err)
			return
		}
		for {
			m, ok, err := rx.r.Next()
			if err != nil {
				c.fail(err)
				return
			}
			if !ok {
				break
			}
			if err := c.received(&m); err != nil {
				closeAll(m.FDs)
				c.fail(err)
				return
			}
		}
	}
}

// incoming is a Receiver on the runtime's poller.
type incoming struct {
	raw syscall.RawConn
	r   *Receiver
	try func(fd uintptr) bool
	eof bool
	err error
}

func (i *incoming) init(raw syscall.RawConn) {
	i.raw = raw
	i.try = func(fd uintptr) bool {
		if i.r == nil {
			i.r = NewReceiver(int(fd), MaxMsg)
		}
		i.eof, i.err = i.r.Fill()
		return i.err != unix.EAGAIN
	}
}

func (i *incoming) fill() error {
	if err := i.raw.Read(i.try); err != nil {
		return err // closed by Client.fail, which has set the cause
	}
	switch {
	case i.eof && errors.Is(i.err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w in the middle of a message", ErrPeerGone)
	case i.eof:
		return ErrPeerGone
	}
	return i.err
}

func (i *incoming) close() {
	if i.r != nil {
		i.r.Close()
	}
}

// received deals with one message from the server. After an error, m.FDs are still
// the caller's to close.
func (c *Client) received(m *Message) error {
	if m.IsCommand() {
		return c.refuse(m)
	}
	index := int(m.ID & (1<<slotBits - 1))
	if !m.IsReply() || index >= slotCount {
		return fmt.Errorf("%w: unexpected %s", ErrProtocol, m.Header)
	}
	s := &c.slots[index]
	c.mu.Lock()
	defer c.mu.Unlock()
	waited := s.state == slotWaiting || s.state == slotLost
	if !waited || s.id() != m.ID || s.cmd != m.Cmd {
		return fmt.Errorf("%w: reply to nothing: %s", ErrProtocol, m.Header)
	}
	if len(m.FDs) != 0 && s.cmd != CmdDeviceGetRegionInfo || len(m.FDs) > MaxFDs {
		return fmt.Errorf("%w: reply with %d file descriptors: %s", ErrProtocol, len(m.FDs), m.Header)
	}
	if s.state == slotLost {
		closeAll(m.FDs)
		s.state = slotFree
		c.free <- s // there is room for all of them
		return nil
	}
	s.reply, s.fds = m.Header, m.FDs
	s.data = append(s.in[:0], m.Payload...)
	s.state = slotAnswered
	s.ready <- struct{}{} // there is room: one reply for each wait
	return nil
}

// refuse answers a command from the server: this client shares all its memory, and does
// not do DMA by message.
func (c *Client) refuse(m *Message) error {
	closeAll(m.FDs)
	m.FDs = nil
	if m.Flags&FlagNoReply != 0 {
		return nil
	}
	h := Header{ID: m.ID, Cmd: m.Cmd, Size: HeaderSize, Flags: FlagReply | FlagError, Errno: uint32(unix.ENOTSUP)}
	return c.send(context.Background(), time.Now().Add(c.timeout), h.Append(nil), nil)
}
