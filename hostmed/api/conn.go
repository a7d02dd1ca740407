package api

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/inspect/attach"
)

// listener lets in whom it may, and no more at a time than there is room for.
type listener struct {
	*net.UnixListener
	log  hclog.Logger
	free chan struct{} // one in it for each connection
	once sync.Once
	err  error

	peer func(*net.UnixConn) (uid uint32, err error) // peerUID, but for tests
	told time.Time                                   // when the log was last told of somebody turned away
}

// Accept returns the next connection that may be.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		if err != nil {
			// Out of descriptors or memory: later it may work again.
			l.tell("accept", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		refused := l.admit(c)
		if refused != nil {
			l.tell("client turned away", "error", refused.Message)
		}
		select {
		case l.free <- struct{}{}:
			return &conn{UnixConn: c, l: l, refused: refused}, nil
		default:
			c.Close() // one of many that would only be told that there are too many
		}
	}
}

// admit says why c may not ask anything; nil: it may.
func (l *listener) admit(c *net.UnixConn) *attach.Error {
	peer := l.peer
	if peer == nil {
		peer = peerUID
	}
	uid, err := peer(c)
	switch {
	case err != nil:
		return &attach.Error{Code: "forbidden", Message: err.Error()}
	case uid != 0 && uid != uint32(os.Geteuid()):
		return &attach.Error{Code: "forbidden", Message: fmt.Sprintf("user %d may not use the control socket of user %d", uid, os.Geteuid())}
	case len(l.free) >= MaxConns:
		return &attach.Error{Code: "busy", Message: fmt.Sprintf("%d connections are open already: close one", MaxConns)}
	}
	return nil
}

// peerUID returns whom the kernel takes the other end for.
func peerUID(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	return uid, errors.Join(cerr, err)
}

// tell writes to the log, but not for each of many.
func (l *listener) tell(what string, args ...any) {
	if time.Since(l.told) > 10*time.Second {
		l.told = time.Now()
		l.log.Warn(what, args...)
	}
}

// Close ends the listening.
func (l *listener) Close() error {
	l.once.Do(func() { l.err = l.UnixListener.Close() })
	return l.err
}

// wait returns when all connections are closed. None is let in any more.
func (l *listener) wait() {
	for range cap(l.free) {
		l.free <- struct{}{}
	}
}

// conn gives its place back.
type conn struct {
	*net.UnixConn
	l       *listener
	refused *attach.Error // all that it is told; nil: it is served
	once    sync.Once
}

// Close may be called more than once.
func (c *conn) Close() error {
	err := c.UnixConn.Close()
	c.once.Do(func() { <-c.l.free })
	return err
}
