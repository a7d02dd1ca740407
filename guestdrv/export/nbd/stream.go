package nbd

import (
	"errors"
	"io"
	"syscall"

	"golang.org/x/sys/unix"
)

// stream reads from a client's socket, as os.File would, and knows whether what it read was there already.
type stream struct {
	raw    syscall.RawConn
	waited bool // some Read had to wait for the client, since whoever asks has cleared it

	// Of the Read under way.
	p   []byte
	n   int
	err error
	try func(fd uintptr) bool // tryRead
}

func newStream(raw syscall.RawConn) *stream {
	s := &stream{raw: raw}
	s.try = s.tryRead
	return s
}

// Read implements io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.p = p
	err := s.raw.Read(s.try)
	s.p = nil
	switch {
	case err != nil:
		return 0, err
	case s.err != nil:
		return 0, s.err
	case s.n == 0:
		return 0, io.EOF
	}
	return s.n, nil
}

func (s *stream) tryRead(fd uintptr) bool {
	for {
		s.n, s.err = unix.Read(int(fd), s.p)
		switch {
		case errors.Is(s.err, unix.EAGAIN):
			s.waited = true
			return false
		case !errors.Is(s.err, unix.EINTR):
			return true
		}
	}
}
