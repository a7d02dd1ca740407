package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv/export"
)

// Defaults of Config.
const (
	DefaultConnections = 16
	DefaultDMAMemory   = 32 << 20
	DefaultGrace       = 5 * time.Second
	DefaultHandshake   = 10 * time.Second
)

const (
	// slots is how many requests of a connection are under way at most.
	slots = 128
	// connMemory is how many bytes of payload a connection has at most.
	connMemory = 4 << 20
	// defaultQuiet is for Server.quiet.
	defaultQuiet = 250 * time.Millisecond
)

// Export is a disk by the name that clients ask for.
type Export struct {
	Name        string // "" is the first one's second name, for everybody who asks for none
	Description string // for people
	Disk        export.Disk
	ReadOnly    bool
}

// Config says what a Server serves.
type Config struct {
	Exports []Export // at least one

	// Connections is how many clients there may be at one time; 0: DefaultConnections. One more is turned away.
	Connections int

	// DMAMemory is how many bytes of the first disk's own memory payload may take; 0: DefaultDMAMemory. What is needed beyond that, at most 4 MiB
	// for each connection, is of the heap, and is copied.
	DMAMemory int

	// AnyBlockSize lets clients in that do not ask for the block size also where it is more than 512 bytes: what they ask for and is no multiple of it
	// fails. It is for clients that are told otherwise, as nbd-client is by -b.
	AnyBlockSize bool

	// Handshake is how long a client may take for each option; 0: DefaultHandshake.
	Handshake time.Duration

	// Grace is how long the end of Serve waits for what is under way; 0: DefaultGrace.
	Grace time.Duration

	// Logger is told of clients; nil: nobody.
	Logger hclog.Logger
}

// exported is an export that is being served.
type exported struct {
	Export
	caps export.Caps
	gone *atomic.Bool // the disk is: requests are refused
}

// Server serves exports to clients. It ends with Serve, or with Close if that is never called.
type Server struct {
	cfg     Config
	log     hclog.Logger
	bufs    *pool
	ctx     context.Context // of what disks are asked for
	cancel  context.CancelFunc
	closing atomic.Bool
	quiet   time.Duration // how long a connection may send nothing before a server that is being shut down closes it

	mu      sync.Mutex // guards what follows
	exports []*exported
	conns   map[*conn]struct{}
	all     sync.WaitGroup // connections
}

// New returns a server. It takes no memory before there are clients.
func New(c Config) (*Server, error) {
	if len(c.Exports) == 0 {
		return nil, errors.New("nbd: no exports")
	}
	c.Connections = cmp.Or(c.Connections, DefaultConnections)
	c.DMAMemory = cmp.Or(c.DMAMemory, DefaultDMAMemory)
	c.Handshake = cmp.Or(c.Handshake, DefaultHandshake)
	c.Grace = cmp.Or(c.Grace, DefaultGrace)
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	s := &Server{
		cfg: c, log: c.Logger, conns: map[*conn]struct{}{}, quiet: defaultQuiet,
		bufs: &pool{disk: c.Exports[0].Disk, limit: c.DMAMemory},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for _, e := range c.Exports {
		if len(e.Name) > maxName || len(e.Description) > maxName {
			return nil, errors.New("nbd: the name or the description of an export is longer than 4096 bytes")
		}
		if n := e.Disk.BlockSize(); n > maxBlock {
			return nil, fmt.Errorf("nbd: export %q has blocks of %d bytes, the protocol allows %d", e.Name, n, maxBlock)
		}
		s.Set(e)
	}
	return s, nil
}

// Set adds an export, or takes the place of the one of that name. Clients that have that one keep it as it was, unless the disk is another one:
// then it is as after Remove. The size is looked at whenever a client comes, so a disk that was resized needs no Set.
func (s *Server) Set(e Export) {
	x := &exported{Export: e, caps: export.CapsOf(e.Disk), gone: new(atomic.Bool)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.index(e.Name); i >= 0 {
		if old := s.exports[i]; old.Disk == e.Disk {
			x.gone = old.gone
		} else {
			old.gone.Store(true)
		}
		s.exports[i] = x
		return
	}
	s.exports = append(s.exports, x)
}

// Remove takes an export away. Clients that have it get ESHUTDOWN for all they ask from now on.
func (s *Server) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.index(name); i >= 0 {
		s.exports[i].gone.Store(true)
		s.exports = slices.Delete(s.exports, i, i+1)
	}
}

func (s *Server) index(name string) int {
	return slices.IndexFunc(s.exports, func(e *exported) bool { return e.Name == name })
}

// find returns the export of that name, or nil. The empty name is the first one's.
func (s *Server) find(name string) *exported {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.index(name); i >= 0 {
		return s.exports[i]
	}
	if name == "" && len(s.exports) > 0 {
		return s.exports[0]
	}
	return nil
}

func (s *Server) list() []*exported {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.exports)
}

// Serve accepts clients until ctx ends, or l fails. Then it takes no more: what is under way is finished, what comes later is answered
// with ESHUTDOWN, and connections are closed as soon as they are quiet, at the latest after Config.Grace. When it returns, nothing of
// the server runs any more. It closes l.
func (s *Server) Serve(ctx context.Context, l *Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	err := s.accept(l)
	stop()
	l.Close()
	s.Close()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (s *Server) accept(l *Listener) error {
	var told time.Time
	complain := func(what string, args ...any) {
		if time.Since(told) > time.Second {
			told = time.Now()
			s.log.Warn(what, args...)
		}
	}
	for {
		f, err := l.accept()
		if errors.Is(err, os.ErrClosed) {
			return err
		}
		if err != nil {
			// Out of descriptors or memory: later it may work again.
			complain("accept", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		c, err := s.add(f)
		if err != nil {
			complain("client turned away", "reason", err)
			f.Close()
			continue
		}
		go c.run()
	}
}

var (
	errFull    = errors.New("there are as many clients as Connections allows")
	errClosing = errors.New("the server is being shut down")
)

// ServeConn serves one client on a stream socket that is connected and non-blocking, which becomes the server's. It returns when the connection
// has ended.
func (s *Server) ServeConn(f *os.File) error {
	c, err := s.add(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	c.run()
	return nil
}

func (s *Server) add(f *os.File) (*conn, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing.Load():
		return nil, errClosing
	case len(s.conns) >= s.cfg.Connections:
		return nil, errFull
	}
	c := newConn(s, f, raw)
	s.conns[c] = struct{}{}
	s.all.Add(1)
	return c, nil
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.all.Done()
}

// Close ends the server as Serve does. It may be called more than once.
func (s *Server) Close() {
	s.closing.Store(true)
	s.mu.Lock()
	conns := s.conns
	for c := range conns {
		c.hush()
	}
	s.mu.Unlock()

	ended := make(chan struct{})
	go func() {
		s.all.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(s.cfg.Grace):
		s.log.Warn("clients are cut off: what they asked for did not end in time", "grace", s.cfg.Grace)
		s.cancel()
		s.mu.Lock()
		for c := range s.conns {
			c.kill(errClosing)
		}
		s.mu.Unlock()
		<-ended
	}
	s.cancel()
	s.bufs.close()
}
