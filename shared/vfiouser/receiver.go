package vfiouser

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// How a message is received:
//
//  1. Fill reads once into the buffer, and files descriptors that came along under
//     the message that they belong to.
//  2. Next cuts complete messages off the front.
//  3. The next Fill moves what is left, the beginning of a message, to the front of a
//     buffer that is just large enough.

const (
	// recvBufSize is what a connection keeps: 56 doorbell messages in one read.
	recvBufSize = 2048
	// recvGrowth is the factor by which a message too long for the buffer makes it
	// grow, as its bytes come in: what a peer only announces costs nothing.
	recvGrowth = 4
)

// ErrProtocol says that the peer broke the protocol and that its connection is of no
// further use.
var ErrProtocol = errors.New("vfio-user protocol error")

// ErrUntaken says that Fill was called while Next still had a message.
var ErrUntaken = errors.New("a complete message is still in the buffer")

// Receiver reads messages from a non-blocking unix stream socket. It keeps 2 KiB
// once something has arrived, and more only while a longer message is under way. It
// is for one goroutine at a time, and does not own the socket.
type Receiver struct {
	oob    [oobSize]byte
	fd     int
	maxMsg int

	buf        []byte // all of it; [start, end) is not yet taken
	start, end int
	last       int // where the last message that begins in the buffer begins; <= end
	err        error

	// Descriptors under way. There are at most two messages that can have any: the one
	// that Fill found begun, and the last one that it brought.
	headFDs, lastFDs []int
	headAt, lastAt   int // offsets of those messages in buf
}

// NewReceiver returns a Receiver for the non-blocking socket fd that accepts
// messages of up to maxMsg bytes, header included; 0 means MaxMsg.
func NewReceiver(fd int, maxMsg int) *Receiver {
	if maxMsg <= 0 {
		maxMsg = MaxMsg
	}
	return &Receiver{fd: fd, maxMsg: max(maxMsg, HeaderSize)}
}

// Fill does one recvmsg. All that Next has, must have been taken before; payloads
// handed out by Next become invalid.
//
// eof says that the peer is gone: with err nil it left between two messages, with
// io.ErrUnexpectedEOF in the middle of one, with ECONNRESET without having read all
// that was sent to it. Without eof, unix.EAGAIN says that there is nothing to read
// now; any other error is final: ErrProtocol, or the socket's.
func (r *Receiver) Fill() (eof bool, err error) {
	if r.err != nil {
		return false, r.err
	}
	if r.complete() {
		return false, ErrUntaken
	}
	r.makeRoom()
	for {
		n, oobn, flags, errno := recvmsg(r.fd, r.buf[r.end:], r.oob[:])
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			return false, unix.EAGAIN
		case errno == unix.ECONNRESET:
			return true, unix.ECONNRESET
		case errno != 0:
			r.err = fmt.Errorf("recvmsg: %w", errno)
			return false, r.err
		}
		return r.received(n, oobn, flags)
	}
}

func (r *Receiver) received(n, oobn, flags int) (eof bool, err error) {
	var fds []int
	if oobn > 0 {
		fds = rights(r.oob[:min(oobn, len(r.oob))])
	}
	if flags&unix.MSG_CTRUNC != 0 {
		closeAll(fds)
		r.err = fmt.Errorf("%w: file descriptors lost: this process has no room for more (ulimit -n)", ErrProtocol)
		return false, r.err
	}
	if n == 0 {
		closeAll(fds)
		if r.end > r.start {
			return true, io.ErrUnexpectedEOF
		}
		return true, nil
	}
	r.end += n
	r.scan()
	if len(fds) != 0 {
		return false, r.file(fds)
	}
	return false, nil
}

// complete reports whether Next would find something: a message, or an error.
func (r *Receiver) complete() bool {
	h, ok := ParseHeader(r.buf[r.start:r.end])
	return ok && (!r.sizeOK(h.Size) || int(h.Size) <= r.end-r.start)
}

