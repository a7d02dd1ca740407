package guestdrv_test

import (
	"errors"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestSGL(t *testing.T) {
	o := testOptions()
	o.SGL = true
	forAll(t, func(t *testing.T, v variant) {
		cfg := v.cfg
		cfg.SGLS = nvme.SGLSDwordAligned
		c := v.open(t, cfg, o)
		ns := namespace(t, c, 1)
		data := randomBytes(1<<20 + 8192)
		if _, err := ns.WriteAt(data, 4096); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(data))
		if _, err := ns.ReadAt(got, 4096); err != nil {
			t.Fatal(err)
		}
		mustEqual(t, got, data)
		if err := ns.Discard(ctx, 0, 4096); err != nil {
			t.Fatal(err)
		}

		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: true})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		buf, err := c.Alloc(64 << 10)
		if err != nil {
			t.Fatal(err)
		}
		defer buf.Free()
		for _, io := range []guestdrv.IO{
			{Op: nvme.IORead, NSID: 1, LBA: 8, Blocks: 8, IOVA: buf.IOVA()},
			{Op: nvme.IOFlush, NSID: 1},
			{Op: nvme.IORead, NSID: 1, LBA: 8, Blocks: 128, IOVA: buf.IOVA()},
			{Op: nvme.IOCompare, NSID: 1, LBA: 8, Blocks: 128, IOVA: buf.IOVA()},
		} {
			if _, err := p.Submit([]guestdrv.IO{io}); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(p.Publish(), p.Wait(ctx)); err != nil {
				t.Fatal(err)
			}
			var r [1]guestdrv.Result
			if n, err := p.Reap(r[:]); n != 1 || err != nil || !r[0].Status.OK() {
				t.Fatalf("%s: %d results, %v, %v", nvme.IOOpcodeName(io.Op), n, r[0].Status, err)
			}
		}
		mustEqual(t, buf.Bytes()[:64<<10], data[:64<<10])
	})
}

func TestSGLNotOffered(t *testing.T) {
	o := testOptions()
	o.SGL = true
	dev := nvmetest.New(nvmetest.Config{})
	defer dev.Close()
	if c, err := guestdrv.OpenDevice(ctx, dev.InProc(), o); !errors.Is(err, guestdrv.ErrUnsupported) {
		if err == nil {
			c.Close()
		}
		t.Errorf("open with SGLs of a controller that has none: %v", err)
	}
}
