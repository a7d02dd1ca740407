package backend

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

const testSize = 8 << 20

// TestConformance is what every backend that stores must do alike; short, with one size of blocks each.
func TestConformance(t *testing.T) {
	cases := []struct {
		name string
		run  func(*testing.T, Backend)
	}{
		{"fresh blocks are zero", freshIsZero},
		{"what is written is read", writeRead},
		{"any pieces of memory", pieces},
		{"more pieces than the kernel takes", manyPieces},
		{"both ends", bothEnds},
		{"zeroes", zeroes},
		{"discard", discard},
		{"flush and FUA", flushes},
		{"more than fits at once", flood},
		{"several queues", queues},
		{"wrong requests", wrongRequests},
	}
	sizes := []uint32{512, 4096, 65536}
	for i, f := range slices.Concat(flavours, devices, ownDevices, spared) {
		for _, lba := range sizes {
			if testing.Short() && lba != sizes[i%len(sizes)] {
				continue
			}
			t.Run(fmt.Sprintf("%s/lba %d", f.name, lba), func(t *testing.T) {
				for _, c := range cases {
					t.Run(c.name, func(t *testing.T) {
						b := f.open(t, testSize, lba)
						if i := b.Info(); i.Size() != testSize || i.LBASize() != uint64(lba) {
							t.Fatalf("size %d, LBA %d", i.Size(), i.LBASize())
						}
						c.run(t, b)
					})
				}
			})
		}
	}
}

func freshIsZero(t *testing.T, b Backend) {
	q := newQueue(t, b)
	mem := pattern(guestMemory(t, 1<<20), 1)
	mustRun(t, q, read(0, mem[:512<<10]), read(testSize-512<<10, mem[512<<10:]))
	expect(t, mem, make([]byte, len(mem)), "never written")
}

func writeRead(t *testing.T, b Backend) {
	q := newQueue(t, b)
	lba := int(b.Info().LBASize())
	out, in := pattern(guestMemory(t, 1<<20), 2), guestMemory(t, 1<<20)
	for _, n := range []int{lba, 2 * lba, 128 << 10, 1 << 20} {
		off := uint64(3 * lba)
		mustRun(t, q, write(off, out[:n]))
		mustRun(t, q, read(off, in[:n]))
		expect(t, in[:n], out[:n], fmt.Sprint(n, " bytes"))
		clear(in)
	}
	// A batch of single blocks, all of which another batch reads.
	var w, r []*Request
	for i := range 64 {
		off := uint64((7 * i % 64) * lba)
		w = append(w, write(off, out[i*lba%len(out):][:lba]))
		r = append(r, read(off, in[i*lba%len(in):][:lba]))
	}
	if 64*lba <= len(out) {
		mustRun(t, q, w...)
		mustRun(t, q, r...)
		expect(t, in[:64*lba], out[:64*lba], "batch")
	}
}

// pieces transfers to memory of any alignment that PRPs allow: multiples of 4.
func pieces(t *testing.T, b Backend) {
	q := newQueue(t, b)
	out, in := pattern(guestMemory(t, 1<<20), 3), guestMemory(t, 1<<20)
	for _, cuts := range [][]int{
		{0, 65536},
		{512, 66048},
		{4, 65540},
		{0, 4096, 8192, 65536},
		{0, 512, 4096, 65536},
		{2048, 4096, 8192, 67584},
		{4, 100, 8192, 9000, 65540},
	} {
		var from, into [][]byte
		for i := range cuts[1:] {
			// Pieces that follow each other on the disk do not in memory.
			at := cuts[i] + i*8192
			from = append(from, out[at:at+cuts[i+1]-cuts[i]])
			into = append(into, in[at:at+cuts[i+1]-cuts[i]])
		}
		mustRun(t, q, write(65536, from...))
		mustRun(t, q, read(65536, into...))
		for i := range from {
			expect(t, into[i], from[i], fmt.Sprintf("cuts %v, piece %d", cuts, i))
		}
		clear(in)
	}
	// Longer than a bounce buffer, and more at a time than there are.
	var w, r []*Request
	for i := range 20 {
		n := 320 << 10
		w = append(w, write(uint64(i*n), out[i*4+4:][:n]))
		r = append(r, read(uint64(i*n), in[4:][:n]))
	}
	mustRun(t, q, w...)
	for i := range r {
		mustRun(t, q, r[i])
		expect(t, in[4:][:320<<10], out[i*4+4:][:320<<10], "unaligned")
	}
}

