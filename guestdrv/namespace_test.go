package guestdrv_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestReadBackWhatWasWritten(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		c := v.open(t, v.cfg, testOptions())
		if got := c.Doorbells(); got != v.want {
			t.Fatalf("doorbells %q, want %q", got, v.want)
		}
		ns := namespace(t, c, 1)
		for _, n := range []int{512, 4096, 8192, 12288, 128 << 10, 128<<10 + 512, 1<<20 + 4096, 5 << 20} {
			if testing.Short() && n > 2<<20 && v.name != variants[0].name {
				continue
			}
			data := randomBytes(n)
			off := int64(512 * (n % 7))
			if n, err := ns.WriteAt(data, off); n != len(data) || err != nil {
				t.Fatalf("write: %d, %v", n, err)
			}
			got := make([]byte, n)
			if n, err := ns.ReadAt(got, off); n != len(got) || err != nil {
				t.Fatalf("read: %d, %v", n, err)
			}
			mustEqual(t, got, data)
			mustEqual(t, c.dev.Disk(1)[off:off+int64(n)], data)
		}
		if err := ns.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	})
}

func TestBuffersAreNotCopied(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		c := v.open(t, v.cfg, testOptions())
		ns := namespace(t, c, 1)
		buf, err := c.Alloc(2<<20 + 512)
		if err != nil {
			t.Fatal(err)
		}
		defer buf.Free()
		// From the middle of a page, so that the PRPs begin with an offset.
		p := buf.Bytes()[512:]
		copy(p, randomBytes(len(p)))
		want := append([]byte(nil), p...)
		if _, err := ns.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		clear(p)
		if _, err := ns.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		mustEqual(t, p, want)
		mustEqual(t, c.dev.Disk(1)[:len(p)], want)
		// Not a multiple of 4: a bounce buffer after all.
		odd := buf.Bytes()[3 : 3+4096]
		if _, err := ns.ReadAt(odd, 0); err != nil {
			t.Fatal(err)
		}
		mustEqual(t, odd, want[:4096])
	})
}

func TestEndOfNamespace(t *testing.T) {
	c := openInProc(t, nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 10, LBADS: 12}}}, testOptions())
	ns := namespace(t, c, 1)
	if ns.Size() != 40960 || ns.BlockSize() != 4096 || ns.NSID() != 1 {
		t.Fatalf("size %d, block size %d", ns.Size(), ns.BlockSize())
	}
	p := make([]byte, 8192)
	for _, tc := range []struct {
		off int64
		n   int
		err error
	}{{32768, 8192, nil}, {36864, 4096, io.EOF}, {40960, 0, io.EOF}, {1 << 40, 0, io.EOF}} {
		if n, err := ns.ReadAt(p, tc.off); n != tc.n || err != tc.err {
			t.Errorf("read at %d: %d, %v", tc.off, n, err)
		}
	}
	if n, err := ns.WriteAt(p, 36864); n != 0 || !errors.Is(err, guestdrv.ErrRange) {
		t.Errorf("write over the end: %d, %v", n, err)
	}
	whole := make([]byte, ns.Size())
	if n, err := io.NewSectionReader(ns, 0, ns.Size()).Read(whole); n != len(whole) || err != nil {
		t.Errorf("section: %d, %v", n, err)
	}
	for _, off := range []int64{-4096, -1} {
		if _, err := ns.ReadAt(p, off); !errors.Is(err, guestdrv.ErrRange) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	if n, err := ns.ReadAt(nil, 0); n != 0 || err != nil {
		t.Errorf("empty read: %d, %v", n, err)
	}
}

