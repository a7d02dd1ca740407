package memdisk

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv/export"
)

var (
	_ export.Disk        = (*Disk)(nil)
	_ export.Capable     = (*Disk)(nil)
	_ export.Deallocator = (*Disk)(nil)
	_ export.Mapper      = (*Disk)(nil)
	_ export.Memory      = (*Disk)(nil)
)

func TestDisk(t *testing.T) {
	ctx := context.Background()
	d := New(8, 512)
	if c := export.CapsOf(d); c != (export.Caps{Discard: true, Zeroes: true, Deallocate: true, Cache: true, Map: true, ReadsZeroes: true}) {
		t.Errorf("%+v", c)
	}
	data := bytes.Repeat([]byte{7}, 1024)
	if n, err := d.WriteFUA(ctx, data, 512); n != 1024 || err != nil {
		t.Fatal(n, err)
	}
	if err := d.Discard(ctx, 1024, 512); err != nil {
		t.Fatal(err)
	}
	var got []int64
	err := d.Extents(ctx, 0, 4096, func(n int64, allocated bool) bool {
		if allocated {
			n = -n
		}
		got = append(got, n)
		return true
	})
	if err != nil || len(got) != 3 || got[0] != 512 || got[1] != -512 || got[2] != 3072-512+512 {
		t.Errorf("%v, %v", got, err)
	}
	p := make([]byte, 1536)
	if _, err := d.ReadAtContext(ctx, p, 0); err != nil || p[512] != 7 || p[1024] != 0 {
		t.Errorf("%v %v %v", p[512], p[1024], err)
	}
	if err := d.WriteZeroes(ctx, 100, 512); err == nil {
		t.Error("an odd offset was taken")
	}
	failure := errors.New("no")
	d.Before = func(context.Context, Op, int64, int64) error { return failure }
	if err := d.Flush(ctx); err != failure || d.Count[Flush].Load() != 1 {
		t.Error(err)
	}
	d.Resize(4)
	if d.Size() != 2048 {
		t.Error(d.Size())
	}
}
