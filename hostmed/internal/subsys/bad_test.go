package subsys

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// TestBadModel marks and unmarks random ranges, in a namespace and block by block.
func TestBadModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 64
		n := Alone(1, nil, backend.Info{Blocks: blocks})
		var model [blocks]bool
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			count := rapid.Uint64Range(1, blocks).Draw(t, "count")
			first := rapid.Uint64Range(0, blocks-count).Draw(t, "first")
			mark := rapid.Bool().Draw(t, "mark")
			before := badOf(n)
			was := slices.Clone(before)
			if mark {
				if !n.Mark(first, count) {
					t.Fatal("not marked")
				}
			} else {
				n.Unmark(first, count)
			}
			if !slices.Equal(before, was) {
				t.Fatal("a gate that somebody may be looking at has changed")
			}
			for i := first; i < first+count; i++ {
				model[i] = mark
			}
			check(t, n, model[:])
		}
	})
}

func badOf(n *Namespace) []Range {
	if g := n.Gate(); g != nil {
		return g.Bad
	}
	return nil
}

func check(t *rapid.T, n *Namespace, model []bool) {
	bad := badOf(n)
	for i, r := range bad {
		if r.First > r.Last || i > 0 && r.First <= bad[i-1].Last+1 {
			t.Fatalf("not rising, or touching: %v", bad)
		}
	}
	g := n.Gate()
	if (g == nil) == slices.Contains(model, true) {
		t.Fatalf("gate %v", g)
	}
	for first := range uint64(len(model)) {
		for _, count := range []uint64{1, 2, 7, uint64(len(model)) - first} {
			if first+count > uint64(len(model)) {
				continue
			}
			want := slices.Contains(model[first:first+count], true)
			if g != nil && g.Marked(first, count) != want || g == nil && want {
				t.Fatalf("%d blocks from %d: marked %v, want %v; %v", count, first, !want, want, bad)
			}
		}
	}
}

func TestBadLimits(t *testing.T) {
	n := Alone(1, nil, backend.Info{Blocks: 1 << 40})
	for i := range uint64(MaxBad) {
		if !n.Mark(i*2, 1) {
			t.Fatalf("range %d", i)
		}
	}
	if n.Mark(1<<30, 1) || len(n.Gate().Bad) != MaxBad {
		t.Error("one too many was marked")
	}
	if !n.Mark(1, 1) || len(n.Gate().Bad) != MaxBad-1 {
		t.Error("a block between two was not")
	}
	if !n.Mark(0, 1<<40) || len(n.Gate().Bad) != 1 {
		t.Error("everything was not")
	}
	n.Unmark(0, 1<<40)
	if n.Gate() != nil {
		t.Error("the gate is closed for nothing")
	}
	// The highest block there can be.
	if !n.Mark(^uint64(0), 1) || !n.Gate().Marked(^uint64(0), 1) || n.Gate().Marked(0, 1) {
		t.Error("the last block of 2^64")
	}
	if !n.Mark(^uint64(0)-1, 1) || len(n.Gate().Bad) != 1 {
		t.Error("its neighbour")
	}
}
