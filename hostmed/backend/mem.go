package backend

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const hugePage = 2 << 20

// giveBack is the size in bytes from which zeroing whole pages by giving them back to the kernel
// is worth the system call.
const giveBack = 64 << 10

// mem keeps the namespace in anonymous memory of huge pages, where the kernel has them. Nothing is
// allocated before it is written. A large discard is done before Submit returns, which takes
// about a millisecond for each GiB that had been written.
type mem struct {
	info Info
	id   identity
	raw  []byte // as mapped
	data []byte // from the first huge page boundary on

	// written says which pages have been written since they were made or deallocated. The kernel does not know: it has huge pages,
	// and pages of zeroes for those who read.
	written pageSet
}

func newMem(s Spec) (*mem, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		if total := uint64(si.Totalram) * uint64(si.Unit); s.Size > total {
			return nil, fmt.Errorf("namespace %s: larger than this machine's memory of %d MiB: use a smaller size= or file:PATH", s, total>>20)
		}
	}
	raw, err := unix.Mmap(-1, 0, int(s.Size+hugePage), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("namespace %s: reserving memory: %w: use a smaller size=, or raise the limit on address space (ulimit -v)", s, err)
	}
	skip := -address(raw) & (hugePage - 1)
	data := raw[skip : uint64(skip)+s.Size : uint64(skip)+s.Size]
	_ = unix.Madvise(raw, unix.MADV_HUGEPAGE) // a kernel without huge pages refuses, and works
	id := takeIdentity(s)
	info := newInfo(s, s.Size, id)
	info.Discard, info.DiscardZeroes, info.WriteZeroes, info.Maps = true, true, true, true
	info.OptimalBlocks = max(1, uint32(shm.PageSize>>info.LBAShift))
	return &mem{info: info, id: id, raw: raw, data: data, written: newPageSet(s.Size)}, nil
}

func (b *mem) Info() Info { return b.info }

func (b *mem) NewQueue() (Queue, error) { return &memQueue{b: b}, nil }

func (b *mem) Close() error {
	if b.raw == nil {
		return nil
	}
	b.id.release()
	err := unix.Munmap(b.raw)
	b.raw, b.data = nil, nil
	return err
}

type memQueue struct {
	instant
	b *mem
}

func (q *memQueue) Submit(reqs, done []*Request) int {
	// The guard costs once per batch; after a fault it is taken again for the rest.
	for i := 0; i < len(reqs); i++ {
		if err := shm.Guard(func() {
			for ; i < len(reqs); i++ {
				announce(q.b.data, reqs[i+1:])
				q.b.do(reqs[i])
			}
		}); err != nil {
			reqs[i].Status = nvme.StatusDataTransferError
		}
	}
	return copy(done, reqs)
}

func (b *mem) do(r *Request) {
	if r.Status = b.info.check(r); !r.Status.OK() || r.Op == OpFlush {
		return
	}
	data := b.data[r.Off : r.Off+r.Len]
	switch r.Op {
	case OpRead:
		scatter(r.Vec, data)
	case OpWrite:
		if r.Len > 0 && !b.written.has(r.Off, r.Len) {
			b.written.set(r.Off, r.Len)
		}
		gather(data, r.Vec)
	case OpWriteZeroes, OpDiscard:
		switch {
		case r.Len == 0:
		case r.Op == OpDiscard || r.Dealloc:
			b.written.clearWhole(r.Off, r.Len)
		default:
			b.written.set(r.Off, r.Len)
		}
		zero(data)
	}
}

// announce begins to fetch what the next request will copy.
func announce(data []byte, next []*Request) {
	if len(next) > 0 && next[0].Off < uint64(len(data)) {
		prefetch(&data[next[0].Off])
	}
}

// scatter copies src to the pieces of vec.
func scatter(vec []Seg, src []byte) {
	for i := range vec {
		n := copy(segBytes(&vec[i]), src)
		src = src[n:]
	}
}

// gather copies the pieces of vec to dst.
func gather(dst []byte, vec []Seg) {
	for i := range vec {
		n := copy(dst, segBytes(&vec[i]))
		dst = dst[n:]
	}
}

// zero clears b, giving whole pages back if there are many.
func zero(b []byte) {
	if len(b) >= giveBack {
		skip := int(-address(b) & (shm.PageSize - 1))
		whole := (len(b) - skip) &^ (shm.PageSize - 1)
		if unix.Madvise(b[skip:skip+whole], unix.MADV_DONTNEED) == nil {
			clear(b[:skip])
			clear(b[skip+whole:])
			return
		}
	}
	clear(b)
}
