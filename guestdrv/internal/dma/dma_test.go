package dma

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func newPool(t testing.TB, pages int) *Pool {
	t.Helper()
	p, err := NewPool(shm.NewHeap(pages*PageSize), 1<<32)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestBlocksNeverOverlap runs random takes and gives against a map of pages, on pools that are no power of two too.
func TestBlocksNeverOverlap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.IntRange(1, 300).Draw(t, "pages")
		p, err := NewPool(shm.NewHeap(pages*PageSize), 0)
		if err != nil {
			t.Fatal(err)
		}
		used := make([]bool, pages)
		var live []Block
		inUse := 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			if len(live) > 0 && rapid.Bool().Draw(t, "give") {
				i := rapid.IntRange(0, len(live)-1).Draw(t, "which")
				b := live[i]
				live = append(live[:i], live[i+1:]...)
				for j := b.Off / PageSize; j < (b.Off+b.Len)/PageSize; j++ {
					used[j] = false
				}
				inUse -= int(b.Len / PageSize)
				p.Give(b)
				continue
			}
			n := rapid.IntRange(1, 40).Draw(t, "n")
			b, err := p.Take(uint64(n * PageSize))
			if longest := longestGap(used); (err == nil) != (n <= longest) {
				t.Fatalf("%d pages with %d free in one piece: %v", n, longest, err)
			}
			if err != nil {
				continue
			}
			if b.Len != uint64(n*PageSize) || b.Off+b.Len > p.Size() {
				t.Fatalf("block %+v for %d pages", b, n)
			}
			for j := b.Off / PageSize; j < (b.Off+b.Len)/PageSize; j++ {
				if used[j] {
					t.Fatalf("page %d twice", j)
				}
				used[j] = true
			}
			live = append(live, b)
			inUse += n
		}
		if got := int(p.Free() / PageSize); got != pages-inUse {
			t.Fatalf("%d pages free, want %d", got, pages-inUse)
		}
		for _, b := range live {
			p.Give(b)
		}
		// Everything has merged again.
		if b, err := p.Take(uint64(pages) * PageSize); err != nil {
			t.Fatalf("after all is back: %v", err)
		} else {
			p.Give(b)
		}
	})
}

func longestGap(used []bool) (longest int) {
	run := 0
	for _, u := range used {
		if run++; u {
			run = 0
		}
		longest = max(longest, run)
	}
	return longest
}

func TestNoMemoryNamesTheOption(t *testing.T) {
	p := newPool(t, 8)
	if _, err := p.Take(9 * PageSize); !errors.Is(err, ErrNoMemory) || !strings.Contains(err.Error(), "DMASize") {
		t.Fatalf("got %v", err)
	}
	if _, err := p.Take(0); err == nil {
		t.Fatal("a block of 0 bytes")
	}
	if _, err := p.Take(1<<64 - 1); !errors.Is(err, ErrNoMemory) {
		t.Fatalf("got %v", err)
	}
}

func TestFreedBufferWaitsForItsCommands(t *testing.T) {
	p := newPool(t, 64)
	first, err := p.NewBuffer(3 * PageSize)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.NewBuffer(5*PageSize + 1)
	if err != nil {
		t.Fatal(err)
	}
	free := p.Free()
	off, ok := p.Find(b.Bytes()[PageSize : 2*PageSize])
	if !ok || off+1<<32 != b.IOVA()+PageSize {
		t.Fatalf("found at %#x, %v", off, ok)
	}
	pinned, err := p.Pin(off, PageSize)
	if err != nil || pinned != b {
		t.Fatalf("pinned %p, %v", pinned, err)
	}
	if !b.Free() || b.Free() {
		t.Fatal("Free must say which call was the first")
	}
	if p.Free() != free {
		t.Fatal("memory came back with a command under way")
	}
	if _, err := p.Pin(off, PageSize); !errors.Is(err, ErrFreed) {
		t.Fatalf("pin of a freed buffer: %v", err)
	}
	b.Unpin()
	if p.Free() != free+6*PageSize {
		t.Fatal("memory did not come back")
	}
	if off, ok := p.Find(first.Bytes()); !ok {
		t.Fatal("lost")
	} else if _, err := p.Pin(off, 4*PageSize); err == nil {
		t.Fatal("pinned more than the buffer has")
	}
	if _, ok := p.Find(make([]byte, 8)); ok {
		t.Fatal("heap memory found in the pool")
	}
	first.Free()
	if p.Free() != p.Size() {
		t.Fatalf("%d of %d bytes free", p.Free(), p.Size())
	}
}

func TestPinFindsLargeBuffersFromAnywhere(t *testing.T) {
	p := newPool(t, 1000)
	b, err := p.NewBuffer(700 * PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for page := range 700 {
		off, _ := p.Find(b.Bytes()[page*PageSize : (page+1)*PageSize])
		got, err := p.Pin(off, PageSize)
		if err != nil || got != b {
			t.Fatalf("page %d: %p, %v", page, got, err)
		}
		got.Unpin()
	}
}

func TestBounceTakesLessThenWaits(t *testing.T) {
	p := newPool(t, 8)
	ctx := context.Background()
	b, err := p.TakeBounce(ctx, nil, 16*PageSize, PageSize)
	if err != nil || b.Len != 8*PageSize {
		t.Fatalf("%+v, %v", b, err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := p.TakeBounce(short, nil, PageSize, PageSize); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	got := make(chan error, 1)
	go func() {
		b, err := p.TakeBounce(ctx, nil, PageSize, PageSize)
		if err == nil {
			p.GiveBounce(b)
		}
		got <- err
	}()
	time.Sleep(5 * time.Millisecond)
	p.GiveBounce(b)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	// Nobody will give anything back when callers hold it all.
	held, err := p.NewBuffer(8 * PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Free()
	if _, err := p.TakeBounce(ctx, nil, PageSize, PageSize); !errors.Is(err, ErrNoMemory) {
		t.Fatalf("got %v", err)
	}
	if _, ok := p.TryBounce(PageSize, PageSize); ok {
		t.Fatal("bounce memory from nothing")
	}
}

func TestTakeDoesNotAllocate(t *testing.T) {
	p := newPool(t, 64)
	if n := testing.AllocsPerRun(100, func() {
		b, err := p.Take(3 * PageSize)
		if err != nil {
			t.Fatal(err)
		}
		p.Give(b)
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func BenchmarkTakeGive(b *testing.B) {
	p := newPool(b, 16384)
	for b.Loop() {
		blk, err := p.Take(PageSize)
		if err != nil {
			b.Fatal(err)
		}
		p.Give(blk)
	}
}
