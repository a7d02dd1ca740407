package backend

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// shrunkMemory returns guest memory whose second half was taken away by truncating its file.
func shrunkMemory(t *testing.T, n int) []byte {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	pattern(mem, 11)
	if err := unix.Ftruncate(fd, int64(n/2)); err != nil {
		t.Fatal(err)
	}
	return mem
}

func TestRule36_GuestMemoryGoneFailsItsRequestAlone(t *testing.T) {
	for _, f := range flavours {
		t.Run(f.name, func(t *testing.T) {
			b := f.open(t, testSize, 512)
			q := newQueue(t, b)
			good := pattern(guestMemory(t, 1<<20), 12)
			mustRun(t, q, write(0, good))
			for _, skip := range []int{0, 4} { // directly, and by a bounce buffer where there is one
				mem := shrunkMemory(t, 1<<20)[skip:]
				got := guestMemory(t, 64<<10)
				reqs := []*Request{
					read(0, got[:4096]),
					read(4096, mem[512<<10:][:4096]),
					read(4096, got[4096:8192]),
					write(8192, mem[640<<10:][:4096]),
					read(16384, mem[8192:12288], mem[768<<10:][:4096], got[8192:12288]),
					read(8192, got[12288:16384]),
					write(1<<20, mem[:4096]),
				}
				run(t, q, reqs...)
				for i, r := range reqs {
					want := nvme.StatusSuccess
					if i == 1 || i == 3 || i == 4 {
						want = nvme.StatusDataTransferError
					}
					if r.Status.Code() != want {
						t.Errorf("request %d: %v, want %v", i, r.Status, want)
					}
				}
				expect(t, got[:8192], good[:8192], "beside a fault")
				mustRun(t, q, read(8192, got[:4096]), read(1<<20, got[4096:8192]))
				expect(t, got[4096:8192], mem[:4096], "written beside a fault")
			}
		})
	}
}

func TestFileMadeShorterIsAMediumError(t *testing.T) {
	for _, f := range flavours[1:] {
		t.Run(f.name, func(t *testing.T) {
			b := f.open(t, testSize, 512)
			q := newQueue(t, b)
			mem := pattern(guestMemory(t, testSize), 13)
			mustRun(t, q, write(0, mem))
			if err := b.(*file).f.Truncate(testSize / 2); err != nil {
				t.Fatal(err)
			}
			lost, kept, across := read(testSize/2+4096, mem[:4096]), read(0, mem[:4096]), read(testSize/2-4096, mem[:8192])
			run(t, q, lost, kept, across)
			if lost.Status.Code() != nvme.StatusUnrecoveredRead || across.Status.Code() != nvme.StatusUnrecoveredRead {
				t.Errorf("behind the end: %v, across it: %v", lost.Status, across.Status)
			}
			if !kept.Status.OK() {
				t.Errorf("before it: %v", kept.Status)
			}
			mustRun(t, q, write(testSize-4096, mem[:4096])) // it grows again
			mustRun(t, q, read(testSize-4096, mem[4096:8192]))
			expect(t, mem[4096:8192], mem[:4096], "after growing again")
		})
	}
}

func TestReadOnlyRefusesEveryChange(t *testing.T) {
	for _, dir := range []string{diskDir(t), shmDir(t)} {
		s := fileSpec(dir, 1<<20, 512)
		want := pattern(make([]byte, 1<<20), 14)
		if err := os.WriteFile(s.Path, want, 0o400); err != nil {
			t.Fatal(err)
		}
		s.ReadOnly = true
		b := opened(t)(OpenSpec(s, nil))
		q := newQueue(t, b)
		mem := guestMemory(t, 1<<20)
		if i := b.Info(); !i.ReadOnly || i.Discard || i.VolatileCache {
			t.Errorf("info %+v", i)
		}
		for _, r := range []*Request{
			write(0, mem[:4096]), {Op: OpWriteZeroes, Len: 4096}, {Op: OpDiscard, Len: 4096},
		} {
			run(t, q, r)
			if r.Status != nvme.StatusReadOnly.WithDNR() {
				t.Errorf("%v: %v", r.Op, r.Status)
			}
		}
		mustRun(t, q, &Request{Op: OpFlush}, read(0, mem))
		expect(t, mem, want, "read only")
	}
}

func TestDiscardAndZeroesGiveSpaceBack(t *testing.T) {
	for _, f := range flavours[1:] {
		for _, op := range []Op{OpDiscard, OpWriteZeroes} {
			t.Run(f.name+"/"+op.String(), func(t *testing.T) {
				b := f.open(t, testSize, 512)
				q := newQueue(t, b)
				mustRun(t, q, write(0, pattern(guestMemory(t, 4<<20), 15)))
				mustRun(t, q, &Request{Op: OpFlush})
				blocks := func() int64 {
					var st unix.Stat_t
					if err := unix.Fstat(b.(*file).fd, &st); err != nil {
						t.Fatal(err)
					}
					return st.Blocks
				}
				full := blocks()
				if full < 4<<20/512 {
					t.Fatalf("%d blocks hold 4 MiB", full)
				}
				if !b.Info().Discard {
					t.Fatal("the file system here has no holes")
				}
				mustRun(t, q, &Request{Op: op, Len: 3 << 20, Dealloc: true})
				if got := blocks(); got > full-3<<20/512+16 {
					t.Errorf("%d blocks before, %d after", full, got)
				}
				mem := guestMemory(t, 3<<20)
				mustRun(t, q, read(0, mem))
				if got := blocks(); got > full-3<<20/512+16 {
					t.Errorf("reading the hole filled it: %d blocks", got)
				}
			})
		}
	}
}

func TestMemDiscardGivesMemoryBack(t *testing.T) {
	b := opened(t)(Open("mem:size=16MiB,lba=4096"))
	q := newQueue(t, b)
	mustRun(t, q, write(0, pattern(guestMemory(t, 16<<20), 16)))
	data := b.(*mem).data
	resident := func() (n int) {
		for off := 0; off < len(data); off += 4096 {
			var in [1]byte
			if mincore(data[off:off+4096], in[:]) && in[0]&1 != 0 {
				n++
			}
		}
		return n
	}
	if n := resident(); n != 4096 {
		t.Fatalf("%d pages resident of 4096 written", n)
	}
	mustRun(t, q, &Request{Op: OpDiscard, Off: 0, Len: 12 << 20})
	if n := resident(); n != 1024 {
		t.Errorf("%d pages resident, want 1024", n)
	}
}
