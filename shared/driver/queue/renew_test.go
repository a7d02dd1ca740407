package queue

import (
	"errors"
	"testing"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// TestRenewedQueueWorksAgain fails a queue by a completion of nothing, and goes on over the same rings after a reset.
func TestRenewedQueueWorksAgain(t *testing.T) {
	p := newPair(t, 8, nil)
	slot, _ := p.Take(7)
	p.Push(slot, &nvme.Command{})
	before := p.CID(slot)
	p.cq.Post([]ring.Entry{ring.MakeEntry(0, 0, qid, before+8, nvme.StatusSuccess)})
	var out [4]Completion
	if _, err := p.Reap(out[:]); !errors.Is(err, ErrProtocol) || !errors.Is(p.Publish(), ErrProtocol) {
		t.Fatalf("a completion of nothing: %v", err)
	}
	var dropped []uint64
	p.Drop(func(tag uint64) { dropped = append(dropped, tag) })
	if len(dropped) != 1 || dropped[0] != 7 || p.Outstanding() != 0 {
		t.Fatalf("dropped %d", dropped)
	}
	for _, r := range []interface{ Zero(off, n uint64) error }{p.sqMem, p.cqMem} {
		if err := r.Zero(0, 8*16); err != nil {
			t.Fatal(err)
		}
	}
	bell := func(uint32) error { return nil }
	if err := p.Renew(dbbuf.NewMMIO(bell), dbbuf.NewMMIO(bell)); err != nil {
		t.Fatal(err)
	}
	slot, _ = p.Take(8)
	p.Push(slot, &nvme.Command{})
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	if p.CID(slot) == before {
		t.Fatal("the identifier of a command from before the reset")
	}
	cq, err := ring.NewCQProducer(p.cqMem, 8)
	if err != nil {
		t.Fatal(err)
	}
	cq.Post([]ring.Entry{ring.MakeEntry(0, 1, qid, p.CID(slot), nvme.StatusSuccess)})
	if n, err := p.Reap(out[:]); n != 1 || err != nil || out[0].Tag != 8 {
		t.Fatalf("%d completions, %v", n, err)
	}
}
