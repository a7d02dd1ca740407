package nbd

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// haggle answers the options that have replies.
func (c *conn) haggle(opt uint32, data []byte) (ready bool, err error) {
	switch opt {
	case optList:
		if len(data) > 0 {
			return false, c.refuse(opt, repErrInvalid, "NBD_OPT_LIST has no data")
		}
		return false, c.listExports()
	case optInfo, optGo:
		return c.info(opt, data)
	case optStructuredReply:
		switch {
		case len(data) > 0:
			return false, c.refuse(opt, repErrInvalid, "NBD_OPT_STRUCTURED_REPLY has no data")
		case c.extended:
			return false, c.refuse(opt, repErrExtHeaderReqd, "there are extended headers already")
		}
		c.structured = true
		return false, c.answer(opt, repAck, nil)
	case optExtendedHeaders:
		if len(data) > 0 {
			return false, c.refuse(opt, repErrInvalid, "NBD_OPT_EXTENDED_HEADERS has no data")
		}
		c.extended = true
		return false, c.answer(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		return false, c.metaContext(opt, data)
	case optStartTLS:
		if len(data) > 0 {
			return false, c.refuse(opt, repErrInvalid, "NBD_OPT_STARTTLS has no data")
		}
		return false, c.refuse(opt, repErrUnsup, "no TLS: the socket's mode says who may connect")
	}
	return false, c.refuse(opt, repErrUnsup, fmt.Sprintf("option %d is not known here", opt))
}

func (c *conn) listExports() error {
	for _, ex := range c.s.list() {
		b := putString(nil, ex.Name)
		if err := c.answer(optList, repServer, append(b, ex.Description...)); err != nil {
			return err
		}
	}
	return c.answer(optList, repAck, nil)
}

func putString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// parser takes fields from an option's data. After a field that is not there bad is set, and all are zero.
type parser struct {
	data []byte
	bad  bool
}

func (p *parser) take(n uint32) []byte {
	if p.bad || uint64(n) > uint64(len(p.data)) {
		p.bad = true
		return nil
	}
	out := p.data[:n]
	p.data = p.data[n:]
	return out
}

func (p *parser) u16() uint16 {
	if b := p.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (p *parser) u32() uint32 {
	if b := p.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// text takes a length and a string of it.
func (p *parser) text() string {
	n := p.u32()
	if n > maxName {
		p.bad = true
	}
	return string(p.take(n))
}

// info answers NBD_OPT_INFO and NBD_OPT_GO.
func (c *conn) info(opt uint32, data []byte) (ready bool, err error) {
	p := parser{data: data}
	name := p.text()
	asked := map[uint16]bool{}
	for range p.u16() {
		asked[p.u16()] = true
	}
	if p.bad || len(p.data) > 0 {
		return false, c.refuse(opt, repErrInvalid, "the lengths in it do not fit")
	}
	ex := c.s.find(name)
	if ex == nil {
		return false, c.refuse(opt, repErrUnknown, fmt.Sprintf("no export %q: names are namespace identifiers, such as 1", name))
	}
	size := ex.Disk.Size() // once, so that GO says and does the same
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	b = binary.BigEndian.AppendUint16(b, c.transmissionFlags(ex))
	replies := [][]byte{b}
	if asked[infoName] || ex.Name != name {
		replies = append(replies, append(binary.BigEndian.AppendUint16(nil, infoName), ex.Name...))
	}
	if asked[infoDescription] && ex.Description != "" {
		replies = append(replies, append(binary.BigEndian.AppendUint16(nil, infoDescription), ex.Description...))
	}
	block := ex.Disk.BlockSize()
	b = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, uint32(block))
	b = binary.BigEndian.AppendUint32(b, uint32(max(block, 4096)))
	replies = append(replies, binary.BigEndian.AppendUint32(b, maxPayload))
	for _, b := range replies {
		if err := c.answer(opt, repInfo, b); err != nil {
			return false, err
		}
	}
	if block > 512 && !asked[infoBlockSize] && !c.s.cfg.AnyBlockSize {
		return false, c.refuse(opt, repErrBlockSizeReqd, fmt.Sprintf("blocks have %d bytes: ask for NBD_INFO_BLOCK_SIZE", block))
	}
	if opt == optGo {
		c.choose(ex)
		c.size = size
	}
	return opt == optGo, c.answer(opt, repAck, nil)
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (c *conn) metaContext(opt uint32, data []byte) error {
	set := opt == optSetMetaContext
	if set {
		c.hasMeta = false
	}
	if !c.structured && !c.extended {
		return c.refuse(opt, repErrInvalid, "structured replies come first")
	}
	p := parser{data: data}
	name := p.text()
	queries := p.u32()
	match := queries == 0 && !set
	for i := uint32(0); i < queries && !p.bad; i++ {
		q := p.text()
		match = match || q == contextName || q == contextBase && !set
		if !p.bad && !strings.Contains(q, ":") {
			p.bad = true
		}
	}
	if p.bad || len(p.data) > 0 {
		return c.refuse(opt, repErrInvalid, "the lengths in it do not fit, or a query has no colon")
	}
	if c.s.find(name) == nil {
		return c.refuse(opt, repErrUnknown, fmt.Sprintf("no export %q", name))
	}
	if match {
		id := uint32(0)
		if set {
			id = contextID
			c.meta, c.hasMeta = name, true
		}
		if err := c.answer(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextName...)); err != nil {
			return err
		}
	}
	return c.answer(opt, repAck, nil)
}
