package backend

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/uring"
)

// scripted is a ring without a kernel: every entry is recorded and completes with the next result of the
// script, or in full.
type scripted struct {
	sqe     [sqEntries]uring.SQE
	n       int         // prepared
	log     []uring.SQE // submitted
	script  []int32
	cqes    []uring.CQE
	short   int // Submits that take nothing
	waits   int
	perform func(uring.SQE)
}

func (f *scripted) GetSQE() *uring.SQE {
	if f.n == len(f.sqe) {
		return nil
	}
	s := &f.sqe[f.n]
	*s = uring.SQE{}
	f.n++
	return s
}

func (f *scripted) Pending() int          { return f.n }
func (f *scripted) EventFD() (int, error) { return -1, nil }
func (f *scripted) Close() error          { return nil }

func (f *scripted) Submit() (int, error) {
	if f.short > 0 {
		f.short--
		return 0, unix.EAGAIN
	}
	n := f.n
	for _, s := range f.sqe[:n] {
		f.log = append(f.log, s)
		res := int32(0)
		switch s.Opcode {
		case uring.OpRead, uring.OpWrite:
			res = int32(s.Len)
		case uring.OpReadv, uring.OpWritev:
			res = 1 << 30
		}
		if len(f.script) > 0 {
			res, f.script = f.script[0], f.script[1:]
		}
		if f.perform != nil {
			f.perform(s)
		}
		f.cqes = append(f.cqes, uring.CQE{UserData: s.UserData, Res: res})
	}
	f.n = 0
	return n, nil
}

func (f *scripted) SubmitAndWait(int) (int, error) {
	f.waits++
	return f.Submit()
}

func (f *scripted) Reap(out []uring.CQE) int {
	n := copy(out, f.cqes)
	f.cqes = f.cqes[n:]
	return n
}

// fakeQueue is a queue over a scripted ring.
func fakeQueue(t *testing.T, direct bool, script ...int32) (*fileQueue, *scripted) {
	t.Helper()
	b := opened(t)(openFile(fileSpec(diskDir(t), testSize, 512), false)).(*file)
	if b.direct = direct; direct {
		b.memAlign, b.lenAlign = 512, 512
	}
	r := &scripted{script: script}
	q, err := b.newQueue(r)
	if err != nil {
		t.Fatal(err)
	}
	return q, r
}

func ops(log []uring.SQE) (out []uint8) {
	for _, s := range log {
		out = append(out, s.Opcode)
	}
	return out
}

func same[T comparable](a, b []T) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestFlushAndFUAAskForDurability(t *testing.T) {
	mem := guestMemory(t, 8192)
	q, r := fakeQueue(t, false)
	w, two := write(0, mem[:4096]), write(0, mem[:512], mem[4096:8192])
	w.FUA, two.FUA = true, true
	mustRun(t, q, w, two, write(4096, mem[:4096]), &Request{Op: OpFlush}, &Request{Op: OpWriteZeroes, Len: 4096, FUA: true})
	want := []uint8{uring.OpWrite, uring.OpWritev, uring.OpWrite, uring.OpFsync, uring.OpFallocate, uring.OpFsync}
	if got := ops(r.log); !same(got, want) {
		t.Fatalf("operations %v, want %v", got, want)
	}
	for i, flags := range []uint32{unix.RWF_DSYNC, unix.RWF_DSYNC, 0, uring.FsyncDatasync, 0, uring.FsyncDatasync} {
		if r.log[i].OpFlags != flags || r.log[i].Flags != uring.SQEFixedFile {
			t.Errorf("operation %d: flags %#x, want %#x", i, r.log[i].OpFlags, flags)
		}
	}
}

func TestABatchIsOneSubmission(t *testing.T) {
	mem := guestMemory(t, 64*4096)
	q, r := fakeQueue(t, false)
	submits := 0
	r.perform = func(uring.SQE) { submits++ }
	var reqs []*Request
	for i := range 64 {
		reqs = append(reqs, read(uint64(i)*4096, mem[i*4096:][:4096]))
	}
	done := make([]*Request, 64)
	before := r.n
	for _, x := range reqs {
		q.begin(x)
	}
	if r.n != before+64 || submits != 0 {
		t.Fatalf("%d prepared, %d submitted before the end of the batch", r.n, submits)
	}
	q.inflight = 64
	if n := q.collect(done); n != 64 || submits != 64 {
		t.Errorf("%d done of %d submitted", n, submits)
	}
}

func TestFlushedIsNotDirtyAnyMore(t *testing.T) {
	b := flavours[2].open(t, testSize, 512) // the page cache
	q := newQueue(t, b)
	mem := pattern(guestMemory(t, 1<<20), 1)
	dirty := func() uint64 {
		n, err := dirtyPages(b.(*file).fd)
		if err != nil {
			t.Fatalf("cachestat (Linux 6.5): %v", err)
		}
		return n
	}
	mustRun(t, q, write(0, mem))
	if dirty() == 0 {
		t.Fatal("a write without FUA went to the disk")
	}
	mustRun(t, q, &Request{Op: OpFlush})
	if n := dirty(); n != 0 {
		t.Errorf("%d pages dirty after a flush", n)
	}
	w := write(4096, mem)
	w.FUA = true
	mustRun(t, q, w)
	if n := dirty(); n != 0 {
		t.Errorf("%d pages dirty after a write with FUA", n)
	}
}

