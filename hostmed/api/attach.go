package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/inspect"
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
	x := attachment{s: s}
	defer x.close()
	for {
		q, err := attach.ReceiveRequest(c)
		if err != nil {
			return err
		}
		if err := x.answer(c, q); err != nil {
			return err
		}
	}
}

// attachment is an upgraded connection.
type attachment struct {
	s     *Server
	trace *hostmed.Trace // nil: it does not listen
}

func (x *attachment) close() {
	if x.trace == nil {
		return
	}
	if err := x.trace.Close(); err != nil {
		x.s.log.Error("ending the recording of events", "error", err)
	}
}

// answer replies to one request. What was opened for it is closed when it was sent, or could not be.
func (x *attachment) answer(c *net.UnixConn, q attach.Request) error {
	s := x.s
	r := attach.Reply{ID: q.ID}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	switch {
	case q.Listen != nil:
		var err error
		if files, err = x.listen(q.Listen.Records); err != nil {
			r.Error = attach.ErrorOf(err)
		} else {
			r.Rings, r.Media = len(files), x.trace.Media()
		}
	case q.Media != nil:
		if x.trace == nil {
			r.Error = &attach.Error{Code: "not-listening", Message: "this connection does not listen"}
		} else {
			r.Media = x.trace.Media()
		}
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
	err := attach.Send(c, r, files)
	if errors.Is(err, attach.ErrTooLong) {
		r = attach.Reply{ID: q.ID, Error: &attach.Error{Code: "too-long", Message: err.Error() + ": ask for one controller"}}
		err = attach.Send(c, r, nil)
	}
	return err
}

// listen begins to record for x.
func (x *attachment) listen(records uint32) (files []*os.File, err error) {
	switch {
	case x.trace != nil:
		return nil, &attach.Error{Code: "listening", Message: "this connection listens already: open another"}
	case records > attach.MaxRecords:
		return nil, &attach.Error{Code: "bad-records", Message: fmt.Sprintf("rings of %d records: %d is the most", records, attach.MaxRecords)}
	}
	trace, err := x.s.listen(records)
	if err != nil {
		return nil, err
	}
	if files, err = trace.Files(); err == nil && len(files) > inspect.MaxFiles {
		err = fmt.Errorf("%d workers have a ring each, %d can be handed over", len(files), inspect.MaxFiles)
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, errors.Join(err, trace.Close())
	}
	x.trace = trace
	return files, nil
}

// listen is the mediator's, but does not wait for a worker that hangs.
func (s *Server) listen(records uint32) (*hostmed.Trace, error) {
	select {
	case s.asking <- struct{}{}:
	default:
		return nil, inspect.ErrBusy
	}
	type answer struct {
		trace *hostmed.Trace
		err   error
	}
	got := make(chan answer)
	ctx, cancel := context.WithTimeout(s.ctx, listenPatience)
	defer cancel()
	go func() {
		defer func() { <-s.asking }()
		t, err := s.m.Listen(records)
		select {
		case got <- answer{t, err}:
		case <-ctx.Done():
			if err == nil {
				t.Close()
			}
		}
	}()
	select {
	case a := <-got:
		return a.trace, a.err
	case <-ctx.Done():
		return nil, inspect.ErrBusy
	}
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
