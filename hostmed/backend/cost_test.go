package backend

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNothingIsAllocatedPerRequest(t *testing.T) {
	null := flavour{"null", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(OpenSpec(Spec{Kind: KindNull, Size: size, LBA: lba}, nil))
	}}
	for _, f := range append(flavours[:len(flavours):len(flavours)], null) {
		t.Run(f.name, func(t *testing.T) {
			q := newQueue(t, f.open(t, testSize, 512))
			mem := guestMemory(t, 1<<20)
			var reqs []*Request
			for i := range 32 {
				off := uint64(i) << 16
				switch i % 4 {
				case 0:
					reqs = append(reqs, read(off, mem[:4096]))
				case 1:
					reqs = append(reqs, write(off, mem[4096:8192], mem[16384:20480]))
				case 2:
					reqs = append(reqs, read(off, mem[4:][:4096])) // by a bounce buffer, when direct
				default:
					reqs = append(reqs, read(off, mem[65536:][:65536]))
				}
			}
			reqs = append(reqs, &Request{Op: OpFlush})
			done := make([]*Request, len(reqs))
			if n := testing.AllocsPerRun(50, func() {
				n := q.Submit(reqs, done)
				for n < len(reqs) {
					n += q.Reap(done[n:])
				}
			}); n != 0 {
				t.Errorf("%v allocations per batch", n)
			}
		})
	}
}

func TestNoDescriptorOrMappingStays(t *testing.T) {
	count := func() (fds, maps int) {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		m, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return len(d), strings.Count(string(m), "io_uring") + strings.Count(string(m), "disk.img")
	}
	disk, shm := fileSpec(diskDir(t), 64<<20, 512), fileSpec(shmDir(t), 64<<20, 512)
	mem := guestMemory(t, 4096)
	once := func() {
		for _, s := range []Spec{{Kind: KindNull, Size: 1 << 20, LBA: 512}, {Kind: KindMem, Size: 64 << 20, LBA: 512}, disk, shm} {
			b, err := OpenSpec(s, nil)
			if err != nil {
				t.Fatal(err)
			}
			q, err := b.NewQueue()
			if err != nil {
				t.Fatal(err)
			}
			mustRun(t, q, write(0, mem), read(0, mem[4:516]))
			if err := q.Close(); err != nil {
				t.Error(err)
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}
			if err := b.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
		}
	}
	once()
	fds, maps := count()
	for range 5 {
		once()
	}
	if f, m := count(); f != fds || m != maps {
		t.Errorf("descriptors %d -> %d, mappings %d -> %d", fds, f, maps, m)
	}
	identities.Lock()
	defer identities.Unlock()
	for id := range identities.used {
		if strings.Contains(id.key, disk.Path) || id.key == "mem:size=64MiB" {
			t.Errorf("%+v is still taken", id)
		}
	}
}

func TestDirectIsUsedWhereTheFileSystemTakesIt(t *testing.T) {
	for _, lba := range []uint32{512, 4096} {
		s := fileSpec(diskDir(t), testSize, lba)
		b := opened(t)(OpenSpec(s, nil)).(*file)
		want := false
		if fd, err := unix.Open(s.Path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0); err == nil {
			n, err := unix.Pread(fd, guestMemory(t, 65536)[:lba], int64(lba))
			want = err == nil && n == int(lba)
			unix.Close(fd)
		}
		flags, err := unix.FcntlInt(uintptr(b.fd), unix.F_GETFL, 0)
		if err != nil {
			t.Fatal(err)
		}
		if b.Direct() != want || (flags&unix.O_DIRECT != 0) != want {
			t.Errorf("lba %d: direct %v, flags %#x, want %v", lba, b.Direct(), flags, want)
		}
		mem := guestMemory(t, 1<<20)
		for _, c := range []struct {
			vec  []Seg
			fits bool
		}{
			{[]Seg{seg(mem[:65536])}, true},
			{[]Seg{seg(mem[4096:8192]), seg(mem[65536:][:65536])}, true},
			{[]Seg{seg(mem[1:4097])}, false},
			{[]Seg{seg(mem[:4100]), seg(mem[8192:][:4092])}, false},
		} {
			if got := b.fits(c.vec); want && got != c.fits {
				t.Errorf("lba %d: pieces %v: fits %v", lba, c.vec, got)
			}
		}
	}
}

func BenchmarkRead(b *testing.B)  { benchmark(b, OpRead) }
func BenchmarkWrite(b *testing.B) { benchmark(b, OpWrite) }

// benchmark has one thread do random requests, in batches of the queue depth, on a medium that is all
// written, and says what one costs.
func benchmark(b *testing.B, op Op) {
	const size = 1 << 30
	null := flavour{"null", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(OpenSpec(Spec{Kind: KindNull, Size: size, LBA: lba}, nil))
	}}
	for _, f := range append([]flavour{null}, flavours...) {
		b.Run(f.name, func(b *testing.B) {
			be := f.open(b, size, 4096)
			q := newQueue(b, be)
			mem := pattern(guestMemory(b, 4<<20), 1)
			_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
			for off := uint64(0); off < size; off += 4 << 20 {
				mustRun(b, q, write(off, mem))
			}
			mustRun(b, q, &Request{Op: OpFlush})
			for _, bs := range []uint64{4 << 10, 128 << 10} {
				for _, qd := range []int{1, 32} {
					b.Run(fmt.Sprintf("%dKiB/qd%d", bs>>10, qd), func(b *testing.B) {
						runtime.LockOSThread()
						defer runtime.UnlockOSThread()
						reqs, done := make([]*Request, qd), make([]*Request, qd)
						for i := range reqs {
							reqs[i] = transferOf(op, 0, [][]byte{mem[uint64(i)*bs:][:bs]})
						}
						b.SetBytes(int64(bs))
						b.ReportAllocs()
						for n := 0; n < b.N; n += qd {
							for _, r := range reqs {
								r.Off = rand.Uint64N(size/bs) * bs
							}
							for k := q.Submit(reqs, done); k < qd; {
								k += q.Reap(done[k:])
							}
						}
						for _, r := range reqs {
							if !r.Status.OK() {
								b.Fatal(r.Status)
							}
						}
					})
				}
			}
		})
	}
}
