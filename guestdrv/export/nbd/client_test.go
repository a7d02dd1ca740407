package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// within is what a test waits at most for something that comes at once.
const within = time.Minute

// client is a client that sends what it is told to, byte by byte.
type client struct {
	t        testing.TB
	f        *os.File
	ended    chan error // of ServeConn
	mode     mode
	nextWord uint64
}

type mode int

const (
	simple mode = iota
	structured
	extended
)

var modes = map[string]mode{"simple": simple, "structured": structured, "extended": extended}

// serve starts a server, and checks at the end of the test that it has given everything back.
func serve(t testing.TB, c Config) *Server {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		for _, e := range c.Exports {
			if d, ok := e.Disk.(*memdisk.Disk); ok && d.Lent.Load() != 0 {
				t.Errorf("%d buffers were not given back", d.Lent.Load())
			}
		}
	})
	return s
}

// one is a server with one export of 64 blocks, and its disk.
func one(t testing.TB, block int, change func(*Config)) (*Server, *memdisk.Disk) {
	t.Helper()
	d := memdisk.New(64<<10/block*64, block)
	c := Config{Exports: []Export{{Name: "1", Description: "a disk", Disk: d}}, Grace: within}
	if change != nil {
		change(&c)
	}
	return serve(t, c), d
}

// dial connects.
func dial(t testing.TB, s *Server) *client {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, f: os.NewFile(uintptr(fds[0]), "client"), ended: make(chan error, 1)}
	f := os.NewFile(uintptr(fds[1]), "server")
	go func() { c.ended <- s.ServeConn(f) }()
	if err := c.f.SetDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.close() })
	return c
}

// close hangs up and waits for the server to see it.
func (c *client) close() {
	if c.ended == nil {
		return
	}
	c.f.Close()
	select {
	case <-c.ended:
	case <-time.After(within):
		c.t.Error("the server goes on without its client")
	}
	c.ended = nil
}

