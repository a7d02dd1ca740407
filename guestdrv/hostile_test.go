package guestdrv_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// openFails opens a device that must not be opened, and returns the error.
func openFails(t *testing.T, cfg nvmetest.Config, o guestdrv.Options) error {
	t.Helper()
	dev := nvmetest.New(cfg)
	defer dev.Close()
	begin := time.Now()
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), o)
	if err == nil {
		c.Close()
		t.Fatal("opened")
	}
	if d := time.Since(begin); d > patience {
		t.Errorf("took %v", d)
	}
	return err
}

func mustMention(t *testing.T, err error, is error, words ...string) {
	t.Helper()
	if is != nil && !errors.Is(err, is) {
		t.Errorf("got %v, want an error that is %v", err, is)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("got %v, want one that says %q", err, w)
		}
	}
}

func register(off uint32, v uint64) func(uint32, uint64) uint64 {
	return func(o uint32, old uint64) uint64 {
		if o == off {
			return v
		}
		return old
	}
}

// TestDeviceNeverReady waits as long as CAP.TO says, half a second.
func TestDeviceNeverReady(t *testing.T) {
	cfg := nvmetest.Config{CAP: nvme.CAP(0).WithMQES(63).WithTO(1).WithCSS(1)}
	cfg.Read = register(nvme.RegCSTS, 0)
	err := openFails(t, cfg, testOptions())
	mustMention(t, err, context.DeadlineExceeded, "not ready", "CSTS=0x0 after ", "CC=0x460001")

	cfg.Read = register(nvme.RegCSTS, 1)
	err = openFails(t, cfg, testOptions())
	mustMention(t, err, context.DeadlineExceeded, "not disabled", "CSTS=0x1 after ")
}

func TestDeviceFatalAndAllOnesAreToldApart(t *testing.T) {
	cfg := nvmetest.Config{}
	enabled := false
	cfg.Write = func(off uint32, v uint64) bool {
		enabled = enabled || off == nvme.RegCC && v&1 != 0
		return true
	}
	cfg.Read = func(off uint32, v uint64) uint64 {
		if off == nvme.RegCSTS && enabled {
			return 2
		}
		return v
	}
	mustMention(t, openFails(t, cfg, testOptions()), guestdrv.ErrFatal, "CFS", "CC=0x460001")

	for _, off := range []uint32{nvme.RegCAP, nvme.RegCC, nvme.RegCSTS} {
		err := openFails(t, nvmetest.Config{Hooks: nvmetest.Hooks{Read: register(off, ^uint64(0))}}, testOptions())
		mustMention(t, err, guestdrv.ErrGone, "all ones")
		if errors.Is(err, guestdrv.ErrFatal) {
			t.Errorf("all ones taken for CFS: %v", err)
		}
	}
}

func TestDeviceWithUselessCapabilities(t *testing.T) {
	for _, cap := range []nvme.CAP{
		nvme.CAP(0).WithMQES(63).WithTO(1),                                // no command set
		nvme.CAP(0).WithMQES(63).WithTO(1).WithCSS(1).WithMPSMIN(4),       // 64 KiB pages
		nvme.CAP(0).WithMQES(0).WithTO(1).WithCSS(1),                      // one entry
		nvme.CAP(0).WithMQES(63).WithTO(1).WithCSS(1).WithDSTRD(15),       // doorbells outside BAR0
		nvme.CAP(0).WithMQES(63).WithTO(1).WithCSS(1).WithDSTRD(0xF) << 1, // something else
	} {
		if err := openFails(t, nvmetest.Config{CAP: cap}, testOptions()); !strings.Contains(err.Error(), "CAP=") {
			t.Errorf("%v: %v", cap, err)
		}
	}
}

// identifyController changes one structure of Identify.
func identifyController(change func(*nvme.IdentifyController)) func(*nvme.Command, []byte) {
	return func(cmd *nvme.Command, data []byte) {
		if cmd.CNS() == nvme.CNSController {
			var id nvme.IdentifyController
			copy(id.Bytes()[:], data)
			change(&id)
			copy(data, id.Bytes()[:])
		}
	}
}

