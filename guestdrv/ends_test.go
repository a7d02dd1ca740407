package guestdrv_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

func TestDeadDeviceWakesEverybody(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			cfg := v.cfg
			cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
				if qid != 0 {
					return nvmetest.Verdict{Action: nvmetest.Hold}
				}
				return nvmetest.Verdict{}
			}
			c := v.open(t, cfg, testOptions())
			ns := namespace(t, c, 1)
			// Before the readers, who take all DMA memory that there is.
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: true})
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error)
			const readers = 40 // more than there are slots for
			for range readers {
				go func() {
					_, err := ns.ReadAt(make([]byte, 256<<10), 0)
					done <- err
				}()
			}
			go func() {
				_, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}})
				if err == nil {
					err = p.Publish()
				}
				if err == nil {
					err = p.Wait(ctx)
				}
				done <- err
			}()
			for c.dev.Held() == 0 {
				time.Sleep(time.Millisecond)
			}
			c.gone()
			for range readers + 1 {
				if err := <-done; !errors.Is(err, guestdrv.ErrGone) {
					t.Errorf("got %v", err)
				}
			}
			p.Close()
			begin := time.Now()
			c.Close()
			if d := time.Since(begin); d > patience/2 {
				t.Errorf("close took %v", d)
			}
		})
	}
}

func TestCloseWakesEverybody(t *testing.T) {
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	c := openSocket(t, cfg, testOptions())
	ns := namespace(t, c, 1)
	buf, err := c.Alloc(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	for i := range 8 {
		go func() {
			p := make([]byte, 1<<20)
			if i%2 == 0 {
				p = buf.Bytes()
			}
			_, err := ns.ReadAt(p, 0)
			done <- err
		}()
	}
	for c.dev.Held() < 8 {
		time.Sleep(time.Millisecond)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for range 8 {
		if err := <-done; !errors.Is(err, guestdrv.ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if c.dev.Shutdowns.Load() != 1 {
		t.Errorf("%d shutdowns", c.dev.Shutdowns.Load())
	}
	buf.Free()
	if _, err := c.Alloc(1); !errors.Is(err, guestdrv.ErrClosed) {
		t.Errorf("alloc: %v", err)
	}
	if _, err := c.Admin(ctx, &nvme.Command{Opcode: nvme.AdminAbort}, nil); !errors.Is(err, guestdrv.ErrClosed) {
		t.Errorf("admin: %v", err)
	}
	if _, err := c.NewQueuePair(guestdrv.QueuePairOptions{}); !errors.Is(err, guestdrv.ErrClosed) {
		t.Errorf("pair: %v", err)
	}
}

// TestHangupInEveryPhase lets the server go away at the n-th message, for every n that Open needs, and once more afterwards.
func TestHangupInEveryPhase(t *testing.T) {
	dev := nvmetest.New(nvmetest.Config{NoShadow: true})
	defer dev.Close()
	for n := 0; ; n++ {
		path, remove, err := nvmetest.TempSocket()
		if err != nil {
			t.Fatal(err)
		}
		var seen atomic.Int64
		srv, err := dev.Serve(path, func(vfiouser.Command) bool { return seen.Add(1) <= int64(n) })
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		c, err := guestdrv.Open(ctx, "vfio-user:"+path, testOptions())
		if err == nil {
			ns, nsErr := c.Namespace(1)
			if nsErr == nil {
				_, _ = ns.ReadAt(make([]byte, 4096), 0)
			}
			c.Close()
		}
		if d := time.Since(begin); d > patience/2 {
			t.Errorf("message %d: took %v", n, d)
		}
		srv.Close()
		remove()
		if err == nil && seen.Load() < int64(n) {
			t.Logf("%d messages in all", seen.Load())
			return
		}
		if n > 500 {
			t.Fatal("Open never succeeds")
		}
	}
}

func TestOpenEndsWithContext(t *testing.T) {
	cfg := nvmetest.Config{CAP: nvme.CAP(0).WithMQES(63).WithTO(200).WithCSS(1)}
	cfg.Read = register(nvme.RegCSTS, 0)
	dev := nvmetest.New(cfg)
	defer dev.Close()
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	begin := time.Now()
	_, err := guestdrv.OpenDevice(short, dev.InProc(), testOptions())
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > patience/2 {
		t.Fatalf("%v after %v", err, time.Since(begin))
	}
}

func TestOpenRefusesNonsense(t *testing.T) {
	for _, name := range []string{"", "vfio-user:", "/dev/nvme0", "vfio-user:/does/not/exist"} {
		if c, err := guestdrv.Open(ctx, name, guestdrv.Options{}); err == nil {
			c.Close()
			t.Errorf("opened %q", name)
		}
	}
	for _, o := range []guestdrv.Options{{Queues: -1}, {Doorbells: 9}, {QueueDepth: 1 << 20}, {DMASize: 4096}, {Timeout: -1}, {OnReset: 9}, {ResetTimeout: -1}, {Completions: 9}} {
		openFails(t, nvmetest.Config{}, o)
	}
}

// TestPoolTooSmall runs out of DMA memory in the plain API.
func TestPoolTooSmall(t *testing.T) {
	o := testOptions()
	o.DMASize = 1 << 20
	c := openInProc(t, nvmetest.Config{}, o)
	ns := namespace(t, c, 1)
	var held []*guestdrv.Buffer
	for {
		b, err := c.Alloc(4096)
		if err != nil {
			mustMention(t, err, guestdrv.ErrNoMemory, "DMASize")
			break
		}
		held = append(held, b)
	}
	_, err := ns.ReadAt(make([]byte, 4096), 0)
	mustMention(t, err, guestdrv.ErrNoMemory, "DMASize")
	if _, err := ns.ReadAt(held[0].Bytes(), 0); err != nil {
		t.Errorf("a buffer needs no other memory: %v", err)
	}
	for _, b := range held {
		b.Free()
	}
	if _, err := ns.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Error(err)
	}
}
