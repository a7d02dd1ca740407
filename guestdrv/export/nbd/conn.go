package nbd

import (
	"bufio"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// readAhead is how many bytes are read at least, so that several headers come with one system call.
	readAhead = 16 << 10
	// lastWrite is how long a client may leave its last replies unread after it has said that it goes.
	lastWrite = 10 * time.Second
)

// conn is one client. Its reader, which is run, takes requests in; workers execute them.
type conn struct {
	s   *Server
	f   *os.File
	raw syscall.RawConn
	src *stream
	in  *bufio.Reader // of src

	// Set by the handshake.
	ex         *exported
	size       int64     // of the disk, as the client was told
	mask       uint64    // block size - 1
	limit      time.Time // of the handshake
	fixed      bool      // the client knows fixed newstyle
	noZeroes   bool
	structured bool
	extended   bool
	meta       string // the export that base:allocation was selected for
	hasMeta    bool   // and it was

	free    chan *request // slots
	work    chan *request
	workers sync.WaitGroup
	started int
	lone    int // so many requests, the last ones, came when nothing was under way

	mu      sync.Mutex // guards what follows
	room    sync.Cond  // of the reader, for memory
	memory  int        // bytes of payload
	first   *request   // replies that are ready, in order
	last    *request
	writing bool  // somebody writes replies
	dead    error // why nothing can be written any more

	// Of whoever has set writing.
	iov      [batch * 2]unix.Iovec
	pending  []unix.Iovec
	writeErr error
	write    func(fd uintptr) bool // tryWrite
}

func newConn(s *Server, f *os.File, raw syscall.RawConn) *conn {
	c := &conn{s: s, f: f, raw: raw, src: newStream(raw)}
	c.in = bufio.NewReaderSize(c.src, readAhead)
	c.room.L = &c.mu
	c.write = c.tryWrite
	return c
}

// run serves the client until it goes.
func (c *conn) run() {
	defer c.s.remove(c)
	defer c.f.Close()
	err := c.handshake()
	if err == nil {
		c.s.log.Debug("client", "export", c.ex.Name, "structured", c.structured, "extended", c.extended)
		err = c.transmission()
	}
	if err == nil || errors.Is(err, io.EOF) {
		c.s.log.Debug("client went")
		return
	}
	c.s.log.Info("client lost", "reason", err)
}

// transmission runs the second phase of the protocol.
func (c *conn) transmission() error {
	c.free, c.work = make(chan *request, slots), make(chan *request)
	requests := make([]request, slots)
	for i := range requests {
		requests[i].c = c
		c.free <- &requests[i]
	}
	_ = c.f.SetDeadline(time.Time{})
	if c.s.closing.Load() { // looked at after the deadline is gone; pairs with Close, which sets it after closing
		c.hush()
	}
	err := c.read()
	close(c.work)
	// What is under way is finished, and its replies are written, whatever the client said: if it is gone, writing fails.
	_ = c.f.SetWriteDeadline(time.Now().Add(lastWrite))
	c.workers.Wait()
	return err
}

// read takes requests in until the client goes, or does what no client does.
func (c *conn) read() error {
	for {
		r := <-c.free
		disconnect, err := c.next(r)
		if (disconnect || err != nil) && r.buf != nil { // its payload did not come
			c.s.bufs.put(r.buf)
		}
		switch {
		case disconnect:
			return nil
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded) && c.s.closing.Load():
			return nil // it was quiet
		default:
			return err
		}
	}
}

const (
	// loneClient is how many requests in a row make a client one that has no two under way.
	loneClient = 8
	// loneLength is the longest request of such a client that its reader executes itself.
	loneLength = 256 << 10
)

// start gives r to a worker. Of a client that waits for each reply before it sends more, the reader executes requests itself: to wake a worker
// takes longer than the rest of a small request.
func (c *conn) start(r *request) {
	if len(c.free) < slots-1 || c.in.Buffered() > 0 {
		c.lone = 0
	} else if c.lone++; c.lone > loneClient && (r.cmd == cmdRead || r.cmd == cmdWrite) && r.length <= loneLength {
		r.execute()
		return
	}
	c.hand(r)
}

// hand gives r to a worker.
func (c *conn) hand(r *request) {
	select {
	case c.work <- r:
		return
	default:
	}
	if c.started == slots {
		c.work <- r
		return
	}
	c.started++
	c.workers.Add(1)
	go c.worker(r)
}

func (c *conn) worker(r *request) {
	defer c.workers.Done()
	r.execute()
	for r := range c.work {
		r.execute()
	}
}

// charge waits until there is room for n more bytes of payload.
func (c *conn) charge(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.memory+n > connMemory && c.memory > 0 && c.dead == nil {
		c.room.Wait()
	}
	c.memory += n
}

// hush lets the reader end as soon as the client is quiet.
func (c *conn) hush() { _ = c.f.SetReadDeadline(time.Now().Add(c.s.quiet)) }

// kill ends the connection at once. Disks may still be busy for it.
func (c *conn) kill(err error) {
	c.mu.Lock()
	c.die(err)
	c.mu.Unlock()
	c.f.Close()
}

// die is called with the lock.
func (c *conn) die(err error) {
	if c.dead == nil {
		c.dead = err
		c.room.Broadcast()
	}
}
