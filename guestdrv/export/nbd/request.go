package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// request is one slot of a connection, and what is in it.
type request struct {
	c      *conn
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	length uint64
	buf    *buffer // payload; nil: none
	big            // of requests with more data than maxPayload

	// The reply.
	space [extendedHeader + 8]byte
	head  []byte // in space
	body  []byte
	next  *request
}

var errMagic = errors.New("what comes is no NBD request")

// next reads a request into r and sets it going, or answers it.
func (c *conn) next(r *request) (disconnect bool, err error) {
	if err := c.header(r); err != nil {
		return false, err
	}
	if r.cmd == cmdDisc {
		return true, nil
	}
	if c.s.closing.Load() {
		c.hush()
	}
	payload := c.payload(r)
	errno, why := c.check(r)
	if errno != 0 || r.cmd != cmdWrite && payload > 0 {
		if payload > mostPayload {
			return false, fmt.Errorf("a request with %d bytes of data", payload)
		}
		if _, err := c.in.Discard(int(payload)); err != nil {
			return false, err
		}
		if errno == 0 {
			errno, why = unix.EINVAL, "this command has no payload"
		}
		c.s.log.Debug("request refused", "command", r.cmd, "flags", r.flags, "offset", r.off, "length", r.length, "errno", errno, "reason", why)
		r.fail(errno, why)
		return false, nil
	}
	switch r.cmd {
	case cmdRead, cmdWrite:
		if payload > maxPayload {
			return false, c.bigWrite(r)
		}
		r.take(int(min(r.length, maxPayload)))
	case cmdBlockStatus:
		r.take(statusSize)
	}
	if payload > 0 {
		if _, err := io.ReadFull(c.in, r.buf.mem[:payload]); err != nil {
			return false, err
		}
	}
	c.start(r)
	return false, nil
}

// take gives r a buffer of at least n bytes.
func (r *request) take(n int) {
	r.c.charge(sizeOf(classOf(n)))
	r.buf = r.c.s.bufs.get(n)
}

// header reads the next request's header.
func (c *conn) header(r *request) error {
	n, magic := requestHeader, uint32(magicRequest)
	if c.extended {
		n, magic = extendedHeader, magicExtended
	}
	c.src.waited = false
	h, err := c.in.Peek(n)
	if !c.src.waited {
		c.lone = 0 // it did not wait for the reply to what came before
	}
	if err != nil {
		if len(h) > 0 && errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if binary.BigEndian.Uint32(h) != magic {
		return errMagic
	}
	r.flags, r.cmd = binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
	r.cookie, r.off = binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint64(h[16:])
	if c.extended {
		r.length = binary.BigEndian.Uint64(h[24:])
	} else {
		r.length = uint64(binary.BigEndian.Uint32(h[24:]))
	}
	_, err = c.in.Discard(n)
	return err
}

// payload returns how many bytes of data follow the header. QEMU's client sends the data of a write also where it does not set the flag that
// extended headers demand for it.
func (c *conn) payload(r *request) uint64 {
	if r.cmd == cmdWrite || c.extended && r.flags&cmdFlagPayloadLen != 0 {
		return r.length
	}
	return 0
}

// allowed are the flags of each command; FUA is allowed with all.
var allowed = [...]uint16{
	cmdRead:        cmdFlagDF,
	cmdWrite:       0,
	cmdFlush:       0,
	cmdTrim:        0,
	cmdWriteZeroes: cmdFlagNoHole | cmdFlagFastZero,
	cmdBlockStatus: cmdFlagReqOne,
}

// check says whether a request may be executed.
func (c *conn) check(r *request) (unix.Errno, string) {
	if c.ex.gone.Load() {
		return unix.ESHUTDOWN, "the namespace is gone"
	}
	if c.s.closing.Load() {
		return unix.ESHUTDOWN, errClosing.Error()
	}
	caps := &c.ex.caps
	switch r.cmd {
	case cmdRead, cmdWrite, cmdFlush, cmdWriteZeroes:
	case cmdTrim:
		if !caps.Discard {
			return unix.EINVAL, "the disk cannot discard"
		}
	case cmdBlockStatus:
		if !c.hasMeta {
			return unix.EINVAL, "no metadata context was selected for this export"
		}
	default:
		return unix.EINVAL, "unknown command"
	}
	if errno, why := c.checkFlags(r); errno != 0 {
		return errno, why
	}
	if r.cmd == cmdFlush {
		return 0, ""
	}
	return c.checkRange(r)
}

func (c *conn) checkFlags(r *request) (unix.Errno, string) {
	flags := r.flags &^ cmdFlagFUA
	if c.extended && r.cmd == cmdWrite {
		flags &^= cmdFlagPayloadLen
	}
	if flags&^allowed[r.cmd] != 0 || flags&cmdFlagDF != 0 && !c.structured && !c.extended {
		return unix.EINVAL, "flag that this command does not have"
	}
	return 0, ""
}

func (c *conn) checkRange(r *request) (unix.Errno, string) {
	writes := r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes
	if writes && c.readOnly() {
		return unix.EPERM, "the export is read-only"
	}
	if r.length == 0 || (r.off|r.length)&c.mask != 0 {
		return unix.EINVAL, "offset and length must be multiples of the block size, and the length not 0"
	}
	if size := uint64(min(c.size, c.ex.Disk.Size())); r.off > size || r.length > size-r.off {
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			return unix.ENOSPC, "beyond the end"
		}
		return unix.EINVAL, "beyond the end"
	}
	if r.cmd == cmdRead || r.cmd == cmdWrite {
		return c.checkLength(r)
	}
	return 0, ""
}

// checkLength is about payload.
func (c *conn) checkLength(r *request) (unix.Errno, string) {
	most := uint64(mostPayload)
	if r.flags&cmdFlagDF != 0 {
		most = maxPayload
	}
	switch {
	case r.length <= most:
		return 0, ""
	case r.cmd == cmdRead && (c.structured || c.extended):
		return unix.EOVERFLOW, "more data than the maximum payload"
	}
	return unix.EINVAL, "more data than the maximum payload"
}

func (c *conn) readOnly() bool { return c.ex.ReadOnly || c.ex.Disk.ReadOnly() }
