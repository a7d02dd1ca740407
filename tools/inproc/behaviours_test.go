package inproc_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What a user of the driver does. Each leaves the controller as it found it, but for what is written.

func identify(t *testing.T, c driven) {
	id := c.Identify()
	if id.VID != nvme.PCIVendorGoogle || c.Version() == 0 || c.Capabilities().MQES().Count() < 2 || c.PeerPID() != 0 {
		t.Errorf("VID %#x, VS %v, %v", id.VID, c.Version(), c.Capabilities())
	}
	all := c.Namespaces()
	if len(all) != 1 || all[0].NSID() != 1 || all[0].Size() != 32<<20 {
		t.Fatalf("namespaces %v", all)
	}
	cmd := &nvme.Command{}
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	again := make([]byte, 4096)
	if _, err := c.Admin(ctx, cmd, again); err != nil || !bytes.Equal(again, id.Bytes()[:]) {
		t.Errorf("Identify once more: %v", err)
	}
}

// manyGoroutines writes, flushes, reads and verifies, each goroutine in a place of its own, by buffers and by memory that is copied.
func manyGoroutines(t *testing.T, c driven) {
	ns := namespace(t, c.Controller, 1)
	const share = 1 << 20
	var wg sync.WaitGroup
	for g := range 12 {
		wg.Go(func() {
			mine, back := make([]byte, 64<<10), make([]byte, 64<<10)
			if g%3 == 0 {
				b, err := c.Alloc(len(back))
				if err != nil {
					t.Error(err)
					return
				}
				defer b.Free()
				back = b.Bytes()
			}
			for i := range 6 {
				size := 4096 << (i % 5)
				off := int64(g*share + i*100<<10)
				copy(mine, randomBytes(uint64(g*100+i), size))
				if n, err := ns.WriteAt(mine[:size], off); n != size || err != nil {
					t.Errorf("goroutine %d: write of %d: %d, %v", g, size, n, err)
					return
				}
				if i == 2 {
					if err := ns.Flush(ctx); err != nil {
						t.Errorf("flush: %v", err)
					}
				}
				if n, err := ns.ReadAt(back[:size], off); n != size || err != nil || !bytes.Equal(back[:size], mine[:size]) {
					t.Errorf("goroutine %d: read of %d: %d, %v", g, size, n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	data := randomBytes(7, 3<<20+4096) // several commands, none of them whole
	if n, err := ns.WriteAt(data, 14<<20); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	got := make([]byte, len(data))
	if n, err := ns.ReadAt(got, 14<<20); n != len(got) || err != nil || !bytes.Equal(got, data) {
		t.Fatal("read other data than was written", n, err)
	}
	if n, err := ns.ReadAt(got[:8192], ns.Size()-4096); n != 4096 || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
}

func discardAndZeroes(t *testing.T, c driven) {
	ns := namespace(t, c.Controller, 1)
	data, got, zeroes := randomBytes(1, 256<<10), make([]byte, 256<<10), make([]byte, 256<<10)
	for name, wipe := range map[string]func(context.Context, int64, int64) error{"discard": ns.Discard, "write zeroes": ns.WriteZeroes} {
		if _, err := ns.WriteAt(data, 20<<20); err != nil {
			t.Fatal(err)
		}
		if err := wipe(ctx, 20<<20+64<<10, 64<<10); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := ns.ReadAt(got, 20<<20); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[64<<10:128<<10], zeroes[:64<<10]) {
			t.Errorf("%s left data", name)
		}
		if !bytes.Equal(got[:64<<10], data[:64<<10]) || !bytes.Equal(got[128<<10:], data[128<<10:]) {
			t.Errorf("%s took more than it was told", name)
		}
	}
}

func compare(t *testing.T, c driven) {
	ns := namespace(t, c.Controller, 1)
	data := randomBytes(2, 128<<10)
	if _, err := ns.WriteAt(data, 22<<20); err != nil {
		t.Fatal(err)
	}
	if err := ns.Compare(ctx, data, 22<<20); err != nil {
		t.Error(err)
	}
	data[100<<10]++
	if err := ns.Compare(ctx, data, 22<<20); nvme.StatusOf(err).Code() != nvme.StatusCompareFailure {
		t.Errorf("compare of other data: %v", err)
	}
}

// pairs runs batches on several queue pairs at once, each on blocks of its own.
func pairs(t *testing.T, c driven) {
	block := namespace(t, c.Controller, 1).BlockSize()
	var wg sync.WaitGroup
	var ran atomic.Int32
	for g := range 3 {
		wg.Go(func() {
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 16, Poll: g == 1, NoSpin: g == 2})
			if err != nil {
				return // a controller with one queue has none to give
			}
			defer p.Close()
			ran.Add(1)
			b, err := c.Alloc(16 * 4096)
			if err != nil {
				t.Error(err)
				return
			}
			defer b.Free()
			perPage := 4096 / block
			at := func(i int) uint64 { return uint64(24<<20+g<<20)/uint64(block) + uint64(i*perPage) }
			for round := range 3 {
				want := randomBytes(uint64(g*10+round), 16*4096)
				copy(b.Bytes(), want)
				for _, op := range []uint8{nvme.IOWrite, nvme.IORead} {
					var ios []guestdrv.IO
					for i := range 16 {
						ios = append(ios, guestdrv.IO{Op: op, NSID: 1, Blocks: uint32(perPage), LBA: at(i), IOVA: b.IOVA() + uint64(i)*4096, Tag: uint64(i)})
					}
					if err := runAll(p, ios); err != nil {
						t.Errorf("pair %d: %v", g, err)
						return
					}
					if op == nvme.IOWrite {
						clear(b.Bytes())
					}
				}
				if !bytes.Equal(b.Bytes()[:len(want)], want) {
					t.Errorf("pair %d: read other data than was written", g)
				}
			}
		})
	}
	wg.Wait()
	want := int32(3)
	if c.hostmed.Queues == 1 {
		want = 0
	}
	if ran.Load() != want {
		t.Errorf("%d pairs, want %d", ran.Load(), want)
	}
}

// runAll executes ios, as many at a time as p holds.
func runAll(p *guestdrv.QueuePair, ios []guestdrv.IO) error {
	results := make([]guestdrv.Result, 16)
	for left := len(ios); left > 0; {
		n, err := p.Submit(ios)
		if err == nil {
			err = p.Publish()
		}
		if err == nil {
			err = p.Wait(ctx)
		}
		if err != nil {
			return err
		}
		ios = ios[n:]
		if n, err = p.Reap(results); err != nil {
			return err
		}
		for _, r := range results[:n] {
			if err := r.Status.Err(); err != nil {
				return err
			}
		}
		left -= n
	}
	return nil
}

// statusErrors are what the controller refuses, and what the driver does.
func statusErrors(t *testing.T, c driven) {
	ns := namespace(t, c.Controller, 1)
	var se *guestdrv.StatusError
	_, err := c.Admin(ctx, &nvme.Command{Opcode: 0x7F}, nil)
	if !errors.As(err, &se) || !se.Admin || se.Status.Code() != nvme.StatusInvalidOpcode || !se.DNR() || se.Retriable() {
		t.Errorf("unknown command: %v", err)
	}
	protect := func(state uint32) {
		t.Helper()
		cmd := &nvme.Command{}
		cmd.SetSetFeatures(nvme.FeatureWriteProtect, 1, state)
		if _, err := c.Admin(ctx, cmd, nil); err != nil {
			t.Fatal(err)
		}
	}
	protect(1)
	_, err = ns.WriteAt(make([]byte, 4096), 0)
	if !errors.As(err, &se) || se.Admin || se.Command.Opcode != nvme.IOWrite || se.Status.Code() != nvme.StatusNamespaceWriteProtected || !se.DNR() {
		t.Errorf("write to what is protected: %v", err)
	}
	if _, err := ns.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("read of what is protected: %v", err)
	}
	protect(0)
	if _, err := ns.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if _, err := ns.WriteAt(make([]byte, 4096), ns.Size()); !errors.Is(err, guestdrv.ErrRange) {
		t.Errorf("write beyond the end: %v", err)
	}
	if _, err := ns.WriteAt(make([]byte, 100), 0); !errors.Is(err, guestdrv.ErrUnaligned) {
		t.Errorf("unaligned write: %v", err)
	}
	if c.Err() != nil {
		t.Errorf("the controller has failed: %v", c.Err())
	}
}

// cancelled ends contexts under reads, whose memory stays the controller's for a while.
func cancelled(t *testing.T, c driven) {
	ns := namespace(t, c.Controller, 1)
	want := randomBytes(5, 1<<20)
	if _, err := ns.WriteAt(want, 28<<20); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			short, cancel := context.WithCancel(ctx)
			go cancel()
			if _, err := ns.ReadAtContext(short, make([]byte, 1<<20), 28<<20); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	got := make([]byte, len(want))
	if _, err := ns.ReadAt(got, 28<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the cancellations: %v", err)
	}
}

// closeUnderLoad ends the controller, and with it everything that waits.
func closeUnderLoad(t *testing.T, c driven) {
	ns := namespace(t, c.Controller, 1)
	done := make(chan error)
	var did atomic.Int32
	const users = 8
	for g := range users {
		go func() {
			p := make([]byte, 32<<10)
			for {
				if _, err := ns.WriteAt(p, int64(g)<<20); err != nil {
					done <- err
					return
				}
				if _, err := ns.ReadAt(p, int64(g)<<20); err != nil {
					done <- err
					return
				}
				did.Add(1)
			}
		}()
	}
	for did.Load() < 3*users {
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for range users {
		if err := <-done; !errors.Is(err, guestdrv.ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
}