func TestFailedFlushIsNotForgotten(t *testing.T) {
	mem := guestMemory(t, 4096)
	q, _ := fakeQueue(t, false, -int32(unix.EIO))
	for range 2 {
		r := &Request{Op: OpFlush}
		run(t, q, r)
		if r.Status != nvme.StatusWriteFault {
			t.Errorf("flush: %v", r.Status)
		}
	}
	w := write(0, mem)
	w.FUA = true
	run(t, q, w)
	if w.Status != nvme.StatusWriteFault {
		t.Errorf("FUA after a failed flush: %v", w.Status)
	}
	mustRun(t, q, read(0, mem), write(0, mem))

	q, _ = fakeQueue(t, false, -int32(unix.EIO))
	run(t, q, w)
	r := &Request{Op: OpFlush}
	run(t, q, r)
	if w.Status != nvme.StatusWriteFault || r.Status != nvme.StatusWriteFault {
		t.Errorf("FUA %v, flush after it %v", w.Status, r.Status)
	}
}

func TestErrnoBecomesStatus(t *testing.T) {
	mem := guestMemory(t, 4096)
	for errno, want := range map[unix.Errno][2]nvme.Status{
		unix.EIO:        {nvme.StatusUnrecoveredRead, nvme.StatusWriteFault},
		unix.ENODATA:    {nvme.StatusUnrecoveredRead, nvme.StatusWriteFault},
		unix.ENOSPC:     {nvme.StatusCapacityExceeded.WithDNR(), nvme.StatusCapacityExceeded.WithDNR()},
		unix.EDQUOT:     {nvme.StatusCapacityExceeded.WithDNR(), nvme.StatusCapacityExceeded.WithDNR()},
		unix.EFAULT:     {nvme.StatusDataTransferError, nvme.StatusDataTransferError},
		unix.EROFS:      {nvme.StatusReadOnly.WithDNR(), nvme.StatusReadOnly.WithDNR()},
		unix.EPERM:      {nvme.StatusAccessDenied.WithDNR(), nvme.StatusAccessDenied.WithDNR()},
		unix.ENOMEM:     {nvme.StatusInternalError, nvme.StatusInternalError},
		unix.EOPNOTSUPP: {nvme.StatusInternalError.WithDNR(), nvme.StatusInternalError.WithDNR()},
	} {
		q, _ := fakeQueue(t, false, -int32(errno), -int32(errno))
		r, w := read(0, mem), write(0, mem)
		run(t, q, r, w)
		if r.Status != want[0] || w.Status != want[1] {
			t.Errorf("%v: read %v, write %v", errno, r.Status, w.Status)
		}
	}
}

func TestShortTransfersAreContinued(t *testing.T) {
	mem := guestMemory(t, 16384)
	for _, c := range []struct {
		direct bool
		script []int32
		offs   []uint64
	}{
		{false, []int32{1000, 3096, 8192}, []uint64{0, 1000, 4096}},
		{true, []int32{1000, 3584, 8192}, []uint64{0, 512, 4096}}, // whole blocks only
		{false, []int32{-int32(unix.EAGAIN), -int32(unix.EINTR), 12288}, []uint64{0, 0, 0}},
	} {
		q, r := fakeQueue(t, c.direct, c.script...)
		mustRun(t, q, read(0, mem[4096:8192], mem[:4096], mem[8192:12288]))
		var offs []uint64
		for _, s := range r.log {
			offs = append(offs, s.Off)
		}
		if !same(offs, c.offs) {
			t.Errorf("direct %v, results %v: offsets %v, want %v", c.direct, c.script, offs, c.offs)
		}
	}
	q, _ := fakeQueue(t, false, 0)
	x := read(0, mem[:4096])
	run(t, q, x)
	if x.Status != nvme.StatusUnrecoveredRead {
		t.Errorf("end of file: %v", x.Status)
	}
	q, r := fakeQueue(t, false)
	for range 20 {
		r.script = append(r.script, -int32(unix.EAGAIN))
	}
	run(t, q, x)
	if x.Status.OK() || len(r.log) != maxTries+1 {
		t.Errorf("EAGAIN for ever: %v after %d tries", x.Status, len(r.log))
	}
	if r.log[0].Flags&uring.SQEAsync != 0 || r.log[1].Flags&uring.SQEAsync == 0 {
		t.Error("the second try must be allowed to wait")
	}
}

