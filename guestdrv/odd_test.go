package guestdrv_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestOddLimits opens controllers that can do little, and expects the plain API and a pair to work all the same.
func TestOddLimits(t *testing.T) {
	capability := func() nvme.CAP { return nvme.CAP(0).WithMQES(1023).WithTO(4).WithCSS(nvme.CAPCSSNVM) }
	identify := func(change func(*nvme.IdentifyController)) nvmetest.Hooks {
		return nvmetest.Hooks{Identify: identifyController(change)}
	}
	for _, tc := range []struct {
		name  string
		cfg   nvmetest.Config
		check func(t *testing.T, c opened)
	}{
		{name: "MQES 1", cfg: nvmetest.Config{CAP: capability().WithMQES(1)}},
		{name: "MQES 2", cfg: nvmetest.Config{CAP: capability().WithMQES(2)}},
		{name: "MQES 65535", cfg: nvmetest.Config{CAP: capability().WithMQES(65535)}},
		{name: "MDTS 0", check: func(t *testing.T, c opened) {
			if c.MaxTransfer() != 1<<20 {
				t.Errorf("commands of %d bytes", c.MaxTransfer())
			}
		}},
		{name: "MDTS 1", cfg: nvmetest.Config{MDTS: 1}, check: func(t *testing.T, c opened) {
			if c.MaxTransfer() != 8192 {
				t.Errorf("commands of %d bytes", c.MaxTransfer())
			}
		}},
		{name: "MDTS 1, 4 KiB blocks", cfg: nvmetest.Config{MDTS: 1, Namespaces: []nvmetest.Namespace{{Blocks: 2048, LBADS: 12}}}},
		{name: "4 KiB blocks", cfg: nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 2048, LBADS: 12}}}},
		{name: "64 KiB blocks", cfg: nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 128, LBADS: 16}}}},
		{name: "DSTRD 4", cfg: nvmetest.Config{CAP: capability().WithDSTRD(4)}},
		{name: "DSTRD 8", cfg: nvmetest.Config{CAP: capability().WithDSTRD(8)}},
		{name: "one queue", cfg: nvmetest.Config{Queues: 1}},
		{name: "one queue, two entries, one vector", cfg: nvmetest.Config{Queues: 1, Vectors: 1, CAP: capability().WithMQES(1)}},
		{name: "one vector", cfg: nvmetest.Config{Vectors: 1}},
		{name: "two vectors", cfg: nvmetest.Config{Vectors: 2}},
		{name: "no interrupts", cfg: nvmetest.Config{Vectors: -1}},
		{name: "TO 0", cfg: nvmetest.Config{CAP: capability().WithTO(0)}},
		{name: "AERL 0", cfg: nvmetest.Config{Hooks: identify(func(id *nvme.IdentifyController) { id.AERL = 0 })}},
		{name: "ACL 0", cfg: nvmetest.Config{Hooks: identify(func(id *nvme.IdentifyController) { id.ACL = 0 })}},
		{name: "NN 0", cfg: nvmetest.Config{Hooks: identify(func(id *nvme.IdentifyController) { id.NN = 0 })}},
		{name: "no optional commands", cfg: nvmetest.Config{Hooks: identify(func(id *nvme.IdentifyController) { id.ONCS, id.OACS, id.OAES = 0, 0, 0 })},
			check: func(t *testing.T, c opened) {
				ns := namespace(t, c, 1)
				for what, err := range map[string]error{
					"discard": ns.Discard(ctx, 0, 4096), "write zeroes": ns.WriteZeroes(ctx, 0, 4096), "compare": ns.Compare(ctx, make([]byte, 4096), 0),
				} {
					mustMention(t, err, guestdrv.ErrUnsupported, what)
				}
			}},
		{name: "no write cache", cfg: nvmetest.Config{NoCache: true}, check: func(t *testing.T, c opened) {
			if n := c.dev.Flushes.Load(); n != 0 {
				t.Errorf("%d Flush commands, which do nothing there", n)
			}
		}},
		{name: "a write cache", check: func(t *testing.T, c opened) {
			if c.dev.Flushes.Load() == 0 {
				t.Error("no Flush")
			}
		}},
		{name: "entries may be larger", cfg: nvmetest.Config{Hooks: identify(func(id *nvme.IdentifyController) { id.SQES, id.CQES = 0x76, 0x54 })}},
	} {
		for _, noShadow := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/noShadow=%v", tc.name, noShadow), func(t *testing.T) {
				tc.cfg.NoShadow = noShadow
				c := openInProc(t, tc.cfg, testOptions())
				ns := namespace(t, c, 1)
				var wg sync.WaitGroup
				for i := range 4 {
					wg.Go(func() {
						const n = 256 << 10
						want, got := randomBytes(n), make([]byte, n)
						want[0] = byte(i)
						if _, err := ns.WriteAt(want, int64(i)*n); err != nil {
							t.Error(err)
						}
						if err := ns.Flush(ctx); err != nil {
							t.Error(err)
						}
						if _, err := ns.ReadAt(got, int64(i)*n); err != nil {
							t.Error(err)
						} else if string(want) != string(got) {
							t.Error("data differs")
						}
					})
				}
				wg.Wait()
				if tc.check != nil {
					tc.check(t, c)
				}
				// All queues may be the plain API's.
				if err := pairOnce(c.Controller); err != nil && !strings.Contains(err.Error(), "no queue pair is free") {
					t.Error(err)
				}
				// And the controller can be reset.
				if err := c.ResetByForce(errors.New("the test wants it")); err != nil || c.Stats().Resets != 1 {
					t.Errorf("%v, %d resets", err, c.Stats().Resets)
				}
				if _, err := ns.ReadAt(make([]byte, 256<<10), 0); err != nil {
					t.Errorf("after a reset: %v", err)
				}
			})
		}
	}
}