func (c *client) send(parts ...any) {
	c.t.Helper()
	if err := c.trySend(parts...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) trySend(parts ...any) error {
	var b bytes.Buffer
	for _, p := range parts {
		if s, ok := p.(string); ok {
			p = []byte(s)
		}
		if err := binary.Write(&b, binary.BigEndian, p); err != nil {
			return err
		}
	}
	_, err := c.f.Write(b.Bytes())
	return err
}

func (c *client) recv(n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(c.f, p); err != nil {
		c.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return p
}

// expectEnd expects that the server hangs up without another byte.
func (c *client) expectEnd() {
	c.t.Helper()
	n, err := c.f.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		c.t.Errorf("%d bytes, %v; want the end", n, err)
	}
}

// greet takes the greeting and answers with flags.
func (c *client) greet(flags uint32) {
	c.t.Helper()
	if got := string(c.recv(18)); got != "NBDMAGICIHAVEOPT\x00\x03" {
		c.t.Fatalf("greeting %q", got)
	}
	c.send(flags)
}

// option sends an option.
func (c *client) option(opt uint32, data ...any) {
	c.t.Helper()
	var b bytes.Buffer
	for _, p := range data {
		if s, ok := p.(string); ok {
			p = []byte(s)
		}
		if err := binary.Write(&b, binary.BigEndian, p); err != nil {
			c.t.Fatal(err)
		}
	}
	c.send("IHAVEOPT", opt, uint32(b.Len()), b.Bytes())
}

// reply is an answer to an option.
func (c *client) reply(opt uint32) (kind uint32, data []byte) {
	c.t.Helper()
	h := c.recv(20)
	if binary.BigEndian.Uint64(h) != magicOptReply || binary.BigEndian.Uint32(h[8:]) != opt {
		c.t.Fatalf("reply %x to option %d", h, opt)
	}
	return binary.BigEndian.Uint32(h[12:]), c.recv(int(binary.BigEndian.Uint32(h[16:])))
}

// final skips to the last reply to an option and returns its kind.
func (c *client) final(opt uint32) uint32 {
	c.t.Helper()
	for {
		kind, _ := c.reply(opt)
		if kind == repAck || kind&(1<<31) != 0 {
			return kind
		}
	}
}

func (c *client) acked(opt uint32, data ...any) {
	c.t.Helper()
	c.option(opt, data...)
	if kind := c.final(opt); kind != repAck {
		c.t.Fatalf("option %d: reply %#x", opt, kind)
	}
}

// open does the handshake, up to the transmission phase with base:allocation selected where that is possible.
func open(t testing.TB, s *Server, m mode, name string) *client {
	t.Helper()
	c := dial(t, s)
	c.mode = m
	c.greet(3)
	switch m {
	case structured:
		c.acked(optStructuredReply)
	case extended:
		c.acked(optExtendedHeaders)
	}
	if m != simple {
		c.acked(optSetMetaContext, uint32(len(name)), name, uint32(1), uint32(len(contextName)), contextName)
	}
	c.acked(optGo, uint32(len(name)), name, uint16(1), uint16(infoBlockSize))
	return c
}

// request sends a request and returns its cookie.
func (c *client) request(cmd, flags uint16, off, length uint64, data []byte) uint64 {
	c.t.Helper()
	c.nextWord++
	if c.mode == extended {
		if data != nil {
			flags |= cmdFlagPayloadLen
		}
		c.send(uint32(magicExtended), flags, cmd, c.nextWord, off, length, data)
	} else {
		c.send(uint32(magicRequest), flags, cmd, c.nextWord, off, uint32(length), data)
	}
	return c.nextWord
}

// result is the reply to a request.
type result struct {
	cookie uint64
	errno  unix.Errno
	kind   uint16 // of the chunk
	off    uint64 // of the header, with extended headers
	data   []byte // of the chunk
}

// result takes the next reply; n is what a simple reply to a read has. The pieces of a reply are put together, if nothing comes in between.
func (c *client) result(n int) (r result) {
	c.t.Helper()
	var data []byte
	for done := false; !done; {
		if r, done = c.chunk(n); r.kind == chunkOffsetData {
			data = append(data, r.data...)
			r.data = data
		}
	}
	return r
}

// chunk takes the next chunk of a reply.
func (c *client) chunk(n int) (r result, done bool) {
	c.t.Helper()
	var length uint64
	var flags uint16
	switch magic := binary.BigEndian.Uint32(c.recv(4)); {
	case magic == magicSimple && c.mode == simple:
		h := c.recv(12)
		r.errno, r.cookie = unix.Errno(binary.BigEndian.Uint32(h)), binary.BigEndian.Uint64(h[4:])
		if r.errno == 0 {
			r.data = c.recv(n)
		}
		return r, true
	case magic == magicChunk && c.mode == structured:
		h := c.recv(16)
		r.kind, r.cookie, length = binary.BigEndian.Uint16(h[2:]), binary.BigEndian.Uint64(h[4:]), uint64(binary.BigEndian.Uint32(h[12:]))
		flags = binary.BigEndian.Uint16(h)
	case magic == magicExtReply && c.mode == extended:
		h := c.recv(28)
		flags = binary.BigEndian.Uint16(h)
		r.kind, r.cookie = binary.BigEndian.Uint16(h[2:]), binary.BigEndian.Uint64(h[4:])
		r.off, length = binary.BigEndian.Uint64(h[12:]), binary.BigEndian.Uint64(h[20:])
	default:
		c.t.Fatalf("magic %#x of a reply", magic)
	}
	r.data = c.recv(int(length))
	switch r.kind {
	case chunkError:
		r.errno = unix.Errno(binary.BigEndian.Uint32(r.data))
		if len(r.data) != 6+int(binary.BigEndian.Uint16(r.data[4:])) {
			c.t.Fatalf("error chunk %x", r.data)
		}
	case chunkOffsetData:
		r.data = r.data[8:]
	}
	if flags&^chunkDone != 0 {
		c.t.Fatalf("chunk flags %#x", flags)
	}
	return r, flags == chunkDone
}

// do is request and result.
func (c *client) do(cmd, flags uint16, off, length uint64, data []byte) result {
	c.t.Helper()
	cookie := c.request(cmd, flags, off, length, data)
	n := 0
	if cmd == cmdRead {
		n = int(length)
	}
	r := c.result(n)
	if r.cookie != cookie || c.mode == extended && r.off != off {
		c.t.Fatalf("reply to %d at %d, want %d at %d", r.cookie, r.off, cookie, off)
	}
	return r
}
