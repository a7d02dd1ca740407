package guestdrv_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestResetsUnderLoad resets the controller every few milliseconds, while many goroutines write and read back what they wrote, call
// Admin, and make pairs. Nobody may see wrong data, hang, or get another error than ErrReset; afterwards all DMA memory is back.
func TestResetsUnderLoad(t *testing.T) {
	for i, v := range variants {
		for j, mode := range []guestdrv.ResetMode{guestdrv.ResetFail, guestdrv.ResetReplay} {
			if testing.Short() && i%2 != j {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", v.name, mode), func(t *testing.T) {
				o := patientOptions()
				o.OnReset = mode
				cfg := v.cfg
				cfg.CAP = nvme.CAP(0).WithMQES(1023).WithTO(120).WithCSS(1)
				c := v.open(t, cfg, o)
				ns := namespace(t, c, 1)
				// PRP lists and rings are taken now, so that free memory can be compared.
				if _, err := ns.WriteAt(make([]byte, 2<<20), 0); err != nil {
					t.Fatal(err)
				}
				free := c.FreeMemory()
				var stop atomic.Bool
				var wg sync.WaitGroup
				var ok, lost atomic.Uint64
				work := func(what string, step func(rng *rand.Rand) error) {
					wg.Go(func() {
						rng := rand.New(rand.NewPCG(uint64(ok.Add(1)), 7))
						for !stop.Load() {
							switch err := step(rng); {
							case err == nil:
								ok.Add(1)
							case errors.Is(err, guestdrv.ErrReset):
								lost.Add(1)
							default:
								t.Errorf("%s: %v", what, err)
								return
							}
						}
					})
				}
				const region = 160 << 10
				for i := range 12 {
					p, got := make([]byte, region), make([]byte, region)
					work("write and read back", func(rng *rand.Rand) error {
						n := (1 + rng.IntN(region/512)) * 512
						if _, err := ns.WriteAt(p[:n], int64(i)*region); err != nil {
							return err
						}
						if _, err := ns.ReadAt(got[:n], int64(i)*region); err != nil {
							return err
						}
						if !bytes.Equal(p[:n], got[:n]) {
							return fmt.Errorf("worker %d reads back something else", i)
						}
						for j := 0; j < n; j += 64 {
							p[j]++
						}
						return nil
					})
				}
				work("admin", func(*rand.Rand) error {
					var id nvme.IdentifyController
					var cmd nvme.Command
					cmd.SetIdentify(nvme.CNSController, 0, 0)
					_, err := c.Admin(ctx, &cmd, id.Bytes()[:])
					if err == nil && id.Model() != "nvmetest" {
						err = fmt.Errorf("model %q", id.Model())
					}
					return err
				})
				for range 2 {
					work("pair", func(*rand.Rand) error { return pairOnce(c.Controller) })
				}
				load := 300 * time.Millisecond
				if testing.Short() {
					load /= 3
				}
				for end, resets := time.Now().Add(load), 0; time.Now().Before(end) || resets < 3; resets++ {
					for seen := ok.Load(); ok.Load() < seen+3 && c.Err() == nil; {
						time.Sleep(time.Millisecond)
					}
					c.ForceReset(errors.New("the test wants it"))
					time.Sleep(time.Duration(rand.IntN(4)) * time.Millisecond)
				}
				stop.Store(true)
				wg.Wait()
				if err := c.AwaitLive(); err != nil {
					t.Fatal(err)
				}
				if n := c.Stats().Resets; n < 3 {
					t.Errorf("%d resets", n)
				}
				eventually(t, "all memory is back", func() bool { return c.FreeMemory() == free })
				t.Logf("%d resets, %d steps done, %d lost", c.Stats().Resets, ok.Load(), lost.Load())
				mustReadWrite(t, ns)
			})
		}
	}
}

func mustReadWrite(t *testing.T, ns *guestdrv.Namespace) {
	t.Helper()
	want, got := randomBytes(64<<10), make([]byte, 64<<10)
	if _, err := ns.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.ReadAt(got, 4096); err != nil {
		t.Fatal(err)
	}
	mustEqual(t, got, want)
}

// pairOnce makes a pair, does something with it and closes it.
func pairOnce(c *guestdrv.Controller) error {
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: true})
	if err != nil {
		return fmt.Errorf("new: %w", err)
	}
	err = func() error {
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1, Tag: 9}}); err != nil {
			return err
		}
		if err := p.Publish(); err != nil {
			return err
		}
		if err := p.Wait(ctx); err != nil {
			return err
		}
		var r [4]guestdrv.Result
		n, err := p.Reap(r[:])
		if err == nil && (n != 1 || r[0].Tag != 9 || !r[0].Status.OK()) {
			err = fmt.Errorf("%d results, %+v", n, r[0])
		}
		return err
	}()
	if closeErr := p.Close(); closeErr != nil {
		return fmt.Errorf("close: %w", closeErr)
	}
	return err
}

// TestFaultsUnderLoad is a device that loses completions now and then, and sometimes stops altogether.
func TestFaultsUnderLoad(t *testing.T) {
	t.Parallel()
	load := 3 * time.Second
	if testing.Short() {
		load = time.Second
	}
	for _, mode := range []guestdrv.ResetMode{guestdrv.ResetFail, guestdrv.ResetReplay} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			var bad atomic.Bool
			var n, good atomic.Uint64
			cfg := nvmetest.Config{}
			cfg.Command = func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
				if bad.Load() && qid != 0 && n.Add(1)%300 == 0 {
					return nvmetest.Verdict{Action: nvmetest.Drop}
				}
				return nvmetest.Verdict{}
			}
			o := quickOptions()
			o.OnReset = mode
			c := openInProc(t, cfg, o)
			ns := namespace(t, c, 1)
			bad.Store(true)
			var wg sync.WaitGroup
			end := time.Now().Add(load)
			on := func() bool { return time.Now().Before(end) || c.Stats().Resets < 2 && c.Err() == nil }
			for i := range 8 {
				wg.Go(func() {
					p, got := randomBytes(32<<10), make([]byte, 32<<10)
					for on() {
						_, err := ns.WriteAt(p, int64(i)*64<<10)
						if err == nil {
							_, err = ns.ReadAt(got, int64(i)*64<<10)
						}
						switch {
						case err == nil && !bytes.Equal(p, got):
							t.Error("data differs")
							return
						case err != nil && !errors.Is(err, guestdrv.ErrReset) && !errors.Is(err, guestdrv.ErrTimeout): // aborted in time, if this machine is slow
							t.Error(err)
							return
						case err == nil:
							good.Add(1)
						}
					}
				})
			}
			wg.Go(func() {
				// Not before it has got somewhere: a controller that stops whenever it was brought back is given up.
				for seen := uint64(0); on(); time.Sleep(100 * time.Millisecond) {
					if now := good.Load(); now > seen+100 {
						c.dev.Fault()
						seen = now
					}
				}
			})
			wg.Wait()
			bad.Store(false)
			eventually(t, "it is well again", func() bool {
				_, err := ns.ReadAt(make([]byte, 512), 0)
				if c.Err() != nil {
					t.Fatal(c.Err())
				}
				return err == nil
			})
			if s := c.Stats(); s.Resets < 2 {
				t.Errorf("%d resets", s.Resets)
			}
			mustReadWrite(t, ns)
		})
	}
}