func TestUnalignedSaysBlockSize(t *testing.T) {
	c := openInProc(t, nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 16, LBADS: 12}}}, testOptions())
	ns := namespace(t, c, 1)
	check := func(err error) {
		t.Helper()
		if !errors.Is(err, guestdrv.ErrUnaligned) || !strings.Contains(err.Error(), "4096 bytes") {
			t.Errorf("got %v", err)
		}
	}
	_, err := ns.ReadAt(make([]byte, 100), 0)
	check(err)
	_, err = ns.WriteAt(make([]byte, 4096), 512)
	check(err)
	check(ns.Discard(ctx, 0, 512))
	check(ns.WriteZeroes(ctx, 512, 4096))
}

func TestZeroesDiscardCompare(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		cfg := v.cfg
		cfg.Namespaces = []nvmetest.Namespace{{Blocks: 100000, LBADS: 9}}
		c := v.open(t, cfg, testOptions())
		ns := namespace(t, c, 1)
		data := randomBytes(64 << 10)
		if _, err := ns.WriteAt(data, 1<<20); err != nil {
			t.Fatal(err)
		}
		if err := ns.Compare(ctx, data, 1<<20); err != nil {
			t.Fatal(err)
		}
		data[5000]++
		err := ns.Compare(ctx, data, 1<<20)
		if nvme.StatusOf(err).Code() != nvme.StatusCompareFailure {
			t.Fatalf("compare of other data: %v", err)
		}
		var se *guestdrv.StatusError
		if !errors.As(err, &se) || se.Command.Opcode != nvme.IOCompare || se.Retriable() || !strings.Contains(err.Error(), "slba=0x800") {
			t.Fatalf("compare of other data: %v", err)
		}
		// More blocks than one command takes.
		if err := ns.WriteZeroes(ctx, 512, ns.Size()-512); err != nil {
			t.Fatal(err)
		}
		if _, err := ns.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		if err := ns.Discard(ctx, 0, 32<<10); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 128<<10)
		if _, err := ns.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		clear(data[:32<<10])
		mustEqual(t, got[:64<<10], data)
		mustEqual(t, got[64<<10:], make([]byte, 64<<10))
	})
}

func TestManyGoroutines(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		o := testOptions()
		o.DMASize = 2 << 20 // bounce memory runs short
		o.QueueDepth = 1    // and slots too, where the controller allows few
		cfg := v.cfg
		cfg.CAP = nvme.CAP(0).WithMQES(3).WithTO(2).WithCSS(nvme.CAPCSSNVM)
		c := v.open(t, cfg, o)
		ns := namespace(t, c, 1)
		const part = 192 << 10
		rounds := 4
		if testing.Short() {
			rounds = 1
		}
		var wg sync.WaitGroup
		for g := range 24 {
			wg.Go(func() {
				data, got := randomBytes(part), make([]byte, part)
				data[0] = byte(g)
				off := int64(g) * part
				for range rounds {
					if _, err := ns.WriteAt(data, off); err != nil {
						t.Error(err)
						return
					}
					if _, err := ns.ReadAt(got, off); err != nil {
						t.Error(err)
						return
					}
				}
				mustEqualGo(t, got, data)
			})
		}
		wg.Wait()
	})
}

func mustEqualGo(t *testing.T, got, want []byte) {
	if string(got) != string(want) {
		t.Error("data differs")
	}
}

func TestSmallTransfersSplitByMDTS(t *testing.T) {
	for _, mdts := range []uint8{1, 2, 5, 9, 0} {
		c := openInProc(t, nvmetest.Config{MDTS: mdts}, testOptions())
		if want := min(4096<<mdts, 1<<20); mdts != 0 && c.MaxTransfer() != want {
			t.Fatalf("MDTS %d: %d bytes", mdts, c.MaxTransfer())
		}
		ns := namespace(t, c, 1)
		buf, err := c.Alloc(3 << 20)
		if err != nil {
			t.Fatal(err)
		}
		want := randomBytes(3<<20 - 512)
		copy(buf.Bytes()[512:], want)
		if _, err := ns.WriteAt(buf.Bytes()[512:], 0); err != nil {
			t.Fatalf("MDTS %d: %v", mdts, err)
		}
		got := make([]byte, len(want))
		if _, err := ns.ReadAt(got, 0); err != nil {
			t.Fatalf("MDTS %d: %v", mdts, err)
		}
		mustEqual(t, got, want)
		buf.Free()
		c.Close()
	}
}