func TestRestOfAVector(t *testing.T) {
	mem := make([]byte, 100)
	vec := []Seg{seg(mem[:10]), seg(mem[20:50]), seg(mem[60:100])}
	for n, want := range map[uint64][][2]uint64{
		0: {{0, 10}, {20, 30}, {60, 40}}, 3: {{3, 7}, {20, 30}, {60, 40}}, 10: {{20, 30}, {60, 40}},
		39: {{49, 1}, {60, 40}}, 79: {{99, 1}}, 80: {},
	} {
		got := rest(nil, vec, n)
		if len(got) != len(want) {
			t.Fatalf("after %d: %d pieces, want %d", n, len(got), len(want))
		}
		for i, w := range want {
			if at := uint64(segAddress(&got[i]) - address(mem)); at != w[0] || got[i].Len != w[1] {
				t.Errorf("after %d, piece %d: [%d, +%d), want %v", n, i, at, got[i].Len, w)
			}
		}
	}
}

func TestFileSystemsWithoutHolesGetZeroes(t *testing.T) {
	no := -int32(unix.EOPNOTSUPP)
	const falloc, write = uring.OpFallocate, uring.OpWrite
	zero := func(dealloc bool) *Request { return &Request{Op: OpWriteZeroes, Len: 5 << 20 / 2, Dealloc: dealloc} }
	for _, c := range []struct {
		name   string
		reqs   []*Request
		script []int32
		want   []uint8
	}{
		{"all", []*Request{zero(false)}, []int32{0}, []uint8{falloc}},
		{"no zero range", []*Request{zero(false)}, []int32{no, 0}, []uint8{falloc, falloc}},
		{"neither", []*Request{zero(false)}, []int32{no, no}, []uint8{falloc, falloc, write, write, write}},
		{"neither, deallocating", []*Request{zero(true)}, []int32{no, no}, []uint8{falloc, falloc, write, write, write}},
		{"discard is a hint", []*Request{{Op: OpDiscard, Len: 4096}}, []int32{no}, []uint8{falloc}},
	} {
		q, r := fakeQueue(t, false, c.script...)
		mustRun(t, q, c.reqs...)
		if got := ops(r.log); !same(got, c.want) {
			t.Errorf("%s: operations %v, want %v", c.name, got, c.want)
		}
		r.log = nil
		mustRun(t, q, zero(true))
		if len(c.script) == 2 && c.script[1] == no {
			if got := ops(r.log); !same(got, []uint8{write, write, write}) {
				t.Errorf("%s: learned nothing: operations %v", c.name, got)
			}
		}
	}
	q, _ := fakeQueue(t, false, -int32(unix.ENOSPC))
	z := zero(false)
	run(t, q, z)
	if z.Status.Code() != nvme.StatusCapacityExceeded {
		t.Errorf("no space: %v", z.Status)
	}
}

func TestKernelShortOfMemoryLosesNothing(t *testing.T) {
	mem := guestMemory(t, 4096)
	q, r := fakeQueue(t, false)
	r.short = 7
	var reqs []*Request
	for i := range 3 * sqEntries {
		reqs = append(reqs, read(uint64(i)*512, mem[:512]))
	}
	done := make([]*Request, len(reqs))
	n := q.Submit(reqs, done)
	for range 100 {
		n += q.Reap(done[n:])
	}
	if n != len(reqs) || q.Inflight() != 0 {
		t.Fatalf("%d of %d done", n, len(reqs))
	}
}

func TestUntoldAlignmentRulesLeadToABounce(t *testing.T) {
	mem := pattern(guestMemory(t, 8192), 3)
	q, r := fakeQueue(t, true, -int32(unix.EINVAL))
	var wrote []byte
	r.perform = func(s uring.SQE) {
		if s.Opcode == uring.OpWrite && len(r.log) == 2 {
			wrote = append(wrote, q.bounce.mem[(bounceCount-1)*bounceSize:][:s.Len]...)
		}
	}
	mustRun(t, q, write(0, mem))
	if len(r.log) != 2 || r.log[0].Addr == r.log[1].Addr {
		t.Fatalf("%d operations", len(r.log))
	}
	expect(t, wrote, mem, "bounced")
}

func TestCloseWaitsForWhatIsInFlight(t *testing.T) {
	mem := guestMemory(t, 1<<20)
	q, r := fakeQueue(t, false)
	r.short = 5
	reqs := []*Request{write(0, mem), {Op: OpFlush}, write(1<<20, mem)}
	if n := q.Submit(reqs, make([]*Request, 3)); n != 0 || q.Inflight() != 3 {
		t.Fatalf("%d done, %d in flight", n, q.Inflight())
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if len(r.log) != 3 || q.Inflight() != 0 {
		t.Errorf("%d submitted, %d in flight after Close", len(r.log), q.Inflight())
	}

	b := flavours[1].open(t, testSize, 512)
	real, err := b.NewQueue()
	if err != nil {
		t.Fatal(err)
	}
	var many []*Request
	for i := range 64 {
		many = append(many, write(uint64(i)<<16, mem[:1<<16]))
	}
	n := real.Submit(many, make([]*Request, 64))
	if err := errors.Join(real.Close()); err != nil || real.Inflight() != 0 {
		t.Errorf("%d at once; after Close %d in flight, %v", n, real.Inflight(), err)
	}
	q2 := newQueue(t, b)
	got := guestMemory(t, 1<<16)
	mustRun(t, q2, read(63<<16, got))
	expect(t, got, mem[:1<<16], "in flight at Close")
}
