package nbd

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
)

// TestHandshakeBytes: a whole handshake and a read, byte for byte.
func TestHandshakeBytes(t *testing.T) {
	s, d := one(t, 512, nil)
	if _, err := d.WriteAtContext(t.Context(), bytes.Repeat([]byte{0xab}, 512), 512); err != nil {
		t.Fatal(err)
	}
	c := dial(t, s)
	step := func(send, want string) {
		t.Helper()
		unhex := func(s string) []byte {
			b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		c.send(unhex(send))
		if w := unhex(want); len(w) > 0 {
			if got := c.recv(len(w)); !bytes.Equal(got, w) {
				t.Fatalf("got\n%x, want\n%x", got, w)
			}
		}
	}
	step("", "4e42444d41474943 49484156454f5054 0003")
	step("00000003", "")
	// NBD_OPT_STRUCTURED_REPLY
	step("49484156454f5054 00000008 00000000", "0003e889045565a9 00000008 00000001 00000000")
	// NBD_OPT_GO of "1" with NBD_INFO_BLOCK_SIZE: export and block size, then the acknowledgement.
	step("49484156454f5054 00000007 00000009 00000001 31 0001 0003",
		"0003e889045565a9 00000007 00000003 0000000c 0000 0000000000400000 09ed"+
			"0003e889045565a9 00000007 00000003 0000000e 0003 00000200 00001000 00100000"+
			"0003e889045565a9 00000007 00000001 00000000")
	step("25609513 0000 0000 1122334455667788 0000000000000200 00000200",
		"668e33ef 0001 0001 1122334455667788 00000208 0000000000000200"+strings.Repeat("ab", 512))
	// A flush, and a write beyond the end: "beyond the end", ENOSPC.
	step("25609513 0000 0003 0000000000000001 0000000000000000 00000000", "668e33ef 0001 0000 0000000000000001 00000000")
	step("25609513 0000 0001 0000000000000002 0000000000400000 00000200"+strings.Repeat("00", 512),
		"668e33ef 0001 8001 0000000000000002 00000014 0000001c 000e"+hex.EncodeToString([]byte("beyond the end")))
	step("25609513 0000 0002 0000000000000003 0000000000000000 00000000", "")
	c.expectEnd()
}

func TestOptions(t *testing.T) {
	d := memdisk.New(64, 4096)
	s := serve(t, Config{Exports: []Export{{Name: "1", Disk: memdisk.New(64, 512)}, {Name: "7", Description: "large blocks", Disk: d, ReadOnly: true}}})
	c := dial(t, s)
	c.greet(3)
	for _, o := range []struct {
		name string
		opt  uint32
		data []any
		want uint32
	}{
		{"unknown option", 99, []any{"hello"}, repErrUnsup},
		{"list with data", optList, []any{"x"}, repErrInvalid},
		{"TLS", optStartTLS, nil, repErrUnsup},
		{"TLS with data", optStartTLS, []any{"x"}, repErrInvalid},
		{"meta context before structured replies", optSetMetaContext, []any{uint32(0), uint32(0)}, repErrInvalid},
		{"structured with data", optStructuredReply, []any{"x"}, repErrInvalid},
		{"structured", optStructuredReply, nil, repAck},
		{"info of nothing", optInfo, []any{uint32(1), "2", uint16(0)}, repErrUnknown},
		{"info cut short", optInfo, []any{uint32(1)}, repErrInvalid},
		{"info whose name is longer than it", optInfo, []any{uint32(1 << 30), "1", uint16(0)}, repErrInvalid},
		{"info with fewer requests than said", optInfo, []any{uint32(1), "1", uint16(9), uint16(0)}, repErrInvalid},
		{"info with more", optInfo, []any{uint32(1), "1", uint16(0), uint16(0)}, repErrInvalid},
		{"info", optInfo, []any{uint32(0), uint16(0)}, repAck},
		{"info of blocks of 4096 that were not asked for", optInfo, []any{uint32(1), "7", uint16(1), uint16(infoName)}, repErrBlockSizeReqd},
		{"go, likewise", optGo, []any{uint32(1), "7", uint16(0)}, repErrBlockSizeReqd},
		{"info of blocks of 4096", optInfo, []any{uint32(1), "7", uint16(1), uint16(infoBlockSize)}, repAck},
		{"meta context of nothing", optListMetaContext, []any{uint32(1), "2", uint32(0)}, repErrUnknown},
		{"meta context cut short", optSetMetaContext, []any{uint32(1), "1", uint32(2), uint32(5), "base:"}, repErrInvalid},
		{"meta context without a colon", optSetMetaContext, []any{uint32(1), "1", uint32(1), uint32(4), "base"}, repErrInvalid},
		{"four billion queries", optSetMetaContext, []any{uint32(1), "1", uint32(1<<32 - 1)}, repErrInvalid},
		{"too big", 99, []any{make([]byte, maxOption+1)}, repErrTooBig},
		{"extended headers with data", optExtendedHeaders, []any{"x"}, repErrInvalid},
		{"extended headers", optExtendedHeaders, nil, repAck},
		{"structured after that", optStructuredReply, nil, repErrExtHeaderReqd},
	} {
		c.option(o.opt, o.data...)
		if got := c.final(o.opt); got != o.want {
			t.Errorf("%s: %#x, want %#x", o.name, got, o.want)
		}
	}

	c.option(optList)
	var names []string
	for {
		kind, data := c.reply(optList)
		if kind == repAck {
			break
		}
		n := binary.BigEndian.Uint32(data)
		names = append(names, string(data[4:4+n])+"="+string(data[4+n:]))
	}
	if !slices.Equal(names, []string{"1=", "7=large blocks"}) {
		t.Errorf("exports %q", names)
	}

	c.option(optInfo, uint32(1), "7", uint16(3), uint16(infoName), uint16(infoDescription), uint16(infoBlockSize))
	infos := map[uint16]string{}
	for {
		kind, data := c.reply(optInfo)
		if kind != repInfo {
			break
		}
		infos[binary.BigEndian.Uint16(data)] = string(data[2:])
	}
	if infos[infoName] != "7" || infos[infoDescription] != "large blocks" || infos[infoBlockSize] != "\x00\x00\x10\x00\x00\x00\x10\x00\x00\x10\x00\x00" {
		t.Errorf("infos: %v", infos)
	}
	if e := infos[infoExport]; len(e) != 10 || e[9]&flagReadOnly == 0 {
		t.Errorf("export %x is not read-only", e)
	}

	for _, q := range []struct {
		opt     uint32
		queries []string
		want    bool
	}{
		{optListMetaContext, nil, true},
		{optListMetaContext, []string{"base:"}, true},
		{optListMetaContext, []string{"qemu:", "base:allocation"}, true},
		{optListMetaContext, []string{"qemu:", "base:other"}, false},
		{optSetMetaContext, nil, false},
		{optSetMetaContext, []string{"base:"}, false},
		{optSetMetaContext, []string{"x-y:z", "base:allocation"}, true},
	} {
		data := []any{uint32(1), "1", uint32(len(q.queries))}
		for _, s := range q.queries {
			data = append(data, uint32(len(s)), s)
		}
		c.option(q.opt, data...)
		got := false
		kind, reply := c.reply(q.opt)
		if kind == repMetaContext {
			got = string(reply[4:]) == contextName
			kind, _ = c.reply(q.opt)
		}
		if kind != repAck || got != q.want {
			t.Errorf("option %d, %q: %v, %#x", q.opt, q.queries, got, kind)
		}
	}
	c.acked(optAbort, "data is ignored")
	c.expectEnd()
}

func TestExportName(t *testing.T) {
	d := memdisk.New(64, 4096)
	for _, any := range []bool{false, true} {
		s := serve(t, Config{AnyBlockSize: any, Exports: []Export{{Name: "1", Disk: memdisk.New(64, 512)}, {Name: "2", Disk: d}}})
		c := dial(t, s)
		c.greet(1)
		c.option(optExportName) // the default
		if got := c.recv(8 + 2 + 124); binary.BigEndian.Uint64(got) != 32768 || !bytes.Equal(got[10:], make([]byte, 124)) {
			t.Errorf("%x", got)
		}
		if r := c.do(cmdRead, 0, 0, 512, nil); r.errno != 0 {
			t.Error(r.errno)
		}
		c = dial(t, s)
		c.greet(2) // no fixed newstyle, no zeroes
		c.option(optExportName, "2")
		if !any {
			c.expectEnd()
			continue
		}
		if got := c.recv(10); binary.BigEndian.Uint64(got) != 262144 {
			t.Errorf("%x", got)
		}
		if r := c.do(cmdRead, 0, 0, 512, nil); r.errno == 0 {
			t.Error("half a block was read")
		}
		if r := c.do(cmdRead, 0, 0, 4096, nil); r.errno != 0 {
			t.Error(r.errno)
		}
	}
}

// TestHandshakeOfNoClient: the server hangs up, at once or when its patience ends.
func TestHandshakeOfNoClient(t *testing.T) {
	s, _ := one(t, 512, func(c *Config) { c.Handshake = 2 * time.Second })
	for name, act := range map[string]func(c *client){
		"says nothing":                  func(c *client) {},
		"says half of its flags":        func(c *client) { c.send(uint16(0)) },
		"has unknown flags":             func(c *client) { c.send(uint32(4)) },
		"speaks HTTP":                   func(c *client) { c.send("GET / HTTP/1.1\r\nHost: disk\r\n\r\n") },
		"asks for no such export":       func(c *client) { c.send(uint32(3)); c.option(optExportName, "none") },
		"has a name without an end":     func(c *client) { c.send(uint32(3), "IHAVEOPT", uint32(optExportName), uint32(1<<32-1)) },
		"has an option without an end":  func(c *client) { c.send(uint32(3), "IHAVEOPT", uint32(optInfo), uint32(1<<31)) },
		"has half an option":            func(c *client) { c.send(uint32(3), "IHAVEOPT", uint32(optInfo), uint32(8), "1") },
		"does not know fixed newstyle":  func(c *client) { c.send(uint32(0)); c.option(optList) },
		"hangs up":                      func(c *client) { c.close() },
		"hangs up after half an option": func(c *client) { c.send(uint32(3), "IHAVEOPT"); c.close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, s)
			c.recv(18)
			act(c)
			if c.ended != nil {
				c.expectEnd()
			}
		})
	}
	// Extended headers exclude the option that has no errors.
	other, _ := one(t, 512, nil)
	c := dial(t, other)
	c.greet(3)
	c.acked(optExtendedHeaders)
	c.option(optExportName, "1")
	c.expectEnd()
}

// TestMetaContextIsOfOneExport: it counts only for the export that it was selected for.
func TestMetaContextIsOfOneExport(t *testing.T) {
	s := serve(t, Config{Exports: []Export{{Name: "1", Disk: memdisk.New(64, 512)}, {Name: "2", Disk: memdisk.New(64, 512)}}})
	for name, works := range map[string]bool{"1": true, "": true, "2": false} {
		c := dial(t, s)
		c.mode = structured
		c.greet(3)
		c.acked(optStructuredReply)
		c.acked(optSetMetaContext, uint32(1), "1", uint32(1), uint32(len(contextName)), contextName)
		c.acked(optGo, uint32(len(name)), name, uint16(0))
		if r := c.do(cmdBlockStatus, 0, 0, 512, nil); (r.errno == 0) != works {
			t.Errorf("export %q: %v", name, r.errno)
		}
	}
}