func TestGarbageIdentify(t *testing.T) {
	t.Run("namespaces", func(t *testing.T) {
		cfg := nvmetest.Config{Namespaces: []nvmetest.Namespace{
			{Blocks: 0, LBADS: 9}, {Blocks: 8, LBADS: 0}, {Blocks: 8, LBADS: 63}, {Blocks: 1 << 60, LBADS: 12}, {Blocks: 8, LBADS: 30}, {Blocks: 64, LBADS: 9},
		}}
		c := openInProc(t, cfg, testOptions())
		if all := c.Namespaces(); len(all) != 1 || all[0].NSID() != 6 {
			t.Fatalf("%d namespaces", len(all))
		}
		for nsid := uint32(1); nsid <= 7; nsid++ {
			if _, err := c.Namespace(nsid); (err == nil) != (nsid == 6) || err != nil && !errors.Is(err, guestdrv.ErrNoNamespace) {
				t.Errorf("namespace %d: %v", nsid, err)
			}
		}
	})
	t.Run("list that never ends", func(t *testing.T) {
		cfg := nvmetest.Config{}
		cfg.Identify = func(cmd *nvme.Command, data []byte) {
			if cmd.CNS() == nvme.CNSActiveNamespaces {
				var l nvme.NamespaceList
				for i := range l.ID {
					l.ID[i] = cmd.NSID + uint32(i) + 1
				}
				copy(data, l.Bytes()[:])
			}
		}
		c := openInProc(t, cfg, testOptions())
		if len(c.Namespaces()) != 1 {
			t.Errorf("%d namespaces", len(c.Namespaces()))
		}
	})
	t.Run("list that goes in circles", func(t *testing.T) {
		cfg := nvmetest.Config{}
		cfg.Identify = func(cmd *nvme.Command, data []byte) {
			if cmd.CNS() == nvme.CNSActiveNamespaces {
				l := nvme.NamespaceList{ID: [1024]uint32{3, 2}}
				copy(data, l.Bytes()[:])
			}
		}
		mustMention(t, openFails(t, cfg, testOptions()), nil, "active namespace list")
	})
	t.Run("everything is ones", func(t *testing.T) {
		cfg := nvmetest.Config{}
		cfg.Identify = func(cmd *nvme.Command, data []byte) {
			for i := range data {
				data[i] = 0xFF
			}
		}
		openFails(t, cfg, testOptions())
	})
	t.Run("everything is zero", func(t *testing.T) {
		cfg := nvmetest.Config{}
		cfg.Identify = func(cmd *nvme.Command, data []byte) { clear(data) }
		openFails(t, cfg, testOptions())
	})
	t.Run("MDTS of 255", func(t *testing.T) {
		cfg := nvmetest.Config{}
		cfg.Identify = identifyController(func(id *nvme.IdentifyController) { id.MDTS, id.NN, id.AERL = 255, 1<<32-1, 255 })
		c := openInProc(t, cfg, testOptions())
		if c.MaxTransfer() != 1<<20 {
			t.Errorf("%d bytes", c.MaxTransfer())
		}
	})
}

// TestLyingMDTS is a device that refuses what it said it would take.
func TestLyingMDTS(t *testing.T) {
	cfg := nvmetest.Config{MDTS: 1}
	cfg.Identify = identifyController(func(id *nvme.IdentifyController) { id.MDTS = 0 })
	c := openInProc(t, cfg, testOptions())
	ns := namespace(t, c, 1)
	n, err := ns.ReadAt(make([]byte, 1<<20), 0)
	if n != 0 || nvme.StatusOf(err).Code() != nvme.StatusInvalidField {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := ns.ReadAt(make([]byte, 8192), 0); err != nil {
		t.Error(err)
	}
}

// TestLyingMQES is a device that has smaller queues than it says.
func TestLyingMQES(t *testing.T) {
	cfg := nvmetest.Config{CAP: nvme.CAP(0).WithMQES(7).WithTO(1).WithCSS(1)}
	cfg.Read = func(off uint32, v uint64) uint64 {
		if off == nvme.RegCAP {
			return uint64(nvme.CAP(v).WithMQES(1023))
		}
		return v
	}
	mustMention(t, openFails(t, cfg, testOptions()), nil, "Queue Size")
}

// TestUnknownCompletions posts CQEs that no command asked for.
func TestUnknownCompletions(t *testing.T) {
	for name, e := range map[string]ring.Entry{
		"no such command": ring.MakeEntry(0, 0, 1, 0x3F, 0),
		"FFFFh":           ring.MakeEntry(0, 0, 1, 0xFFFF, 0),
		"wrong SQ":        ring.MakeEntry(0, 0, 7, 0, 0),
		"SQ head":         ring.MakeEntry(0, 77, 1, 0, 0),
	} {
		t.Run(name, func(t *testing.T) {
			cfg := nvmetest.Config{}
			cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
				if qid != 0 {
					return nvmetest.Verdict{Action: nvmetest.Hold}
				}
				return nvmetest.Verdict{}
			}
			c := openInProc(t, cfg, testOptions())
			ns := namespace(t, c, 1)
			done := make(chan error)
			go func() {
				_, err := ns.ReadAt(make([]byte, 512), 0)
				done <- err
			}()
			for c.dev.Held() == 0 {
				time.Sleep(time.Millisecond)
			}
			// The lane of the read is 1 or 2.
			c.dev.PostRaw(1, e)
			c.dev.PostRaw(2, e)
			if err := <-done; !errors.Is(err, guestdrv.ErrProtocol) {
				t.Errorf("got %v", err)
			}
			if err := c.Err(); !errors.Is(err, guestdrv.ErrProtocol) {
				t.Errorf("controller: %v", err)
			}
			if _, err := ns.ReadAt(make([]byte, 512), 0); !errors.Is(err, guestdrv.ErrProtocol) {
				t.Errorf("afterwards: %v", err)
			}
			begin := time.Now()
			c.Close()
			if d := time.Since(begin); d > patience/2 {
				t.Errorf("close took %v", d)
			}
			if _, err := ns.ReadAt(make([]byte, 512), 0); !errors.Is(err, guestdrv.ErrClosed) {
				t.Errorf("after close: %v", err)
			}
		})
	}
}

