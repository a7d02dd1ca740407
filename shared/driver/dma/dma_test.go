package dma

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func newPool(t testing.TB, pages int) *Pool {
	t.Helper()
	p, err := NewPool(device.NewDMARegion(shm.NewHeap(pages*PageSize), 1<<32, nil), "raise DMASize")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestBlocksNeverOverlap runs random takes and gives against a map of pages, on pools that are no power of two too.
func TestBlocksNeverOverlap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.IntRange(1, 300).Draw(t, "pages")
		checkBlocks(t, device.NewDMARegion(shm.NewHeap(pages*PageSize), 0, nil), pages)
	})
}

// TestBlocksStayInTheirRun is TestBlocksNeverOverlap on memory that the device has in runs.
func TestBlocksStayInTheirRun(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		run := 1 << rapid.IntRange(0, 6).Draw(t, "order")
		pages := rapid.IntRange(run+1, 8*run).Draw(t, "pages")
		iovas := make([]uint64, (pages+run-1)/run)
		for i := range iovas {
			// Some follow one another all the same.
			iovas[i] = uint64(rapid.IntRange(0, 9).Draw(t, "at")) * uint64(run*PageSize)
		}
		mem, err := device.NewDMARuns(shm.NewHeap(pages*PageSize), uint64(run*PageSize), iovas, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkBlocks(t, mem, run)
	})
}

// checkBlocks takes and gives at random, on memory whose runs have run pages, and finds everything merged again at the end.
func checkBlocks(t *rapid.T, mem *device.DMARegion, run int) {
	p, err := NewPool(mem, "")
	if err != nil {
		t.Fatal(err)
	}
	pages := int(mem.Len() / PageSize)
	if p.Largest() != uint64(run*PageSize) {
		t.Fatalf("at most %d bytes, the runs are of %d pages", p.Largest(), run)
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
		if longest := longestGap(used, run); (err == nil) != (n <= longest) {
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
			if got, want := p.IOVA(j*PageSize), p.IOVA(b.Off)+j*PageSize-b.Off; got != want {
				t.Fatalf("page %d of block %+v is at %#x for the device, not contiguous: %#x", j, b, got, want)
			}
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
	for rest := pages; rest > 0; rest -= run {
		if _, err := p.Take(uint64(min(rest, run)) * PageSize); err != nil {
			t.Fatalf("after all is back, with %d pages left: %v", rest, err)
		}
	}
}

// longestGap is within one run.
func longestGap(used []bool, run int) (longest int) {
	gap := 0
	for i, u := range used {
		if i%run == 0 {
			gap = 0
		}
		if gap++; u {
			gap = 0
		}
		longest = max(longest, gap)
	}
	return longest
}

func TestRunsAreTranslated(t *testing.T) {
	const run = 4 * PageSize
	mem := shm.NewHeap(11 * PageSize)
	r, err := device.NewDMARuns(mem, run, []uint64{0x70000, 0x10000, 0x90000}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for off, want := range map[uint64]uint64{0: 0x70000, run - 1: 0x73fff, run: 0x10000, 2*run + 5: 0x90005} {
		if got := r.IOVAOf(off); got != want {
			t.Errorf("byte %#x is at %#x, want %#x", off, got, want)
		}
	}
	for _, bad := range []struct {
		run  uint64
		runs int
	}{{3 * PageSize, 4}, {PageSize / 2, 22}, {0, 1}, {run, 2}, {run, 4}, {run, 0}} {
		if _, err := device.NewDMARuns(mem, bad.run, make([]uint64, bad.runs), nil); err == nil {
			t.Errorf("11 pages in %d runs of %d bytes", bad.runs, bad.run)
		}
	}
	if one, err := device.NewDMARuns(mem, 16*PageSize, []uint64{1 << 20}, nil); err != nil || one.Contiguous != 0 || one.IOVAOf(5) != 1<<20+5 {
		t.Errorf("one run: %+v, %v", one, err)
	}
}

func TestBufferLongerThanARunIsRefused(t *testing.T) {
	const run = 4 * PageSize
	mem, err := device.NewDMARuns(shm.NewHeap(4*run), run, make([]uint64, 4), nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPool(mem, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.NewBuffer(run + 1); !errors.Is(err, ErrNoMemory) || !strings.Contains(err.Error(), "over 16384 bytes at most") {
		t.Fatalf("got %v", err)
	}
	b, err := p.NewBuffer(run)
	if err != nil {
		t.Fatal(err)
	}
	b.Free()
}

func TestNoMemoryNamesTheRemedy(t *testing.T) {
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
