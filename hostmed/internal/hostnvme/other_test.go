package hostnvme

import (
	"bytes"
	"context"
	"testing"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestNothingIsSentToAnotherNamespace has a controller come back from a reset with something else under the id of a namespace that a guest writes to: other
// blocks, where the guest's would be in its neighbour's slice; another namespace; none. What was under way is not sent again, and what comes is not sent.
func TestNothingIsSentToAnotherNamespace(t *testing.T) {
	const blocks = 16384
	for name, then := range map[string]nvmetest.Namespace{
		"blocks of 4 KiB":   {Blocks: blocks / 8, LBADS: 12, GUID: 1},
		"metadata":          {Blocks: blocks, LBADS: 9, MS: 8, GUID: 1},
		"another namespace": {Blocks: blocks, LBADS: 9, GUID: 2},
		"none":              {Absent: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nvmetest.Config{
				Namespaces: []nvmetest.Namespace{{Blocks: blocks, LBADS: 9, GUID: 1}},
				Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
					return nvmetest.Verdict{Action: map[bool]nvmetest.Action{true: nvmetest.Hold}[qid != 0]}
				}},
			})
			s := all
			s.First, s.Blocks, s.Is = 1024, 1024, r.dev.Space(1)
			q := r.queue(t, Attach{Slice: s})
			mem := r.guests.Memory(4096)
			copy(mem, random(4096))
			before := r.model.Disk(1)
			under := q.put1(Request{Op: Write, Len: 4096, Vec: []Seg{seg(mem)}})
			r.model.SetNamespaces(then)
			if err := r.dev.Reset(context.Background()); err != nil {
				t.Fatal(err)
			}
			q.wait(t, 1)
			next := q.do(t, Request{Op: Write, Len: 4096, Vec: []Seg{seg(mem)}})
			if under.Status != elsewhere || next != elsewhere {
				t.Errorf("under way: %v, after: %v", under.Status, next)
			}
			if after := r.model.Disk(1); !bytes.Equal(after, before[:len(after)]) {
				t.Error("it was written to")
			}
		})
	}
}
