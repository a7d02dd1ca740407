package hostnvme

import (
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestUnitsAreNotCut: the commands of a request are cut at multiples of what the device writes as a whole and nowhere else, whatever its memory
// is like, what the device's rules for data are, and where a command should rather end (NOIOB).
func TestUnitsAreNotCut(t *testing.T) {
	for name, c := range map[string]struct {
		sgls     uint32
		boundary uint64
		copied   bool // the device does not reach the memory
	}{
		"PRPs": {}, "SGLs": {sgls: nvme.SGLSByteAligned}, "NOIOB": {boundary: 24 << 9}, "copies": {copied: true},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var seen []nvme.Command
			r := newRig(t, nvmetest.Config{SGLS: c.sgls, Hooks: nvmetest.Hooks{Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
				if qid != 0 {
					mu.Lock()
					defer mu.Unlock()
					seen = append(seen, *cmd)
				}
				return nvmetest.Verdict{}
			}}})
			const unit, first = 32, 5 // blocks
			s := all
			s.First, s.Blocks, s.Atomic, s.Boundary, s.MaxTransfer = first, 8192, unit<<9, c.boundary, 48<<9
			q := r.queue(t, Attach{Slice: s})
			mem := r.guests.Memory(2 << 20)
			if !c.copied {
				q.AddMemory(mem)
				r.Pairs.Memory().Settle(time.Minute)
			}
			rapid.Check(t, func(rt *rapid.T) {
				x := Request{Op: rapid.SampledFrom([]Op{Read, Write, WriteZeroes}).Draw(rt, "op")}
				at, blocks := rapid.Uint64Range(0, 4000).Draw(rt, "first"), rapid.Uint64Range(1, 400).Draw(rt, "blocks")
				x.Off, x.Len = at<<9, blocks<<9
				for left, skip := x.Len, uint64(0); x.Op != WriteZeroes && left > 0; {
					n := min(left, 4*rapid.Uint64Range(1, 8192).Draw(rt, "piece"))
					x.Vec = append(x.Vec, Seg{Base: &mem[skip], Len: n})
					left -= n
					skip += n + 4*rapid.Uint64Range(0, 1024).Draw(rt, "gap")
					if skip+left > uint64(len(mem)) || len(x.Vec) > 100 {
						rt.Skip("too many pieces")
					}
				}
				mu.Lock()
				seen = nil
				mu.Unlock()
				q.must(t, x)
				mu.Lock()
				defer mu.Unlock()
				slices.SortFunc(seen, func(a, b nvme.Command) int { return int(int64(a.SLBA() - b.SLBA())) })
				for i := range seen {
					from := seen[i].SLBA() - first
					if from != at || i > 0 && from%unit != 0 {
						rt.Fatalf("command %d of %v of %d blocks at %#x begins at block %d", i, x.Op, blocks, x.Off, from)
					}
					at += uint64(seen[i].NLB().Count())
				}
				if at != x.Off>>9+blocks {
					rt.Fatalf("%d blocks at %#x end at %d", blocks, x.Off, at)
				}
			})
		})
	}
}
