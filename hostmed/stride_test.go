package hostmed

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// Doorbells a cache line apart, or closer, in every mode: guestdrv finds them where CAP.DSTRD says. With shadow doorbells the page bounds
// the queues (R29).
func TestDoorbellStride(t *testing.T) {
	for _, mode := range modes {
		for _, dstrd := range []uint8{0, 1, 4} {
			t.Run(fmt.Sprintf("%v/%d", mode, nvme.DoorbellStride(dstrd)), func(t *testing.T) {
				socket := filepath.Join(t.TempDir(), "s")
				start(t, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=64MiB"}, Doorbells: mode, DSTRD: dstrd}}, Logger: testrig.Log(t)})
				c := open(t, socket, guestdrv.Options{Timeout: patience / 4})
				if got := c.Capabilities().DSTRD(); got != dstrd {
					t.Errorf("CAP.DSTRD %d, want %d", got, dstrd)
				}
				if want := map[DoorbellMode]string{Shadow: "shadow", Trap: "mmio", Mmap: "mmap"}[mode]; c.Doorbells() != want {
					t.Errorf("doorbells %q, want %q", c.Doorbells(), want)
				}
				exercise(t, c)
				cmd := nvme.Command{}
				cmd.SetGetFeatures(nvme.FeatureQueues, 0, nvme.FeatureDefault)
				dw0, err := c.Admin(t.Context(), &cmd, nil)
				if err != nil {
					t.Fatal(err)
				}
				want := uint32(maxQueues)
				if mode == Shadow && dstrd == 4 {
					want = 31
				}
				if q := nvme.QueueCounts(dw0); q.SQs().Count() != want || q.CQs().Count() != want {
					t.Errorf("%d SQs and %d CQs, want %d", q.SQs().Count(), q.CQs().Count(), want)
				}
			})
		}
	}
}
