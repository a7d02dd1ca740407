package hostnvme

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// TestMemoryIsMappedOnce has several queues tell of the same memory.
func TestMemoryIsMappedOnce(t *testing.T) {
	var log []string
	m := NewMemory(&scattered{
		place: func([]byte) (uint64, error) { log = append(log, "map"); return 1 << 40, nil },
		unmap: func(iova, size uint64) error {
			if iova != 1<<40 || size != 4*page {
				t.Errorf("unmap %#x, +%#x", iova, size)
			}
			log = append(log, "unmap")
			return nil
		},
	}, hclog.NewNullLogger())
	mem := heap(t, 4*page)
	f := finder{m: m}
	find := func() (iova, left uint64) {
		f.refresh()
		return f.find(blockOf(mem[512:]).base)
	}
	for range 3 {
		m.add(mem)
	}
	m.Settle(patience)
	if iova, left := find(); iova != 1<<40+512 || left != 4*page-512 {
		t.Fatalf("%#x, +%#x", iova, left)
	}
	if s := m.State(); s != (MemoryState{Mapped: 4 * page}) {
		t.Fatalf("%+v", s)
	}
	m.remove(mem)
	m.remove(mem)
	if _, left := find(); left == 0 {
		t.Fatal("gone while it is wanted")
	}
	m.remove(mem)
	if _, left := find(); left != 0 {
		t.Fatal("found after it was taken back")
	}
	m.Settle(patience)
	m.remove(mem) // once too often
	m.add(mem)
	m.Settle(patience)
	m.remove(mem)
	m.Settle(patience)
	if want := []string{"map", "unmap", "map", "unmap"}; !slices.Equal(log, want) {
		t.Fatalf("%v", log)
	}
}

// TestMemoryTakenBackBeforeItWasMapped ends the wish for memory while the kernel pins it, and before.
func TestMemoryTakenBackBeforeItWasMapped(t *testing.T) {
	begun, goOn := make(chan bool), make(chan bool)
	var maps, unmaps atomic.Int32
	m := NewMemory(&scattered{
		place: func([]byte) (uint64, error) { maps.Add(1); begun <- true; <-goOn; return 1 << 40, nil },
		unmap: func(iova, size uint64) error { unmaps.Add(1); return nil },
	}, hclog.NewNullLogger())
	first, second := heap(t, page), heap(t, page)
	m.add(first)
	<-begun
	m.add(second)
	if s := m.State(); s != (MemoryState{Pending: 2}) {
		t.Fatalf("%+v", s)
	}
	m.remove(first)
	m.remove(second)
	goOn <- true
	m.Settle(patience)
	f := finder{m: m}
	f.refresh()
	if _, left := f.find(blockOf(first).base); left != 0 || maps.Load() != 1 || unmaps.Load() != 1 {
		t.Fatalf("%d bytes found, %d maps, %d unmaps", left, maps.Load(), unmaps.Load())
	}
}

// TestMemoryThatCannotBeMapped is copied, and nothing of it is found.
func TestMemoryThatCannotBeMapped(t *testing.T) {
	var refuse error
	n := uint64(0)
	m := NewMemory(&scattered{place: func([]byte) (uint64, error) { n++; return n << 30, refuse }}, hclog.NewNullLogger())
	mem := heap(t, 8*page)
	m.add(mem[:4*page])
	m.add(mem[2*page:]) // overlaps
	m.Settle(patience)
	refuse = errors.New("no")
	m.add(mem[4*page:])
	m.Settle(patience)
	f := finder{m: m}
	f.refresh()
	if s := m.State(); s != (MemoryState{Mapped: 4 * page, Failed: 2}) {
		t.Fatalf("%+v", s)
	}
	if _, left := f.find(blockOf(mem[4*page:]).base); left != 0 {
		t.Fatal("found")
	}
	m.remove(mem[4*page:])
	m.remove(mem[2*page:])
	m.remove(mem[:4*page])
	m.Settle(patience)
	if s := m.State(); s != (MemoryState{}) {
		t.Fatalf("%+v", s)
	}
}

// TestMemoryDoesNotFloodTheLog: a client that maps and unmaps all the time what cannot be pinned is told of now and then.
func TestMemoryDoesNotFloodTheLog(t *testing.T) {
	var log bytes.Buffer
	m := NewMemory(&scattered{place: func([]byte) (uint64, error) { return 0, errors.New("no") }}, hclog.New(&hclog.LoggerOptions{Output: &log}))
	mem := heap(t, page)
	for range 50 {
		m.add(mem)
		m.Settle(patience)
		m.remove(mem)
	}
	m.mu.Lock()
	m.warned = m.warned.Add(-warnEvery)
	m.mu.Unlock()
	m.add(mem)
	m.Settle(patience)
	if n := strings.Count(log.String(), "its data is copied"); n != 2 || !strings.Contains(log.String(), "left_out=49") {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

// TestMemoryBeyondTheBound is not pinned, until other memory is taken back.
func TestMemoryBeyondTheBound(t *testing.T) {
	maps := 0
	m := NewMemory(&scattered{place: func(b []byte) (uint64, error) { maps++; return uint64(maps) << 30, nil }}, hclog.NewNullLogger())
	if m.most == 0 {
		t.Fatal("nothing may be pinned")
	}
	m.most = 5 * page
	mem := heap(t, 9*page)
	m.add(mem[:4*page])
	m.add(mem[4*page : 6*page])
	m.add(mem[6*page:])
	m.add(mem[8*page:][:page])
	m.Settle(patience)
	if s := m.State(); s != (MemoryState{Mapped: 5 * page, Failed: 2}) || maps != 2 {
		t.Fatalf("%+v, %d maps", s, maps)
	}
	m.remove(mem[:4*page])
	m.remove(mem[4*page : 6*page])
	m.add(mem[4*page : 6*page])
	m.Settle(patience)
	if s := m.State(); s != (MemoryState{Mapped: 3 * page, Failed: 1}) {
		t.Fatalf("%+v", s)
	}
}

// TestFindersWhileMemoryChanges looks up what stays while other memory comes and goes.
func TestFindersWhileMemoryChanges(t *testing.T) {
	m := NewMemory(&scattered{place: func(b []byte) (uint64, error) { return blockOf(b).base + 1<<50, nil }}, hclog.NewNullLogger())
	mem := heap(t, 64*page)
	for i := 0; i < 64; i += 2 {
		m.add(mem[i*page : (i+1)*page])
	}
	m.Settle(patience)
	var wg sync.WaitGroup
	var stop atomic.Bool
	for w := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f := finder{m: m}
			for i := w; !stop.Load(); i++ {
				f.refresh()
				at := blockOf(mem[i%32*2*page+i%page:]).base
				if iova, left := f.find(at); iova != at+1<<50 || left != uint64(page-i%page) {
					t.Errorf("%#x: %#x, +%#x", at, iova, left)
					return
				}
			}
		}()
	}
	for i := range 500 {
		at := i%32*2 + 1
		m.add(mem[at*page : (at+1)*page])
		m.Settle(patience)
		m.remove(mem[at*page : (at+1)*page])
	}
	stop.Store(true)
	wg.Wait()
	m.Settle(patience)
}
