package api

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/shared/inspect/attach"
)

// attach upgrades the connection to one of messages with descriptors. It belongs to this goroutine until the client hangs up or sends what cannot be.
func (s *Server) attach(w http.ResponseWriter, q *http.Request) {
	if !strings.EqualFold(q.Header.Get("Upgrade"), attach.Protocol) {
		w.Header().Set("Upgrade", attach.Protocol)
		w.Header().Set("Connection", "Upgrade")
		refuse(w, http.StatusUpgradeRequired, &attach.Error{Code: "upgrade", Message: "this path is for connections with Upgrade: " + attach.Protocol})
		return
	}
	h, ok := w.(http.Hijacker)
	if !ok {
		refuse(w, http.StatusInternalServerError, &attach.Error{Code: "failed", Message: "this connection cannot be upgraded"})
		return
	}
	hijacked, rw, err := h.Hijack()
	if err != nil {
		refuse(w, http.StatusInternalServerError, attach.ErrorOf(err))
		return
	}
	c, ok := hijacked.(*conn)
	if !ok || !s.attached.add(c) {
		hijacked.Close()
		return
	}
	defer s.attached.done(c)
	if err := s.serve(c.UnixConn, rw); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		s.log.Debug("attached client dropped", "error", err)
	}
}

func (s *Server) serve(c *net.UnixConn, rw *bufio.ReadWriter) error {
	if rw.Reader.Buffered() > 0 {
		return attach.ErrProtocol // it has not waited for the answer
	}
	_ = c.SetDeadline(time.Now().Add(attach.Patience))
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+attach.Protocol+"\r\n\r\n"); err != nil {
		return err
	}
	for {
		q, err := attach.ReceiveRequest(c)
		if err != nil {
			return err
		}
		if err := s.answer(c, q); err != nil {
			return err
		}
	}
}

// answer replies to one request. What was opened for it is closed when it was sent, or could not be.
func (s *Server) answer(c *net.UnixConn, q attach.Request) error {
	r := attach.Reply{ID: q.ID}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	switch {
	case q.Inspect != nil:
		snapshot, opened, err := s.m.InspectMemory(s.ctx, q.Inspect.Controller)
		if files = opened; err != nil {
			r.Error = attach.ErrorOf(err)
		} else {
			r.Snapshot = &snapshot
		}
	default:
		r.Error = &attach.Error{Code: "unknown", Message: "a request that this hostmed does not know"}
	}
	return attach.Send(c, r, files)
}

// attached are the upgraded connections, which package http does not know any more.
type attached struct {
	mu     sync.Mutex // guards the rest
	conns  map[*conn]bool
	closed bool
	wait   sync.WaitGroup
}

// add is false after close.
func (a *attached) add(c *conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	if a.conns == nil {
		a.conns = map[*conn]bool{}
	}
	a.conns[c] = true
	a.wait.Add(1)
	return true
}

func (a *attached) done(c *conn) {
	a.mu.Lock()
	delete(a.conns, c)
	a.mu.Unlock()
	c.Close()
	a.wait.Done()
}

// close ends them all.
func (a *attached) close() {
	a.mu.Lock()
	a.closed = true
	for c := range a.conns {
		c.UnixConn.Close()
	}
	a.mu.Unlock()
	a.wait.Wait()
}