// TestSilentDevice stops answering commands for good: the deadline, or what the registers say before it, ends what waits, and as nothing
// brings the controller back it fails.
func TestSilentDevice(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		csts func(v uint64) uint64
		is   error
		says string
	}{
		{"alive", nil, guestdrv.ErrTimeout, "timed out after"},
		{"fatal", func(v uint64) uint64 { return v | 2 }, guestdrv.ErrFatal, "CFS"},
		{"all ones", func(v uint64) uint64 { return ^uint64(0) }, guestdrv.ErrGone, "all ones"},
	} {
		for _, v := range variants[:3] {
			t.Run(tc.name+"/"+v.name, func(t *testing.T) {
				t.Parallel()
				var silent atomic.Bool
				cfg := v.cfg
				cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
					if silent.Load() {
						return nvmetest.Verdict{Action: nvmetest.Drop}
					}
					return nvmetest.Verdict{}
				}
				cfg.Read = func(off uint32, v uint64) uint64 {
					if off == nvme.RegCSTS && silent.Load() && tc.csts != nil {
						return tc.csts(v)
					}
					return v
				}
				c := v.open(t, cfg, quickOptions())
				ns := namespace(t, c, 1)
				p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				silent.Store(true)
				begin := time.Now()
				_, err = ns.ReadAt(make([]byte, 300<<10), 0)
				mustMention(t, err, tc.is, "READ nsid=1", tc.says)
				if d := time.Since(begin); d > patience {
					t.Errorf("took %v", d)
				}
				_, err = p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}})
				if !errors.Is(err, guestdrv.ErrReset) && !errors.Is(err, tc.is) {
					t.Errorf("pair: %v", err)
				}
				eventually(t, "the controller fails", func() bool { return c.Err() != nil })
				mustMention(t, c.Err(), tc.is)
				if _, err := ns.ReadAt(make([]byte, 512), 0); !errors.Is(err, tc.is) {
					t.Errorf("afterwards: %v", err)
				}
				if _, err := c.Alloc(4096); err != nil {
					t.Errorf("alloc: %v", err)
				}
			})
		}
	}
}

// TestSilentDeviceResetsPair drops I/O commands only, so that the controller can be brought back for a pair that is made anew.
func TestSilentDeviceResetsPair(t *testing.T) {
	t.Parallel()
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 {
			return nvmetest.Verdict{Action: nvmetest.Drop}
		}
		return nvmetest.Verdict{}
	}
	for _, poll := range []bool{false, true} {
		t.Run(fmt.Sprintf("poll=%v", poll), func(t *testing.T) {
			t.Parallel()
			c := openInProc(t, cfg, quickOptions())
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: poll})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
				t.Fatal(err)
			}
			if err := p.Publish(); err != nil {
				t.Fatal(err)
			}
			mustMention(t, p.Wait(ctx), guestdrv.ErrTimeout, "queue pair 3", "reset")
			mustMention(t, p.Publish(), guestdrv.ErrReset)
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if err := c.Err(); err != nil {
				t.Errorf("the controller has failed: %v", err)
			}
			if p, err = c.NewQueuePair(guestdrv.QueuePairOptions{Poll: poll}); err != nil {
				t.Fatal(err)
			}
			p.Close()
			c.Close()
		})
	}
}