func (r *Receiver) sizeOK(size uint32) bool {
	return size >= HeaderSize && uint64(size) <= uint64(r.maxMsg)
}

// makeRoom moves the message that has begun to the front of a buffer with room for
// more of it, and gives back one that is larger than needed.
func (r *Receiver) makeRoom() {
	have := r.end - r.start
	want := recvBufSize
	if have >= recvBufSize {
		h, _ := ParseHeader(r.buf[r.start:])
		want = max(len(r.buf), recvBufSize)
		if have == want {
			want *= recvGrowth
		}
		want = max(min(want, int(h.Size)), recvBufSize)
	}
	if len(r.buf) != want {
		b := make([]byte, want)
		copy(b, r.buf[r.start:r.end])
		r.buf = b
	} else if r.start > 0 {
		copy(r.buf, r.buf[r.start:r.end])
	}
	// Only the message at the front can still have descriptors.
	if len(r.lastFDs) != 0 {
		r.headFDs, r.lastFDs = r.lastFDs, nil
	}
	r.headAt, r.lastAt, r.last = 0, 0, 0
	r.start, r.end = 0, have
}

// scan moves last on to where the last message begins. It stops at a header that
// Next will refuse.
func (r *Receiver) scan() {
	for {
		h, ok := ParseHeader(r.buf[r.last:r.end])
		if !ok || !r.sizeOK(h.Size) || int(h.Size) >= r.end-r.last {
			return
		}
		r.last += int(h.Size)
	}
}

// file puts descriptors with the last message that begins in what was received
// with them, or, if none begins there, with the one that goes on there. Senders put a
// whole message and its descriptors in one sendmsg, and the kernel ends a recvmsg with
// the bytes that carried descriptors.
func (r *Receiver) file(fds []int) error {
	to := &r.lastFDs
	if r.last == 0 {
		to = &r.headFDs
	} else {
		r.lastAt = r.last
	}
	if len(*to)+len(fds) > MaxFDsTaken {
		closeAll(fds)
		r.err = fmt.Errorf("%w: more than %d file descriptors in a message", ErrProtocol, MaxFDsTaken)
		return r.err
	}
	*to = append(*to, fds...)
	return nil
}

// Next returns the next complete message in the buffer; ok is false if there is
// none. The caller owns its descriptors. An error is ErrProtocol and final: a size
// below 16 or above the limit.
func (r *Receiver) Next() (m Message, ok bool, err error) {
	h, ok := ParseHeader(r.buf[r.start:r.end])
	if !ok {
		return Message{}, false, nil
	}
	if !r.sizeOK(h.Size) {
		r.err = fmt.Errorf("%w: %s: size not in [%d, %d]", ErrProtocol, h, HeaderSize, r.maxMsg)
		return Message{}, false, r.err
	}
	end := r.start + int(h.Size)
	if end > r.end {
		return Message{}, false, nil
	}
	m = Message{Header: h, Payload: r.buf[r.start+HeaderSize : end : end]}
	if len(r.headFDs) != 0 && r.headAt == r.start {
		m.FDs, r.headFDs = r.headFDs, nil
	} else if len(r.lastFDs) != 0 && r.lastAt == r.start {
		m.FDs, r.lastFDs = r.lastFDs, nil
	}
	r.start = end
	return m, true, nil
}

// Close closes the descriptors that nobody took and gives back the buffer. The
// socket stays open.
func (r *Receiver) Close() {
	closeAll(r.headFDs)
	closeAll(r.lastFDs)
	r.headFDs, r.lastFDs = nil, nil
	r.buf, r.start, r.end, r.last = nil, 0, 0, 0
	if r.err == nil {
		r.err = errors.New("receiver is closed")
	}
}

// rights returns the descriptors in a control buffer that the kernel wrote.
func rights(oob []byte) []int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var fds []int
	for i := range msgs {
		if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