// TestErrorInTheMiddle checks that n counts what was done before the first block that failed.
func TestErrorInTheMiddle(t *testing.T) {
	cfg := nvmetest.Config{MDTS: 2}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 && cmd.SLBA() <= 100 && 100 < cmd.SLBA()+uint64(cmd.NLB().Count()) {
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusUnrecoveredRead.WithDNR()}
		}
		return nvmetest.Verdict{}
	}
	c := openInProc(t, cfg, testOptions())
	ns := namespace(t, c, 1)
	c.dev.Fill(1, randomBytes(8<<20))
	p := make([]byte, 256<<10)
	n, err := ns.ReadAt(p, 0)
	if nvme.StatusOf(err).Code() != nvme.StatusUnrecoveredRead || n != 96*512 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	mustEqual(t, p[:n], c.dev.Disk(1)[:n])
	if n, err := ns.ReadAt(p[:8192], 512*1000); n != 8192 || err != nil {
		t.Fatalf("after an error: %d, %v", n, err)
	}
}

// TestCancelLeavesBufferToDevice cancels a read while the device holds it; the buffer's memory must not go to somebody else before the
// device is through with it.
func TestCancelLeavesBufferToDevice(t *testing.T) {
	var hold sync.Map
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if _, ok := hold.Load("on"); ok && qid != 0 {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	o := testOptions()
	o.DMASize = 1 << 20
	c := openInProc(t, cfg, o)
	ns := namespace(t, c, 1)
	hold.Store("on", true)

	buf, err := c.Alloc(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range [][]byte{buf.Bytes(), make([]byte, 64<<10)} {
		held := c.dev.Held()
		cancelled, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() {
			n, err := ns.ReadAtContext(cancelled, p, 0)
			if n != 0 {
				err = errors.New("n is not 0")
			}
			done <- err
		}()
		for c.dev.Held() == held {
			time.Sleep(time.Millisecond)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	addr := buf.IOVA()
	buf.Free()
	overlaps := func() bool {
		var all []*guestdrv.Buffer
		found := false
		for {
			b, err := c.Alloc(4096)
			if err != nil {
				break
			}
			all = append(all, b)
			found = found || b.IOVA() >= addr && b.IOVA() < addr+64<<10
		}
		for _, b := range all {
			b.Free()
		}
		return found
	}
	if overlaps() {
		t.Fatal("memory of a command under way was given to somebody else")
	}
	hold.Delete("on")
	c.dev.Release()
	if _, err := ns.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the buffer's memory comes back", overlaps)
}

func TestCancelledBeforeItBegins(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	ns := namespace(t, c, 1)
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := ns.ReadAtContext(done, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestFreedBufferIsRefused(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	ns := namespace(t, c, 1)
	buf, err := c.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	p := buf.Bytes()
	buf.Free()
	buf.Free()
	if _, err := ns.ReadAt(p, 0); err == nil {
		t.Fatal("read into memory that was freed")
	}
}

func TestUnsupportedCommands(t *testing.T) {
	cfg := nvmetest.Config{}
	cfg.Identify = func(cmd *nvme.Command, data []byte) {
		if cmd.CNS() == nvme.CNSController {
			var id nvme.IdentifyController
			copy(id.Bytes()[:], data)
			id.ONCS = 0
			copy(data, id.Bytes()[:])
		}
	}
	c := openInProc(t, cfg, testOptions())
	ns := namespace(t, c, 1)
	for _, err := range []error{ns.Discard(ctx, 0, 512), ns.WriteZeroes(ctx, 0, 512), ns.Compare(ctx, make([]byte, 512), 0)} {
		if !errors.Is(err, guestdrv.ErrUnsupported) {
			t.Errorf("got %v", err)
		}
	}
}
