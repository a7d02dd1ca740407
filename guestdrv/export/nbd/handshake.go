package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// maxOptions bounds a handshake: more than a client needs that asks about each of a thousand exports.
const maxOptions = 10_000

// handshakes is how many times Config.Handshake all of a handshake may take.
const handshakes = 6

var (
	errAborted = fmt.Errorf("the client ended the handshake: %w", io.EOF)
	errTooMany = errors.New("too many options")
)

// handshake runs the first phase of the protocol. Afterwards the client has an export.
func (c *conn) handshake() error {
	var hello []byte
	hello = binary.BigEndian.AppendUint64(hello, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	c.limit = time.Now().Add(handshakes * c.s.cfg.Handshake)
	c.patience()
	if _, err := c.f.Write(hello); err != nil {
		return err
	}
	flags, err := c.in.Peek(4)
	if err != nil {
		return err
	}
	f := binary.BigEndian.Uint32(flags)
	if f&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("unknown client flags %#x", f)
	}
	c.fixed, c.noZeroes = f&flagFixedNewstyle != 0, f&flagNoZeroes != 0
	if _, err := c.in.Discard(4); err != nil {
		return err
	}
	for range maxOptions {
		c.patience()
		ready, err := c.option()
		if err != nil || ready {
			return err
		}
	}
	return errTooMany
}

// patience sets the deadline for what comes next.
func (c *conn) patience() {
	d := time.Now().Add(c.s.cfg.Handshake)
	if d.After(c.limit) {
		d = c.limit
	}
	_ = c.f.SetDeadline(d)
}

// option reads one option and answers it. It reports whether the client has its export.
func (c *conn) option() (ready bool, err error) {
	h, err := c.in.Peek(optionHeader)
	if err != nil {
		return false, err
	}
	if binary.BigEndian.Uint64(h) != magicOption {
		return false, errors.New("what comes is no NBD option")
	}
	opt, n := binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[12:])
	if _, err := c.in.Discard(optionHeader); err != nil {
		return false, err
	}
	if n > maxOption {
		if n > skipOption || opt == optExportName {
			return false, fmt.Errorf("option %d of %d bytes", opt, n)
		}
		if _, err := c.in.Discard(int(n)); err != nil {
			return false, err
		}
		return false, c.refuse(opt, repErrTooBig, "more than 64 KiB of data")
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.in, data); err != nil {
		return false, err
	}
	switch {
	case opt == optAbort:
		_ = c.answer(opt, repAck, nil) // it may be gone already
		return false, errAborted
	case opt == optExportName:
		return true, c.exportName(string(data))
	case !c.fixed:
		return false, fmt.Errorf("option %d of a client that does not know fixed newstyle", opt)
	case c.s.closing.Load():
		return false, c.refuse(opt, repErrShutdown, errClosing.Error())
	}
	return c.haggle(opt, data)
}

// answer sends a reply to an option.
func (c *conn) answer(opt, kind uint32, data []byte) error {
	b := make([]byte, 0, 20+len(data))
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := c.f.Write(append(b, data...))
	return err
}

// refuse is answer with an error and what a person can read of it.
func (c *conn) refuse(opt, kind uint32, why string) error { return c.answer(opt, kind, []byte(why)) }

// exportName is the old way to choose an export: there are no errors but hanging up.
func (c *conn) exportName(name string) error {
	ex := c.s.find(name)
	switch {
	case c.extended:
		return errors.New("NBD_OPT_EXPORT_NAME after extended headers")
	case c.s.closing.Load():
		return errClosing
	case ex == nil:
		return fmt.Errorf("no export %q", name)
	case ex.Disk.BlockSize() > 512 && !c.s.cfg.AnyBlockSize:
		return fmt.Errorf("export %q has blocks of %d bytes, and the client cannot ask for that", name, ex.Disk.BlockSize())
	}
	c.choose(ex)
	b := binary.BigEndian.AppendUint64(nil, uint64(c.size))
	b = binary.BigEndian.AppendUint16(b, c.transmissionFlags(ex))
	if !c.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err := c.f.Write(b)
	return err
}

// choose makes ex the client's export.
func (c *conn) choose(ex *exported) {
	c.ex, c.size, c.mask = ex, ex.Disk.Size(), uint64(ex.Disk.BlockSize()-1)
	if c.hasMeta && c.s.find(c.meta) != ex {
		c.hasMeta = false // selected for another one
	}
}

// transmissionFlags are what the client may do with ex.
func (c *conn) transmissionFlags(ex *exported) uint16 {
	// Any number of connections: a controller's Flush makes durable what was written through any of its queues, and there is no cache here.
	f := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn)
	if ex.ReadOnly || ex.Disk.ReadOnly() {
		f |= flagReadOnly
	}
	// Write Zeroes works on any disk, if need be by writing zeroes, and says at once when it would be that.
	f |= flagSendWriteZeroes | flagSendFastZero
	if ex.caps.Discard {
		f |= flagSendTrim
	}
	if c.structured || c.extended {
		f |= flagSendDF
	}
	return f
}
