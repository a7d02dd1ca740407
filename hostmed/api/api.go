// Package api is hostmed's control socket: HTTP with JSON over a unix socket, for those who look at a running mediator and kick its queues.
// docs/control.md describes it; package attach (shared/inspect/attach) is its client.
//
// A program that embeds hostmed can serve it too. Who may connect is root and the user
// that this process runs as; they are trusted not to be hostile to the service, but not to be right: what they send is bounded, and a client that
// is slow or goes away costs nobody but itself.
//
// Files: api.go (the server), conn.go (who may connect), routes.go (what can be asked), attach.go (the connection that files are handed over on).
package api

import (
	"context"
	"errors"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/hostmed/internal/sock"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// Mediator is what is shown. *hostmed.Mediator is one.
type Mediator interface {
	List() []inspect.Listed
	Inspect(ctx context.Context, which string) (inspect.Snapshot, error)
	InspectMemory(ctx context.Context, which string) (inspect.Snapshot, []*os.File, error)
	Counters(ctx context.Context, which string) (inspect.Counters, error)
	Kick(ctx context.Context, which string, qid uint16) (inspect.Kick, error)
	Listen(records uint32) (*hostmed.Trace, error)
}

var _ Mediator = (*hostmed.Mediator)(nil)

// Bounds of what clients can have.
const (
	MaxConns = 32 // connections at one time; more are turned away
	maxOpen  = 64 // and with those that are being told so

	maxHeader      = 16 << 10
	requestTimeout = 5 * time.Second  // for the head of a request
	readTimeout    = 10 * time.Second // and all of it
	writeTimeout   = 30 * time.Second // from there to the end of the answer
	idleTimeout    = time.Minute

	listenPatience = 2 * time.Second // for workers to begin recording
	maxAsking      = 4               // that wait for that, or that nobody waits for any more
)

// Server serves a control socket.
type Server struct {
	m        Mediator
	log      hclog.Logger
	path     string
	inode    uint64
	listener *listener
	http     http.Server

	ctx      context.Context // ends with the server; of what upgraded connections ask for
	cancel   context.CancelFunc
	attached attached
	asking   chan struct{} // one in it for each Listen that has not returned
	once     sync.Once
	err      error
}

// Listen makes the socket path, mode 0600, for m. Serve serves it.
func Listen(path string, m Mediator, log hclog.Logger) (*Server, error) {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	l, err := sock.Listen(path, 0o600)
	if err != nil {
		return nil, err
	}
	s := &Server{m: m, log: log.Named("control"), path: path, asking: make(chan struct{}, maxAsking)}
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil {
		s.inode = st.Ino
	}
	s.listener = &listener{UnixListener: l, log: s.log, free: make(chan struct{}, maxOpen)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.http = http.Server{
		Handler: admitted(s.routes()), ConnContext: withConn, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: requestTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		ErrorLog: errorLog(s.log),
	}
	return s, nil
}

// errorLog is where package http complains of clients.
func errorLog(l hclog.Logger) *log.Logger {
	return log.New(debugWriter{l}, "", 0)
}

type debugWriter struct{ hclog.Logger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.Debug("http", "message", strings.TrimSpace(string(p)))
	return len(p), nil
}

// Serve answers until ctx ends or Close is called, and returns when nothing of it is left.
func (s *Server) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	s.log.Info("listening", "socket", s.path)
	err := s.http.Serve(s.listener)
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, s.Close())
}

// Close ends all connections, waits for what they asked for, and removes the socket. It may be called more than once.
func (s *Server) Close() error {
	s.once.Do(func() {
		s.cancel()
		s.err = errors.Join(s.http.Close(), s.listener.Close())
		s.attached.close()
		s.listener.wait()
		var st unix.Stat_t
		if unix.Stat(s.path, &st) == nil && st.Ino == s.inode {
			s.err = errors.Join(s.err, os.Remove(s.path))
		}
	})
	return s.err
}
