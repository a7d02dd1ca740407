package backend

import (
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/uring"
)

// fakeTable is a ring's table of buffers.
type fakeTable struct {
	entries map[int][]byte
	tables  int
	refuse  bool
	none    bool
	calls   int
}

func (f *fakeTable) RegisterSparseBuffers(n int) error {
	f.tables++
	if f.none || n != registeredMost {
		return unix.EINVAL
	}
	return nil
}

func (f *fakeTable) UpdateBuffers(at int, bufs [][]byte) error {
	f.calls++
	if f.refuse {
		return unix.ENOMEM
	}
	if len(bufs) != 1 {
		return unix.EINVAL
	}
	if bufs[0] == nil {
		delete(f.entries, at)
	} else {
		f.entries[at] = bufs[0]
	}
	return nil
}

func TestRegistered(t *testing.T) {
	const piece = 1 << registeredShift
	f := &fakeTable{entries: map[int][]byte{}}
	p := registered{ring: f}
	a, b := guestMemory(t, 3*piece+8192), guestMemory(t, piece)
	find := func(m []byte) bool {
		s := seg(m)
		index, ok := p.find(&s)
		if !ok {
			return false
		}
		e, there := f.entries[int(index)]
		if !there || address(m) < address(e) || address(m)+uintptr(len(m)) > address(e)+uintptr(len(e)) {
			t.Fatalf("entry %d is not of this memory", index)
		}
		return true
	}
	if find(a[:512]) {
		t.Error("nothing was added")
	}
	p.add(a)
	p.add(b)
	p.add(b)
	if f.tables != 0 || f.calls != 0 {
		t.Error("memory was registered before it was used")
	}
	skip := int(-address(a) & (piece - 1)) // to the first boundary
	for i := range registerAfter {
		if got := find(a[skip:][:4096]); got != (i == registerAfter-1) {
			t.Errorf("use %d: registered %v", i+1, got)
		}
	}
	// Of the same piece, and of others.
	if !find(a[skip+piece-512:][:512]) || f.calls != 1 {
		t.Errorf("another place of it: %d calls", f.calls)
	}
	for range 2 * registerAfter {
		if find(a[skip+piece-512:][:1024]) {
			t.Error("memory of two pieces")
		}
		find(b[:4096])
		find(a[:512])
		find(a[len(a)-512:])
	}
	if !find(b[:1]) || !find(a[:1]) || !find(a[len(a)-1:]) || len(f.entries) != 4 && len(f.entries) != 3 {
		t.Errorf("%d entries", len(f.entries))
	}
	for _, e := range f.entries {
		if len(e) > piece {
			t.Errorf("an entry of %d bytes", len(e))
		}
	}
	all := []Seg{seg(a[skip:][:512]), seg(a[skip+8192:][:512])}
	if _, ok := p.findAll(all); !ok {
		t.Error("pieces of one entry were not found")
	}
	if _, ok := p.findAll([]Seg{all[0], seg(a[skip+piece:][:512])}); ok {
		t.Error("pieces of two entries were found as one")
	}
	if _, ok := p.findAll([]Seg{all[0], seg(b[:512])}); ok {
		t.Error("pieces of two mappings were found as one")
	}
	p.remove(a)
	if find(a[skip:][:512]) || !find(b[:1]) {
		t.Error("removed, or not")
	}
	p.remove(b)
	p.remove(b)
	if len(f.entries) != 0 {
		t.Errorf("%d entries are left", len(f.entries))
	}

	// What the kernel does not take is asked for once.
	for _, none := range []bool{false, true} {
		f = &fakeTable{entries: map[int][]byte{}, refuse: true, none: none}
		p = registered{ring: f}
		p.add(b)
		for range 10 * registerAfter {
			if find(b[:512]) {
				t.Error("refused, and found")
			}
		}
		if f.calls > 2 || f.tables != 1 {
			t.Errorf("asked %d times", f.calls)
		}
	}
}

// TestRegisteredForReal registers memory with the kernel, all of which is there afterwards.
func TestRegisteredForReal(t *testing.T) {
	r, err := uring.New(uring.Config{Entries: 8})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := registered{ring: r}
	mem := guestMemory(t, 8<<20)
	p.add(mem)
	s := seg(mem[:4096])
	for i := range registerAfter {
		if _, ok := p.find(&s); ok != (i == registerAfter-1) {
			t.Errorf("use %d: registered %v (of what is lockable?)", i+1, ok)
		}
	}
	p.remove(mem)
}

// onePiece is memory that lies in one entry of the table.
func onePiece(t *testing.T) []byte {
	const piece = 1 << registeredShift
	mem := guestMemory(t, 2*piece)
	return mem[-address(mem)&(piece-1):][: 1<<20 : 1<<20]
}

// TestNVMeCharFixedVectors has pieces of registered memory, with a kernel that takes them and with one that does not.
func TestNVMeCharFixedVectors(t *testing.T) {
	for _, takes := range []bool{true, false} {
		d := newFakeChar()
		d.fixedVec = takes
		pattern(d.data, 3)
		b := openFake(t, d, sliceSpec())
		b.fixedVec.Store(true)
		q, _ := fakeCharQueue(t, b, d, 16)
		mem, other := onePiece(t), onePiece(t)
		q.AddMemory(mem)
		q.AddMemory(other)
		useOften(t, q, mem)
		useOften(t, q, other)
		for range 2 {
			d.fixed = nil
			mustRun(t, q, read(512, mem[:4096], mem[65536:69632]))
			expect(t, mem[65536:69632], d.data[1001*512+4096:], "a second piece")
			if len(d.fixed) != 1 || d.fixed[0] != takes || b.fixedVec.Load() != takes {
				t.Errorf("taken %v: registered %v, and %v is remembered", takes, d.fixed, b.fixedVec.Load())
			}
		}
		d.fixed = nil
		mustRun(t, q, read(512, mem[:4096], other[:4096]), read(512, other[:4096], mem[:512], guestMemory(t, 4096)))
		if len(d.fixed) != 2 || d.fixed[0] || d.fixed[1] {
			t.Errorf("pieces in different buffers: registered %v", d.fixed)
		}
	}
}

// TestMemlockIsTold: that the kernel locks no more memory is said once for a namespace, with the remedy.
func TestMemlockIsTold(t *testing.T) {
	var out strings.Builder
	limit := memlock{log: hclog.New(&hclog.LoggerOptions{Output: &out})}
	for range 2 { // queues
		f := &fakeTable{entries: map[int][]byte{}, refuse: true}
		p := registered{ring: f, full: func() { limit.tell("nvme:/dev/ng0n1") }}
		b := guestMemory(t, 3<<registeredShift)
		p.add(b)
		for i := range 3 * registerAfter {
			s := seg(b[i%3<<registeredShift:][:512])
			if _, ok := p.find(&s); ok {
				t.Error("refused, and found")
			}
		}
		if f.calls < 2 {
			t.Errorf("asked %d times", f.calls)
		}
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "LimitMEMLOCK=") || !strings.Contains(got, "/dev/ng0n1") {
		t.Errorf("the log says: %s", got)
	}
}
