package subsys

import (
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/state"
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

// TestBadIsKept has marks outlive their subsystem, where the content does, and nothing else does.
func TestBadIsKept(t *testing.T) {
	store := state.NewMemory()
	file := func(lba string) (backend.Spec, backend.Backend) {
		spec, err := backend.ParseSpec("file:" + filepath.Join(t.TempDir(), "disk.img") + ",size=1MiB" + lba)
		if err != nil {
			t.Fatal(err)
		}
		b, err := backend.OpenSpec(spec, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		spec.Path = "disk" // the same one each time, as far as the store is concerned
		return spec, b
	}
	open := func(lba string) (*Subsystem, *Namespace) {
		spec, b := file(lba)
		s := New(Config{NQN: "nqn.test", Workers: &fakeWorkers{}, Store: store})
		return s, s.AddNamespace(NamespaceConfig{NSID: 1, Backend: b, Spec: spec})
	}
	s, n := open("")
	n.Mark(10, 5)
	n.Mark(100, 1)
	n.Unmark(12, 1)
	s.Close() // waits until it is saved
	want := []Range{{10, 11}, {13, 14}, {100, 100}}
	s, n = open("")
	if got := badOf(n); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	// With other blocks they are no longer about this medium.
	s2, other := open(",lba=4096")
	if got := badOf(other); got != nil {
		t.Errorf("%v of blocks of 4096", got)
	}
	s2.Close()
	n.Unmark(0, 1000)
	s.Close()
	s, n = open("")
	if n.Gate() != nil {
		t.Errorf("%v after all were written", badOf(n))
	}
	s.Close()
	// What is in memory ends with hostmed, and so do its marks.
	for range 2 {
		s := New(Config{NQN: "nqn.test", Workers: &fakeWorkers{}, Store: store})
		b := openMem(t, "mem:size=1MiB")
		n := s.AddNamespace(NamespaceConfig{NSID: 2, Backend: b, Spec: backend.Spec{Kind: backend.KindMem}})
		if n.Gate() != nil {
			t.Errorf("%v of memory", badOf(n))
		}
		n.Mark(1, 1)
		s.Close()
	}
}