// TestOddLimitsRefused are controllers and namespaces that cannot be used: the error says why.
func TestOddLimitsRefused(t *testing.T) {
	for words, change := range map[string]func(id *nvme.IdentifyController){
		"SQEs have 2^7 to 2^7 bytes": func(id *nvme.IdentifyController) { id.SQES = 0x77 },
		"SQEs have 2^5 to 2^5 bytes": func(id *nvme.IdentifyController) { id.SQES = 0x55 },
		"CQEs have 2^5 to 2^6 bytes": func(id *nvme.IdentifyController) { id.CQES = 0x65 },
	} {
		mustMention(t, openFails(t, nvmetest.Config{Hooks: nvmetest.Hooks{Identify: identifyController(change)}}, testOptions()), nil, words)
	}
	pages := nvmetest.Config{CAP: nvme.CAP(0).WithMQES(63).WithTO(1).WithCSS(1).WithMPSMIN(1).WithMPSMAX(4)}
	mustMention(t, openFails(t, pages, testOptions()), nil, "smallest memory page is 8192 bytes, this driver's is 4096")

	cfg := nvmetest.Config{MDTS: 1, Namespaces: []nvmetest.Namespace{{Blocks: 64, LBADS: 12, MS: 8}, {Blocks: 64, LBADS: 14}, {Blocks: 64, LBADS: 9}}}
	c := openInProc(t, cfg, testOptions())
	_, err := c.Namespace(1)
	mustMention(t, err, guestdrv.ErrNoNamespace, "8 bytes of metadata per block")
	_, err = c.Namespace(2)
	mustMention(t, err, guestdrv.ErrNoNamespace, "blocks of 16384 bytes, commands of at most 8192")
	namespace(t, c, 3)

	none := openInProc(t, nvmetest.Config{Namespaces: []nvmetest.Namespace{{LBADS: 9, Absent: true}}}, testOptions())
	if all := none.Namespaces(); len(all) != 0 {
		t.Errorf("%d namespaces", len(all))
	}
}
