package nbd

import (
	"io"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/guestdrv/export"
)

// Clients that do not ask how much a request may have send more than one buffer holds: Linux up to 1280 KiB. It is moved in pieces, so that it takes no
// more memory than other requests.
//
// A write's pieces are requests of their own, in slots of their own, without replies; the last of them to end answers for all. A read's pieces are
// read and written one after the other by whoever writes replies: nothing may come between them where replies are simple.

// big is what a request has for that.
type big struct {
	parent *request     // of a piece
	pieces atomic.Int32 // of a write: that have not ended, and one more until all have been started
	failed error        // of a write: why one of them failed; guarded by conn.mu
	at     uint64       // of a read: where its next piece is, relative to its start
	more   bool         // of a read: it has pieces that come after what is in body
}

// bigWrite takes in a write piece by piece.
func (c *conn) bigWrite(r *request) error {
	r.pieces.Store(1)
	for at := uint64(0); at < r.length; at += maxPayload {
		p := <-c.free
		p.parent, p.cmd, p.flags, p.off, p.length = r, r.cmd, r.flags, r.off+at, min(r.length-at, maxPayload)
		p.take(int(p.length))
		if _, err := io.ReadFull(c.in, p.buf.mem[:p.length]); err != nil {
			c.s.bufs.put(p.buf)
			return err
		}
		r.pieces.Add(1)
		c.hand(p)
	}
	r.pieceEnded(nil)
	return nil
}

// endPiece is the end of a piece of a write.
func (r *request) endPiece(err error) {
	c, parent := r.c, r.parent
	r.parent = nil
	c.mu.Lock()
	r.next = nil
	c.release(r, 1)
	c.mu.Unlock()
	parent.pieceEnded(err)
}

func (r *request) pieceEnded(err error) {
	c := r.c
	if err != nil {
		c.mu.Lock()
		r.failed = err
		c.mu.Unlock()
	}
	if r.pieces.Add(-1) > 0 {
		return
	}
	err, r.failed = r.failed, nil
	if err != nil {
		r.fail(r.errno(err), err.Error())
		return
	}
	r.ok()
}

// rest sends what is left of a read whose first piece has been written, and so has the head of a simple reply. An error ends the
// connection: of a simple reply there is no other way to say that it fails.
func (r *request) rest(d export.Disk) error {
	c := r.c
	for r.more {
		n := min(r.length-r.at, maxPayload)
		piece := r.buf.mem[:n]
		if _, err := d.ReadAtContext(c.s.ctx, piece, int64(r.off+r.at)); err != nil {
			r.more = false
			r.lose()
			if !c.structured && !c.extended {
				return err
			}
			c.s.log.Debug("request failed", "command", r.cmd, "offset", r.off+r.at, "length", n, "error", err)
			r.errorChunk(r.errno(err), err.Error())
			return c.writeAll(r)
		}
		r.piece(piece)
		if err := c.writeAll(r); err != nil {
			return err
		}
	}
	return nil
}

// piece makes the next part of a read's reply.
func (r *request) piece(data []byte) {
	r.more = r.at+uint64(len(data)) < r.length
	r.body = data
	switch c := r.c; {
	case c.structured || c.extended:
		r.chunk(chunkOffsetData, 8+len(data))
		r.put64(r.off + r.at)
	case r.at == 0:
		r.simple(0)
	default:
		r.head = r.space[:0]
	}
	r.at += uint64(len(data))
}
