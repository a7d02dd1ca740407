package nbd

import (
	"encoding/binary"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
)

// FuzzClient sends a server whatever comes to mind: it must not panic or hang, and must give all memory back.
func FuzzClient(f *testing.F) {
	option := func(b []byte, opt uint32, data string) []byte {
		b = binary.BigEndian.AppendUint64(b, magicOption)
		b = binary.BigEndian.AppendUint32(b, opt)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
	}
	request := func(b []byte, ext bool, cmd, flags uint16, off uint64, n uint32, data string) []byte {
		magic := uint32(magicRequest)
		if ext {
			magic = magicExtended
		}
		b = binary.BigEndian.AppendUint32(b, magic)
		b = binary.BigEndian.AppendUint16(b, flags)
		b = binary.BigEndian.AppendUint16(b, cmd)
		b = binary.BigEndian.AppendUint64(b, 1)
		b = binary.BigEndian.AppendUint64(b, off)
		if ext {
			b = binary.BigEndian.AppendUint32(b, 0)
		}
		return append(binary.BigEndian.AppendUint32(b, n), data...)
	}
	const (
		goOne = "\x00\x00\x00\x011\x00\x01\x00\x03"
		meta  = "\x00\x00\x00\x011\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation"
	)
	for _, ext := range []bool{false, true} {
		b := []byte{0, 0, 0, 3}
		b = option(b, optList, "")
		if b = option(b, optStructuredReply, ""); ext {
			b = option(b, optExtendedHeaders, "")
		}
		b = option(b, optListMetaContext, meta)
		b = option(b, optSetMetaContext, meta)
		b = option(b, optInfo, goOne)
		f.Add(append(option(b, optAbort, ""), "rest"...))
		b = option(b, optGo, goOne)
		b = request(b, ext, cmdRead, cmdFlagDF, 0, 4096, "")
		b = request(b, ext, cmdWrite, cmdFlagFUA, 512, 16, "0123456789abcdef")
		b = request(b, ext, cmdBlockStatus, cmdFlagReqOne, 0, 8192, "")
		b = request(b, ext, cmdWriteZeroes, cmdFlagNoHole, 512, 1<<31, "")
		b = request(b, ext, cmdTrim, 0, 512, 512, "")
		b = request(b, ext, cmdFlush, 0, 0, 0, "")
		b = request(b, ext, cmdDisc, 0, 0, 0, "")
		f.Add(b)
	}
	f.Add(append(option([]byte{0, 0, 0, 1}, optExportName, "1"), make([]byte, 100)...))
	f.Fuzz(func(t *testing.T, sent []byte) {
		d := memdisk.New(64, 512)
		s, err := New(Config{Exports: []Export{{Name: "1", Disk: d}}, Grace: within, Handshake: within})
		if err != nil {
			t.Fatal(err)
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		client, ended := os.NewFile(uintptr(fds[0]), "client"), make(chan error, 1)
		go func() { ended <- s.ServeConn(os.NewFile(uintptr(fds[1]), "server")) }()
		go func() {
			_, _ = client.Write(sent)
			_ = unix.Shutdown(fds[0], unix.SHUT_WR)
		}()
		_ = client.SetReadDeadline(time.Now().Add(within))
		got, err := io.Copy(io.Discard, client)
		if os.IsTimeout(err) {
			t.Fatal("the server does not hang up on a client that has")
		}
		<-ended
		client.Close()
		s.Close()
		if n := d.Lent.Load(); n != 0 {
			t.Errorf("%d buffers were not given back", n)
		}
		// Each byte that is sent can ask for no more than a request of the largest size can: what comes back is bounded by what was sent.
		if most := int64(len(sent)/requestHeader+1)*(mostPayload+64) + 1<<16; got > most {
			t.Errorf("%d bytes for %d", got, len(sent))
		}
	})
}