func manyPieces(t *testing.T, b Backend) {
	q := newQueue(t, b)
	mem := pattern(guestMemory(t, 4<<20), 4)
	got := guestMemory(t, 2<<20)
	const n, size = 2048, 1024
	w, r := &Request{Op: OpWrite, Len: n * size}, &Request{Op: OpRead, Len: n * size}
	want := make([]byte, 0, n*size)
	for i := range n {
		p := mem[(n-1-i)*2*size:][:size]
		w.Vec = append(w.Vec, seg(p))
		want = append(want, p...)
		r.Vec = append(r.Vec, seg(got[i*size:][:size]))
	}
	mustRun(t, q, w)
	mustRun(t, q, r)
	expect(t, got, want, "2048 pieces")
}

func bothEnds(t *testing.T, b Backend) {
	q := newQueue(t, b)
	lba := b.Info().LBASize()
	mem := pattern(guestMemory(t, 1<<18), 5)
	got := guestMemory(t, 1<<18)
	last := testSize - lba
	mustRun(t, q, write(0, mem[:lba]), write(last, mem[lba:2*lba]))
	mustRun(t, q, read(0, got[:lba]), read(last, got[lba:2*lba]))
	expect(t, got[:2*lba], mem[:2*lba], "ends")
	for _, r := range []*Request{
		read(testSize, mem[:lba]), write(last, mem[:2*lba]), read(^uint64(0)-lba+1, mem[:lba]),
		{Op: OpDiscard, Off: last, Len: 2 * lba}, {Op: OpWriteZeroes, Off: lba, Len: ^uint64(0) - lba + 1},
	} {
		run(t, q, r)
		if r.Status.Code() != nvme.StatusLBAOutOfRange {
			t.Errorf("%v at %#x of %#x bytes: %v", r.Op, r.Off, r.Len, r.Status)
		}
	}
}

func zeroes(t *testing.T, b Backend) {
	lba := b.Info().LBASize()
	filled, got := pattern(guestMemory(t, 4<<20), 6), guestMemory(t, 4<<20)
	want := make([]byte, len(filled))
	for _, r := range []Request{
		{}, {Dealloc: true}, {FUA: true}, {Dealloc: true, FUA: true},
	} {
		q := newQueue(t, b)
		for _, span := range [][2]uint64{{lba, lba}, {3 * lba, 9 * lba}, {0, 2 << 20}, {lba, 3 << 20}} {
			mustRun(t, q, write(0, filled))
			z := r
			z.Op, z.Off, z.Len = OpWriteZeroes, span[0], span[1]
			mustRun(t, q, &z)
			mustRun(t, q, read(0, got))
			copy(want, filled)
			clear(want[span[0]:][:span[1]])
			expect(t, got, want, fmt.Sprintf("zeroes %+v at %v", r, span))
		}
	}
}

func discard(t *testing.T, b Backend) {
	q := newQueue(t, b)
	lba := b.Info().LBASize()
	mem := pattern(guestMemory(t, 4<<20), 7)
	mustRun(t, q, write(0, mem))
	mustRun(t, q, &Request{Op: OpDiscard, Off: lba, Len: 2 << 20}, &Request{Op: OpDiscard, Off: 3 << 20, Len: lba})
	got := guestMemory(t, 4<<20)
	mustRun(t, q, read(0, got))
	if b.Info().DiscardZeroes {
		clear(mem[lba:][:2<<20])
		clear(mem[3<<20:][:lba])
		expect(t, got, mem, "discarded")
	}
	mustRun(t, q, write(0, pattern(mem, 8)))
	mustRun(t, q, read(0, got))
	expect(t, got, mem, "written after the discard")
}

func flushes(t *testing.T, b Backend) {
	q := newQueue(t, b)
	lba := b.Info().LBASize()
	mem := pattern(guestMemory(t, 1<<18), 9)
	got := guestMemory(t, 1<<18)
	w := write(0, mem[:lba])
	w.FUA = true
	mustRun(t, q, w, &Request{Op: OpFlush})
	mustRun(t, q, read(0, got[:lba]))
	expect(t, got[:lba], mem[:lba], "FUA")
	mustRun(t, q, &Request{Op: OpFlush}, &Request{Op: OpFlush})
}

