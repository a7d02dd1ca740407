package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export"
)

// execute does what the request asks for, and answers it.
func (r *request) execute() {
	err := r.do(r.c.s.ctx, r.c.ex.Disk, &r.c.ex.caps)
	if err == nil {
		switch {
		case r.parent != nil:
			r.endPiece(nil)
		case r.cmd == cmdRead:
			r.okData(r.buf.mem[:min(r.length, maxPayload)])
		case r.cmd == cmdBlockStatus:
			r.okStatus(r.buf.mem[:r.length])
		default:
			r.ok()
		}
		return
	}
	if r.buf != nil {
		r.lose()
	}
	if r.parent != nil {
		r.endPiece(err)
		return
	}
	errno := r.errno(err)
	r.c.s.log.Debug("request failed", "command", r.cmd, "offset", r.off, "length", r.length, "errno", errno, "error", err)
	r.fail(errno, err.Error())
}

// lose gives the buffer up: after an error the device may still write to it.
func (r *request) lose() {
	b := r.buf
	r.buf = nil
	r.c.s.bufs.drop(b)
	r.c.mu.Lock()
	r.c.memory -= len(b.mem)
	r.c.room.Broadcast()
	r.c.mu.Unlock()
}

// errno returns the error of the protocol that says the most.
func (r *request) errno(err error) unix.Errno {
	if r.c.ex.gone.Load() {
		return unix.ESHUTDOWN
	}
	switch {
	case errors.Is(err, errNotFast):
		return unix.ENOTSUP
	case errors.Is(err, context.Canceled):
		return unix.ESHUTDOWN
	case errors.Is(err, io.EOF): // the disk has become smaller
		return unix.EINVAL
	}
	switch e := export.Errno(err); e {
	case unix.EPERM, unix.EIO, unix.ENOMEM, unix.EINVAL, unix.ENOSPC:
		return e
	case unix.ENODEV:
		return unix.ESHUTDOWN
	case unix.EDQUOT, unix.EFBIG:
		return unix.ENOSPC
	case unix.EOPNOTSUPP: // ENOTSUP has one meaning only
		return unix.EINVAL
	}
	return unix.EIO
}

var errNotFast = errors.New("the disk has no Write Zeroes: it would be a write like any other")

func (r *request) do(ctx context.Context, d export.Disk, caps *export.Caps) (err error) {
	off, length := int64(r.off), int64(r.length)
	switch r.cmd {
	case cmdRead:
		_, err = d.ReadAtContext(ctx, r.buf.mem[:min(length, maxPayload)], off)
		return err
	case cmdWrite:
		if r.flags&cmdFlagFUA != 0 {
			_, err = d.WriteFUA(ctx, r.buf.mem[:length], off)
		} else {
			_, err = d.WriteAtContext(ctx, r.buf.mem[:length], off)
		}
		return err
	case cmdBlockStatus:
		return r.status(ctx, d, caps)
	case cmdTrim:
		err = d.Discard(ctx, off, length)
	case cmdWriteZeroes:
		err = r.zeroes(ctx, d, caps)
	}
	if r.cmd != cmdFlush && (err != nil || r.flags&cmdFlagFUA == 0) || !caps.Cache {
		return err
	}
	return d.Flush(ctx)
}

// zeroes makes the range read as zeroes. Write Zeroes counts as fast: it moves no data.
func (r *request) zeroes(ctx context.Context, d export.Disk, caps *export.Caps) error {
	off, length := int64(r.off), int64(r.length)
	switch {
	case caps.Deallocate && r.flags&cmdFlagNoHole == 0:
		return d.(export.Deallocator).WriteZeroesDeallocate(ctx, off, length)
	case caps.Zeroes:
		return d.WriteZeroes(ctx, off, length)
	case r.flags&cmdFlagFastZero != 0:
		return errNotFast
	}
	zeroes := r.c.s.bufs.zeroes()
	for length > 0 {
		n := min(length, int64(len(zeroes)))
		if _, err := d.WriteAtContext(ctx, zeroes[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// statusSize is the memory for the answer to a block status: some hundred extents.
const statusSize = 8 << 10

// status asks for the state of the range and puts the answer's chunk into the buffer, and its size into length.
func (r *request) status(ctx context.Context, d export.Disk, caps *export.Caps) error {
	room := r.buf.mem[:statusSize]
	binary.BigEndian.PutUint32(room, contextID)
	n, each := 4, 8
	if r.c.extended {
		n, each = 8, 16
	}
	count := uint32(0)
	add := func(length int64, allocated bool) bool {
		state := uint32(0)
		if !allocated {
			state = stateHole
			if caps.ReadsZeroes {
				state |= stateZero
			}
		}
		if r.c.extended {
			binary.BigEndian.PutUint64(room[n:], uint64(length))
			binary.BigEndian.PutUint64(room[n+8:], uint64(state))
		} else {
			binary.BigEndian.PutUint32(room[n:], uint32(length))
			binary.BigEndian.PutUint32(room[n+4:], state)
		}
		n += each
		count++
		return r.flags&cmdFlagReqOne == 0 && n+each <= len(room)
	}
	if m, ok := d.(export.Mapper); ok && caps.Map {
		if err := m.Extents(ctx, int64(r.off), int64(r.length), add); err != nil {
			return err
		}
	} else {
		add(int64(r.length), true)
	}
	if count == 0 {
		return fmt.Errorf("the disk says nothing of the %d bytes at %d", r.length, r.off)
	}
	if r.c.extended {
		binary.BigEndian.PutUint32(room[4:], count)
	}
	r.length = uint64(n)
	return nil
}
