package nbd

import (
	"encoding/binary"
	"io"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
)

// BenchmarkRead is what a read of 4 KiB costs here, client and socket included, on a disk that costs nothing: alone, and with others under way.
func BenchmarkRead(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(map[int]string{1: "alone", 32: "32 at a time"}[depth], func(b *testing.B) {
			s := serve(b, Config{Exports: []Export{{Name: "1", Disk: memdisk.New(64, 4096)}}})
			c := open(b, s, structured, "1")
			one := binary.BigEndian.AppendUint32(nil, magicRequest)
			one = append(one, make([]byte, 20)...)
			one = binary.BigEndian.AppendUint32(one, 4096)
			var requests []byte
			for range depth {
				requests = append(requests, one...)
			}
			replies := make([]byte, depth*(20+8+4096))
			if err := c.f.SetDeadline(time.Time{}); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(4096)
			b.ReportAllocs()
			for i := 0; i < b.N; i += depth {
				if _, err := c.f.Write(requests); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c.f, replies); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
