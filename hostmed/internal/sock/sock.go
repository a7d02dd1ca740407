// Package sock makes the unix sockets that hostmed listens on. What is said over them is not its business.
package sock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Umask, as a mode, leaves it to the process's umask who may connect.
const Umask = 0

// Listen makes the socket path, of that mode from the start. One that is there already is replaced if nobody listens on it: a mediator
// that was killed could not remove it.
func Listen(path string, mode uint32) (*net.UnixListener, error) {
	if path == "" {
		return nil, errors.New("empty socket path: give --socket a path")
	}
	if len(path) > 107 {
		return nil, fmt.Errorf("socket %s: the path has %d bytes, unix sockets allow 107; use a shorter one", path, len(path))
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("socket %s: a file that is not a socket is in its place; remove it or choose another path", path)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("socket %s: in use by another process; stop it or choose another path", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("socket %s: stale, and cannot be removed: %w", path, err)
		}
	}
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		if mode == Umask {
			return nil
		}
		// Before bind, which makes the socket's inode of it: there is no time in which others could connect. unix(7) does not say so; the
		// kernel's unix_bind_bsd does.
		cerr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), mode) })
		return errors.Join(cerr, err)
	}}
	made, err := c.Listen(context.Background(), "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("socket %s: the directory %s does not exist; create it", path, filepath.Dir(path))
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("socket %s: no permission to create it; choose a directory that user %d may write to", path, os.Getuid())
	case err != nil:
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l := made.(*net.UnixListener)
	if mode != Umask { // in case that this kernel does otherwise
		if err := os.Chmod(path, fs.FileMode(mode)); err != nil {
			return nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), l.Close())
		}
	}
	l.SetUnlinkOnClose(false) // the caller does it, if the path is still its own
	return l, nil
}
