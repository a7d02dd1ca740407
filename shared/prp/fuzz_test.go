package prp

import (
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// hostile serves list entries from a finite script that never repeats itself, then refuses.
type hostile struct {
	script []byte
	reads  int
	bytes  int
}

func (h *hostile) ReadIOVA(_ uint64, dst []byte) bool {
	h.reads++
	h.bytes += len(dst)
	if len(h.script) == 0 {
		return false
	}
	for i := range dst {
		dst[i] = 0
		// Page-aligned values let a walk go far; the script decides the rest.
		if i%EntrySize != 0 && len(h.script) > 0 {
			dst[i] = h.script[0] &^ 0x0F
			h.script = append(h.script[1:], h.script[0]+1)
		}
	}
	return true
}

func FuzzWalk(f *testing.F) {
	f.Add(uint64(0x1000), uint64(0x2000), uint32(4096), uint8(0), uint16(256), []byte(nil))
	f.Add(uint64(0x1FFC), uint64(0x8FF8), uint32(1<<20), uint8(0), uint16(300), []byte{0, 0x10, 0x20, 0x30})
	f.Add(^uint64(0)&^3, ^uint64(0)&^7, ^uint32(0), uint8(15), uint16(65535), []byte{0xFF})
	f.Add(uint64(0), uint64(0), uint32(0), uint8(4), uint16(0), []byte{1})
	f.Fuzz(func(t *testing.T, prp1, prp2 uint64, length uint32, shift uint8, maxPages uint16, script []byte) {
		pageSize := uint32(1) << (12 + shift%16)
		mem := &hostile{script: append([]byte(nil), script...)}
		out, status := Walk(prp1, prp2, length, pageSize, int(maxPages), mem, nil)
		if !status.OK() {
			if len(out) != 0 {
				t.Fatalf("%v and yet %d extents", status, len(out))
			}
		} else {
			checkExtents(t, out, length, int(maxPages))
		}
		if limit := (2*int(maxPages) + 2) * EntrySize; mem.bytes > limit {
			t.Fatalf("%d bytes of list read in %d reads, limit %d", mem.bytes, mem.reads, limit)
		}
	})
}

func checkExtents(t *testing.T, out []Extent, length uint32, maxPages int) {
	t.Helper()
	if len(out) > maxPages {
		t.Fatalf("%d extents, at most %d pages allowed", len(out), maxPages)
	}
	sum := uint64(0)
	for _, e := range out {
		if e.Len == 0 || e.IOVA+uint64(e.Len)-1 < e.IOVA {
			t.Fatalf("impossible extent %#x", e)
		}
		sum += uint64(e.Len)
	}
	if sum != uint64(length) {
		t.Fatalf("extents of %d bytes, asked for %d", sum, length)
	}
}

func FuzzBuild(f *testing.F) {
	f.Add(uint64(0x1000), uint32(4096), uint8(0), uint16(4096), uint16(0))
	f.Add(uint64(0x1FFC), uint32(1<<20), uint8(0), uint16(8192), uint16(511))
	f.Fuzz(func(t *testing.T, iova uint64, length uint32, shift uint8, listSize, slot uint16) {
		pageSize := uint32(1) << (12 + shift%16)
		list := listMemory(uint64(slot)*EntrySize, int(listSize))
		var cmd nvme.Command
		if Build(&cmd, iova, length, pageSize, list) != nil {
			return
		}
		out, status := Walk(cmd.PRP1, cmd.PRP2, length, pageSize, many, list, nil)
		if !status.OK() || length != 0 && (len(out) != 1 || out[0] != Extent{iova, length}) {
			t.Fatalf("Build of %#x+%#x walks to %#x, %v", iova, length, out, status)
		}
	})
}
