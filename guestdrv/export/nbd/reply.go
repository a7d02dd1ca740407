package nbd

import (
	"encoding/binary"
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// batch is how many replies are written with one system call at most.
const batch = 64

// Every reply is a head, which is in the request, and perhaps a body.

// ok makes the reply of a command without data.
func (r *request) ok() {
	switch c := r.c; {
	case c.structured || c.extended:
		r.chunk(chunkNone, 0)
	default:
		r.simple(0)
	}
	r.send(nil)
}

// okData makes the reply of a read, or its first piece.
func (r *request) okData(data []byte) {
	r.at = 0
	r.piece(data)
	r.send(data)
}

// okStatus makes the reply of a block status; data is the chunk.
func (r *request) okStatus(data []byte) {
	kind := uint16(chunkBlockStatus)
	if r.c.extended {
		kind = chunkBlockStatusExt
	}
	r.chunk(kind, len(data))
	r.send(data)
}

// fail makes the reply of a command that failed. why is for people.
func (r *request) fail(e unix.Errno, why string) {
	if !r.c.structured && !r.c.extended {
		r.simple(e)
		r.send(nil)
		return
	}
	r.errorChunk(e, why)
	r.send(r.body)
}

func (r *request) errorChunk(e unix.Errno, why string) {
	why = why[:min(len(why), 512)]
	r.chunk(chunkError, 6+len(why))
	r.put32(uint32(e))
	r.head = binary.BigEndian.AppendUint16(r.head, uint16(len(why)))
	r.body = []byte(why)
}

func (r *request) put32(v uint32) { r.head = binary.BigEndian.AppendUint32(r.head, v) }
func (r *request) put64(v uint64) { r.head = binary.BigEndian.AppendUint64(r.head, v) }

func (r *request) simple(e unix.Errno) {
	r.head = r.space[:0]
	r.put32(magicSimple)
	r.put32(uint32(e))
	r.put64(r.cookie)
}

// chunk begins a chunk of a reply, the last one unless r.more.
func (r *request) chunk(kind uint16, n int) {
	flags := uint32(chunkDone)
	if r.more {
		flags = 0
	}
	r.head = r.space[:0]
	if !r.c.extended {
		r.put32(magicChunk)
		r.put32(flags<<16 | uint32(kind))
		r.put64(r.cookie)
		r.put32(uint32(n))
		return
	}
	r.put32(magicExtReply)
	r.put32(flags<<16 | uint32(kind))
	r.put64(r.cookie)
	r.put64(r.off)
	r.put64(uint64(n))
}

// send puts the reply in the line. If nobody writes, the caller does, until there is nothing left: replies that come meanwhile are
// written together.
func (r *request) send(body []byte) {
	c := r.c
	r.body, r.next = body, nil
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == nil {
		c.first = r
	} else {
		c.last.next = r
	}
	c.last = r
	if c.writing {
		return
	}
	c.writing = true
	if len(c.free) < slots-2 {
		// Others are under way: those whose requests have ended with this one put their replies in the line first.
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	for c.first != nil {
		list, last, n := c.take()
		if c.dead == nil {
			c.mu.Unlock()
			err := c.writeAll(list)
			if err == nil && last.more {
				if err = last.rest(c.ex.Disk); err != nil {
					c.f.Close() // in the midst of a reply
				}
			}
			c.mu.Lock()
			if err != nil {
				c.die(err)
			}
		}
		c.release(list, n)
	}
	c.writing = false
}

// take takes the next replies out of the line. One with more pieces is the last of them.
func (c *conn) take() (list, last *request, n int) {
	list = c.first
	last = list
	for n = 1; n < batch && last.next != nil && !last.more; n++ {
		last = last.next
	}
	c.first = last.next
	last.next = nil
	return list, last, n
}

// release gives back what the requests had. It is called with the lock.
func (c *conn) release(list *request, n int) {
	for ; n > 0; n-- {
		r := list
		list = r.next
		if r.buf != nil {
			c.memory -= len(r.buf.mem)
			c.s.bufs.put(r.buf)
			r.buf = nil
		}
		r.body, r.next, r.more = nil, nil, false
		c.free <- r
	}
	c.room.Broadcast()
}

func (c *conn) writeAll(list *request) error {
	v := c.iov[:0]
	add := func(p []byte) {
		if len(p) > 0 {
			v = append(v, unix.Iovec{Base: &p[0]})
			v[len(v)-1].SetLen(len(p))
		}
	}
	for r := list; r != nil; r = r.next {
		add(r.head)
		add(r.body)
	}
	c.pending, c.writeErr = v, nil
	err := c.raw.Write(c.write)
	c.pending = nil
	if err == nil {
		err = c.writeErr
	}
	return err
}

// tryWrite writes what is pending. It returns false when the socket is full.
func (c *conn) tryWrite(fd uintptr) bool {
	for len(c.pending) > 0 {
		n, err := writev(fd, c.pending)
		switch {
		case err == nil:
			c.pending = advance(c.pending, n)
		case errors.Is(err, unix.EAGAIN):
			return false
		case !errors.Is(err, unix.EINTR):
			c.writeErr = err
			return true
		}
	}
	return true
}
