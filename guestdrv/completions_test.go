package guestdrv_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

var completionModes = []guestdrv.CompletionMode{guestdrv.CompletionsAdaptive, guestdrv.CompletionsInterrupt, guestdrv.CompletionsPoll}

// TestCompletionModes does the same with each way of waiting, across a reset, and looks at what the device was asked for.
func TestCompletionModes(t *testing.T) {
	for _, mode := range completionModes {
		for _, v := range variants {
			t.Run(fmt.Sprintf("%v/%s", mode, v.name), func(t *testing.T) {
				var vectors atomic.Int64 // completion queues with an interrupt
				cfg := v.cfg
				cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
					if qid == 0 && cmd.Opcode == nvme.AdminCreateCQ && cmd.CQInterrupts() {
						vectors.Add(1)
					}
					return nvmetest.Verdict{}
				}
				o := testOptions()
				o.Completions = mode
				c := v.open(t, cfg, o)
				ns := namespace(t, c, 1)
				for range 2 {
					var wg sync.WaitGroup
					for i := range 8 {
						wg.Go(func() {
							want, got := randomBytes(100<<10), make([]byte, 100<<10)
							for range 2 {
								if _, err := ns.WriteAt(want, int64(i)*128<<10); err != nil {
									t.Error(err)
								}
								if _, err := ns.ReadAt(got, int64(i)*128<<10); err != nil {
									t.Error(err)
								} else if string(got) != string(want) {
									t.Error("data differs")
								}
							}
						})
					}
					wg.Wait()
					if err := c.ResetByForce(errors.New("the test wants it")); err != nil {
						t.Fatal(err)
					}
				}
				n := vectors.Load()
				if mode == guestdrv.CompletionsPoll && n != 0 {
					t.Errorf("%d queues with interrupts", n)
				}
				if mode != guestdrv.CompletionsPoll && v.cfg.Vectors == 0 && n < 2 {
					t.Errorf("%d queues with interrupts", n)
				}
			})
		}
	}
}

// TestPollingEnds cancels calls that poll for a command that is never completed, and closes the controller under them.
func TestPollingEnds(t *testing.T) {
	for _, mode := range completionModes {
		t.Run(mode.String(), func(t *testing.T) {
			cfg := nvmetest.Config{}
			cfg.Command = func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
				if qid != 0 {
					return nvmetest.Verdict{Action: nvmetest.Hold}
				}
				return nvmetest.Verdict{}
			}
			o := testOptions()
			o.Completions = mode
			c := openInProc(t, cfg, o)
			ns := namespace(t, c, 1)
			done := make(chan error)
			short, cancel := context.WithCancel(ctx)
			defer cancel()
			go func() {
				_, err := ns.ReadAtContext(short, make([]byte, 512), 0)
				done <- err
			}()
			eventually(t, "a command is outstanding", func() bool { return c.dev.Held() == 1 })
			begin := time.Now()
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if d := time.Since(begin); d > patience/2 {
				t.Errorf("cancelled after %v", d)
			}
			for range 4 {
				go func() {
					_, err := ns.ReadAt(make([]byte, 4096), 0)
					done <- err
				}()
			}
			for c.dev.Held() < 5 {
				time.Sleep(time.Millisecond)
			}
			c.Close()
			for range 4 {
				if err := <-done; !errors.Is(err, guestdrv.ErrClosed) {
					t.Errorf("got %v", err)
				}
			}
		})
	}
}

// TestIdleControllerDoesNothing has no command outstanding but requests for events: no register is read, and nothing polls.
func TestIdleControllerDoesNothing(t *testing.T) {
	t.Parallel()
	for _, vectors := range []int{0, -1} {
		for _, mode := range completionModes {
			t.Run(fmt.Sprintf("%v/vectors=%d", mode, vectors), func(t *testing.T) {
				t.Parallel()
				var reads atomic.Int64
				cfg := nvmetest.Config{Vectors: vectors}
				cfg.Read = func(_ uint32, v uint64) uint64 {
					reads.Add(1)
					return v
				}
				o := testOptions()
				o.Completions = mode
				o.Timeout = 2 * time.Second // so that the watch ticks four times a second
				c := openInProc(t, cfg, o)
				if _, err := namespace(t, c, 1).ReadAt(make([]byte, 512), 0); err != nil {
					t.Fatal(err)
				}
				// What is asked for behind Open's back, about events, comes to an end.
				var n, looks int64
				for begin := time.Now(); time.Since(begin) < patience; {
					before, polls := reads.Load(), c.Polls()
					time.Sleep(time.Second)
					if n, looks = reads.Load()-before, int64(c.Polls()-polls); n == 0 && looks == 0 {
						return
					}
				}
				t.Errorf("%d reads of registers and %d looks by pollers in a second", n, looks)
			})
		}
	}
}
