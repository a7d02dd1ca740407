package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a unix socket that clients connect to. It makes do with accept4, close and the poller, so that it works in a sandbox that lets
// nothing else through.
type Listener struct {
	f    *os.File
	raw  syscall.RawConn
	path string
	dev  uint64
	ino  uint64

	closed atomic.Bool
}

// backlog is how many clients may wait to be accepted.
const backlog = 64

// Listen makes the socket path, for this user alone. A socket that is there already is replaced if nobody listens on it: a server
// that was killed could not remove it.
func Listen(path string) (*Listener, error) {
	if err := makeRoom(path); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l := &Listener{f: os.NewFile(uintptr(fd), path), path: path}
	if err := l.bind(fd); err != nil {
		return nil, errors.Join(err, l.f.Close())
	}
	return l, nil
}

func (l *Listener) bind(fd int) error {
	// bind(2) makes the file with the mode that the socket has.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return fmt.Errorf("socket %s: %w", l.path, err)
	}
	err := unix.Bind(fd, &unix.SockaddrUnix{Name: l.path})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("socket %s: the directory %s does not exist; create it", l.path, filepath.Dir(l.path))
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("socket %s: no permission to create it; choose a directory that user %d may write to", l.path, os.Getuid())
	case err != nil:
		return fmt.Errorf("socket %s: %w", l.path, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(l.path, &st); err != nil {
		return fmt.Errorf("socket %s: %w", l.path, err)
	}
	l.dev, l.ino = st.Dev, st.Ino
	if err := unix.Listen(fd, backlog); err != nil {
		return fmt.Errorf("socket %s: %w", l.path, err)
	}
	l.raw, err = l.f.SyscallConn()
	return err
}

// RemoveStale removes the socket at path if nobody listens on it: for who outlives a server that could not do it.
func RemoveStale(path string) {
	st, err := os.Lstat(path)
	if err != nil || st.Mode()&fs.ModeSocket == 0 {
		return
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		_ = os.Remove(path) // if not, Listen does
	}
}

func makeRoom(path string) error {
	if path == "" {
		return errors.New("empty socket path: write it as unix:PATH")
	}
	if len(path) > 107 {
		return fmt.Errorf("socket %s: the path has %d bytes, unix sockets allow 107; use a shorter one", path, len(path))
	}
	st, err := os.Lstat(path)
	switch {
	case err != nil:
		return nil // if it is not that there is none, bind says so
	case st.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("socket %s: a file that is not a socket is in its place; remove it or choose another path", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return fmt.Errorf("socket %s: in use by another process; stop it or choose another path", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("socket %s: stale, and cannot be removed: %w", path, err)
	}
	return nil
}

// FD returns the descriptor that accept4 is called with.
func (l *Listener) FD() int {
	fd := -1
	_ = l.raw.Control(func(at uintptr) { fd = int(at) })
	return fd
}

// accept waits for a client. The error is os.ErrClosed after Close.
func (l *Listener) accept() (*os.File, error) {
	fd, err := -1, error(nil)
	waitErr := l.raw.Read(func(at uintptr) bool {
		for {
			fd, _, err = unix.Accept4(int(at), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			switch {
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
				continue
			}
			return !errors.Is(err, unix.EAGAIN)
		}
	})
	switch {
	case l.closed.Load():
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, os.ErrClosed
	case waitErr != nil:
		return nil, waitErr
	}
	if err != nil {
		return nil, os.NewSyscallError("accept4", err)
	}
	return os.NewFile(uintptr(fd), "nbd client"), nil
}

// Close ends listening. The socket's file stays: in a sandbox nothing can be removed, and Listen replaces it.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.f.Close()
}

// Remove removes the socket's file, unless there is another one in its place by now.
func (l *Listener) Remove() error {
	var st unix.Stat_t
	if err := unix.Lstat(l.path, &st); err != nil || st.Dev != l.dev || st.Ino != l.ino {
		return nil
	}
	return os.Remove(l.path)
}
