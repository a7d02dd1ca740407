package vfiouser

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// SendTimeout is how long SendMessage waits for a peer that does not read. QEMU gives
// up on a reply after 5 s.
const SendTimeout = 2 * time.Second

var errTooLong = errors.New("message too long")

// SendMessage sends one whole message on the non-blocking socket fd; h.Size is
// computed. It waits, by poll, up to SendTimeout for room in the socket. fds stay the
// caller's. After an error the stream may end inside a message: drop the connection.
func SendMessage(fd int, h Header, payload []byte, fds []int) error {
	return SendMessageTimeout(fd, h, payload, fds, SendTimeout)
}

// SendMessageTimeout is SendMessage with another limit; its error is
// os.ErrDeadlineExceeded when the time is up.
func SendMessageTimeout(fd int, h Header, payload []byte, fds []int, timeout time.Duration) error {
	if len(payload) > MaxMsg-HeaderSize || len(fds) > MaxFDs {
		return fmt.Errorf("%s: %w: %d bytes, %d descriptors", h.Cmd, errTooLong, len(payload), len(fds))
	}
	h.Size = HeaderSize + uint32(len(payload))
	var raw [HeaderSize]byte
	head := h.Append(raw[:0])
	var oob []byte
	if len(fds) != 0 {
		oob = unix.UnixRights(fds...)
	}
	var deadline time.Time
	for {
		n, errno := sendmsg(fd, head, payload, oob)
		switch errno {
		case 0:
			oob = nil
			if head, payload = advance(head, payload, n); len(head)+len(payload) == 0 {
				return nil
			}
			continue
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		default:
			return fmt.Errorf("%s: sendmsg: %w", h.Cmd, errno)
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(timeout)
		}
		if err := waitWritable(fd, deadline); err != nil {
			return fmt.Errorf("%s: peer does not read: %w", h.Cmd, err)
		}
	}
}

// advance drops the first n bytes of a followed by b.
func advance(a, b []byte, n int) ([]byte, []byte) {
	if n < len(a) {
		return a[n:], b
	}
	return nil, b[n-len(a):]
}

func waitWritable(fd int, deadline time.Time) error {
	pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		n, err := unix.Poll(pfd, int(left/time.Millisecond)+1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
		if n > 0 {
			return nil // writable, or in an error that sendmsg will name
		}
	}
}
