package backend

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestModel compares random sequences of operations with a byte slice.
func TestModel(t *testing.T) {
	const size, lba = 256 << 10, 512
	for _, f := range slices.Concat(flavours, spared) {
		t.Run(f.name, func(t *testing.T) {
			b := f.open(t, size, lba)
			q := newQueue(t, b)
			mem := guestMemory(t, size+64<<10)
			model := make([]byte, size)
			reset := write(0, make([]byte, size))
			rapid.Check(t, func(rt *rapid.T) {
				clear(model)
				mustRun(t, q, reset)
				rt.Repeat(map[string]func(*rapid.T){
					"write": func(rt *rapid.T) {
						off, n := drawRange(rt, size/lba, lba)
						pattern(mem[:n+64], uint64(rapid.Uint16().Draw(rt, "seed")))
						vec, want := drawPieces(rt, mem, n)
						r := &Request{Op: OpWrite, Off: off, Len: n, Vec: vec, FUA: rapid.IntRange(0, 9).Draw(rt, "fua") == 0}
						mustRun(t, q, r)
						copy(model[off:], want)
					},
					"read": func(rt *rapid.T) {
						off, n := drawRange(rt, size/lba, lba)
						vec, _ := drawPieces(rt, mem, n)
						mustRun(t, q, &Request{Op: OpRead, Off: off, Len: n, Vec: vec})
						var got []byte
						for i := range vec {
							got = append(got, segBytes(&vec[i])...)
						}
						if !bytes.Equal(got, model[off:off+n]) {
							rt.Fatalf("read of %#x bytes at %#x differs", n, off)
						}
					},
					"zero": func(rt *rapid.T) {
						off, n := drawRange(rt, size/lba, lba)
						op := rapid.SampledFrom([]Op{OpWriteZeroes, OpDiscard}).Draw(rt, "op")
						mustRun(t, q, &Request{Op: op, Off: off, Len: n, Dealloc: rapid.Bool().Draw(rt, "dealloc")})
						if op == OpDiscard && !b.Info().DiscardZeroes {
							mustRun(t, q, read(off, mem[:n]))
							copy(model[off:], mem[:n])
						} else {
							clear(model[off : off+n])
						}
					},
					"flush": func(*rapid.T) { mustRun(t, q, &Request{Op: OpFlush}) },
					"out of range": func(rt *rapid.T) {
						r := write(size-lba, mem[:2*lba])
						run(t, q, r)
						if r.Status.Code() != nvme.StatusLBAOutOfRange {
							rt.Fatal(r.Status)
						}
					},
				})
				mustRun(t, q, read(0, mem[:size]))
				if !bytes.Equal(mem[:size], model) {
					rt.Fatal("contents differ at the end")
				}
			})
		})
	}
}

func drawRange(t *rapid.T, blocks, lba uint64) (off, n uint64) {
	first := rapid.Uint64Range(0, blocks-1).Draw(t, "first")
	count := rapid.Uint64Range(1, min(blocks-first, 80)).Draw(t, "count")
	return first * lba, count * lba
}

// drawPieces cuts the first n bytes of mem, or those from some dword on, into pieces.
func drawPieces(t *rapid.T, mem []byte, n uint64) (vec []Seg, flat []byte) {
	skip := rapid.SampledFrom([]uint64{0, 0, 4, 512}).Draw(t, "skip")
	mem = mem[skip : skip+n]
	for at := uint64(0); at < n; {
		k := n - at
		if rapid.Bool().Draw(t, "cut") {
			k = min(k, 4*rapid.Uint64Range(1, 4096).Draw(t, "dwords"))
		}
		vec = append(vec, seg(mem[at:at+k]))
		at += k
	}
	return vec, mem
}

func TestPageCacheBits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const pages = 300
		p := openPages(-1, pages<<pageShift, false)
		p.data = []byte{0}
		model := make([]bool, pages)
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				off, n := drawRange(t, pages*8, 512)
				want := true
				for i := off >> pageShift; i <= (off+n-1)>>pageShift; i++ {
					want = want && model[i]
				}
				if p.has(off, n) != want {
					t.Fatalf("pages of [%#x, +%#x): %v", off, n, !want)
				}
			},
			"change": func(t *rapid.T) {
				off, n := drawRange(t, pages*8, 512)
				n = min(n*rapid.Uint64Range(1, 20).Draw(t, "times"), pages<<pageShift-off)
				on := rapid.Bool().Draw(t, "on")
				if on {
					p.set(off, n)
				} else {
					p.clear(off, n)
				}
				for i := off >> pageShift; i <= (off+n-1)>>pageShift; i++ {
					model[i] = on
				}
			},
		})
	})
}

func TestFifo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var f fifo[int]
		var model []int
		next := 0
		t.Repeat(map[string]func(*rapid.T){
			"push": func(*rapid.T) {
				f.push(next)
				model = append(model, next)
				next++
			},
			"pop": func(t *rapid.T) {
				if len(model) == 0 {
					t.Skip()
				}
				if got := f.pop(); got != model[0] || f.n != len(model)-1 {
					t.Fatalf("popped %d of %d, want %d", got, f.n, model[0])
				}
				model = model[1:]
			},
		})
	})
}