// flood submits more than a ring and its slots hold.
func flood(t *testing.T, b Backend) {
	q := newQueue(t, b)
	lba := b.Info().LBASize()
	n, all := int(testSize/lba), 3000
	if testing.Short() {
		all = cqEntries + cqEntries/2
	}
	mem := pattern(guestMemory(t, testSize), 10)
	got := guestMemory(t, testSize)
	var w, r []*Request
	for i := range all {
		off := uint64(i%n) * lba
		w = append(w, write(off, mem[off:][:lba]))
		r = append(r, read(off, got[off:][:lba]))
	}
	mustRun(t, q, w...)
	mustRun(t, q, r...)
	m := min(all, n) * int(lba)
	expect(t, got[:m], mem[:m], "flood")
	var z []*Request
	for i := range all / 2 {
		z = append(z, &Request{Op: OpWriteZeroes, Off: uint64(i%n) * lba, Len: lba})
	}
	if b.Info().LBAShift == 12 { // fallocate is slow
		mustRun(t, q, z...)
	}
}

func queues(t *testing.T, b Backend) {
	const workers = 4
	lba := int(b.Info().LBASize())
	var wg sync.WaitGroup
	for w := range workers {
		q := newQueue(t, b)
		out, in := guestMemory(t, 256<<10), guestMemory(t, 256<<10)
		wg.Go(func() {
			share := testSize / workers
			for round := range 10 {
				pattern(out, uint64(w*100+round))
				off := uint64(w*share + round*lba%share)
				n := min(256<<10, max(lba, 64<<10))
				mustRun(t, q, write(off, out[:n]))
				if round%3 == 0 {
					mustRun(t, q, &Request{Op: OpFlush}, &Request{Op: OpDiscard, Off: uint64(w * share), Len: uint64(lba)})
					mustRun(t, q, write(off, out[:n]))
				}
				mustRun(t, q, read(off, in[:n]))
				expect(t, in[:n], out[:n], fmt.Sprintf("worker %d, round %d", w, round))
			}
		})
	}
	wg.Wait()
}

func wrongRequests(t *testing.T, b Backend) {
	q := newQueue(t, b)
	lba := b.Info().LBASize()
	mem := guestMemory(t, 1<<18)
	for _, c := range []struct {
		r    *Request
		want nvme.Status
	}{
		{&Request{Op: 77}, nvme.StatusInvalidOpcode},
		{read(lba/2, mem[:lba]), nvme.StatusInvalidField},
		{read(0, mem[:lba/2]), nvme.StatusInvalidField},
		{&Request{Op: OpRead}, nvme.StatusSuccess},
		{&Request{Op: OpWriteZeroes, FUA: true}, nvme.StatusSuccess},
		{&Request{Op: OpDiscard, Off: testSize}, nvme.StatusSuccess},
	} {
		run(t, q, c.r)
		if c.r.Status.Code() != c.want {
			t.Errorf("%v at %#x of %#x bytes: %v, want %v", c.r.Op, c.r.Off, c.r.Len, c.r.Status, c.want)
		}
	}
}

func TestNullAnswersAtOnceAndTouchesNothing(t *testing.T) {
	b := opened(t)(Open("null:size=1MiB,lba=4096"))
	q := newQueue(t, b)
	mem := pattern(make([]byte, 4096), 1)
	want := append([]byte(nil), mem...)
	reqs := []*Request{read(0, mem), write(4096, mem), {Op: OpFlush}, {Op: OpDiscard, Len: 1 << 20}, read(1<<20, mem)}
	done := make([]*Request, len(reqs))
	if n := q.Submit(reqs, done); n != len(reqs) || q.Inflight() != 0 || q.EventFD() != -1 || q.Reap(done) != 0 {
		t.Fatalf("%d done at once", n)
	}
	for i, r := range reqs {
		want := nvme.StatusSuccess
		if i == 4 {
			want = nvme.StatusLBAOutOfRange
		}
		if r.Status.Code() != want || done[i] != r {
			t.Errorf("request %d: %v", i, r.Status)
		}
	}
	expect(t, mem, want, "null")
}
