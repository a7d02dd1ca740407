package backend

import (
	"bytes"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/uring"
)

// fakeChar is an NVMe namespace in memory with the kernel in front of it, as far as ioctl and io_uring passthrough show them.
type fakeChar struct {
	ctrl nvme.IdentifyController
	nvm  nvme.IdentifyControllerNVM
	ns   nvme.IdentifyNamespace
	ids  nvme.NamespaceDescriptors
	k    blockLimits

	data  []byte
	bad   map[uint64]bool // Write Uncorrectable
	seen  []passthru      // commands, oldest first
	pages []uint32        // pieces of memory of each
	fixed []bool

	unprivileged bool // this process is not CAP_SYS_ADMIN
	fixedVec     bool // the kernel takes pieces of registered memory

	adminErr, idErr, ioErr error
	refuse                 func(c *passthru, vec []Seg) (res int32, refused bool) // what the kernel or the device says instead
}

const fakeBlocks = 4096

func newFakeChar() *fakeChar { return fakeCharOver(make([]byte, fakeBlocks*512)) }

// fakeCharOver is a device that has data on it.
func fakeCharOver(data []byte) *fakeChar {
	d := &fakeChar{data: data, bad: map[uint64]bool{}, k: blockLimits{maxBytes: 64 << 10, maxPages: 17}}
	d.ctrl.ONCS = nvme.ONCSCompare | nvme.ONCSVerify | nvme.ONCSWriteUncorrectable | nvme.ONCSDSM | nvme.ONCSWriteZeroes | nvme.ONCSCopy
	d.ctrl.OCFS = nvme.OCFSFormat0
	d.ctrl.VWC = nvme.VWCPresent
	d.ns.NSZE, d.ns.NCAP = fakeBlocks, fakeBlocks
	d.ns.LBAF[0].LBADS = 9
	d.ns.MSSRL, d.ns.MCL, d.ns.MSRC = 128, 128, 7
	return d
}

func (d *fakeChar) nsid() (uint32, error) { return 7, d.idErr }

func (d *fakeChar) admin(c *passthru, data []byte) (nvme.Status, error) {
	if d.adminErr != nil {
		return 0, d.adminErr
	}
	if c.Opcode != nvme.AdminIdentify {
		return nvme.StatusInvalidOpcode.WithDNR(), nil
	}
	switch nvme.CNS(c.CDW10) {
	case nvme.CNSController:
		copy(data, d.ctrl.Bytes()[:])
	case nvme.CNSNamespace:
		copy(data, d.ns.Bytes()[:])
	case nvme.CNSCSIController:
		copy(data, d.nvm.Bytes()[:])
	case nvme.CNSNamespaceDescriptors:
		if d.unprivileged {
			return 0, unix.EACCES
		}
		d.ids.Encode((*[nvme.IdentifySize]byte)(data))
	default:
		return nvme.StatusInvalidField.WithDNR(), nil
	}
	return nvme.StatusSuccess, nil
}

func (d *fakeChar) io(c *passthru, data []byte) (nvme.Status, error) {
	if d.ioErr != nil {
		return 0, d.ioErr
	}
	res := d.run(c, [][]byte{data})
	return nvme.Status(res), nil
}

// run does c and returns its status.
func (d *fakeChar) run(c *passthru, mem [][]byte) nvme.Status {
	d.seen = append(d.seen, *c)
	at := uint64(c.CDW11)<<32 | uint64(c.CDW10)
	n := uint64(c.CDW12&0xffff) + 1
	inside := func(at, n uint64) bool { return at <= d.ns.NSZE && n <= d.ns.NSZE-at }
	if c.NSID != 7 {
		return nvme.StatusInvalidNamespace.WithDNR()
	}
	switch c.Opcode {
	case nvme.IOFlush:
		return nvme.StatusSuccess
	case nvme.IODSM:
		list := slices.Concat(mem...)
		for range c.CDW10&0xff + 1 {
			var x nvme.DSMRange
			copy(x.Bytes()[:], list)
			list = list[nvme.DSMRangeSize:]
			if !inside(x.SLBA, uint64(x.Length)) {
				return nvme.StatusLBAOutOfRange.WithDNR()
			}
			if c.CDW11&nvme.DSMDeallocate != 0 {
				clear(d.data[x.SLBA<<9:][:uint64(x.Length)<<9])
			}
		}
		return nvme.StatusSuccess
	case nvme.IOCopy:
		list := slices.Concat(mem...)
		to := at
		for range c.CDW12&0xff + 1 {
			var x nvme.CopyRange
			copy(x.Bytes()[:], list)
			list = list[nvme.CopyRangeSize:]
			if !inside(x.SLBA, uint64(x.NLB.Count())) || !inside(to, uint64(x.NLB.Count())) {
				return nvme.StatusLBAOutOfRange.WithDNR()
			}
			copy(d.data[to<<9:], d.data[x.SLBA<<9:][:x.NLB.Count()<<9])
			to += uint64(x.NLB.Count())
		}
		return nvme.StatusSuccess
	}
	if !inside(at, n) {
		return nvme.StatusLBAOutOfRange.WithDNR()
	}
	media := d.data[at<<9:][:n<<9]
	switch c.Opcode {
	case nvme.IORead, nvme.IOVerify, nvme.IOCompare:
		for i := range n {
			if d.bad[at+i] {
				return nvme.StatusUnrecoveredRead.WithDNR()
			}
		}
	}
	size := 0
	for _, m := range mem {
		size += len(m)
	}
	if c.Opcode&3 != 0 && c.Opcode != nvme.IOWriteUncorrectable && size != len(media) {
		return nvme.StatusDataTransferError.WithDNR()
	}
	switch c.Opcode {
	case nvme.IORead:
		for _, m := range mem {
			copy(m, media)
			media = media[len(m):]
		}
	case nvme.IOWrite:
		for i := range n {
			delete(d.bad, at+i)
		}
		copy(media, slices.Concat(mem...))
	case nvme.IOCompare:
		if !bytes.Equal(media, slices.Concat(mem...)) {
			return nvme.StatusCompareFailure.WithDNR()
		}
	case nvme.IOWriteZeroes:
		clear(media)
	case nvme.IOWriteUncorrectable:
		for i := range n {
			d.bad[at+i] = true
		}
	case nvme.IOVerify:
	default:
		return nvme.StatusInvalidOpcode.WithDNR()
	}
	return nvme.StatusSuccess
}

// fakeWideRing is a ring whose entries the kernel does when they are reaped, newest first.
type fakeWideRing struct {
	d        *fakeChar
	size     int
	sqes     []uring.SQE
	commands [][]byte
	prepared int
	sent     []uring.WideCQE
	evfd     int
	full     bool // the kernel takes nothing
	buffers  map[int][]byte
	instant  bool // nothing is done
}

func newFakeWideRing(t *testing.T, d *fakeChar, size int) *fakeWideRing {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	r := &fakeWideRing{d: d, size: size, sqes: make([]uring.SQE, size), evfd: fd, buffers: map[int][]byte{}}
	for range size {
		r.commands = append(r.commands, room())
	}
	t.Cleanup(func() { unix.Close(fd) })
	return r
}

func (r *fakeWideRing) GetSQE() *uring.SQE {
	if r.prepared == r.size {
		return nil
	}
	s := &r.sqes[r.prepared]
	*s = uring.SQE{}
	clear(r.commands[r.prepared])
	r.prepared++
	return s
}

func (r *fakeWideRing) Command(s *uring.SQE) []byte {
	for i := range r.sqes {
		if s == &r.sqes[i] {
			return r.commands[i]
		}
	}
	return nil
}

func (r *fakeWideRing) Pending() int { return r.prepared }

func (r *fakeWideRing) Submit() (int, error) {
	if r.full {
		return 0, unix.EBUSY
	}
	for i := range r.prepared {
		s, c := &r.sqes[i], passthruIn(r.commands[i])
		r.sent = append(r.sent, uring.WideCQE{CQE: uring.CQE{UserData: s.UserData, Res: r.do(s, c)}, Extra: [2]uint64{uint64(c.Opcode) << 8}})
	}
	n := r.prepared
	r.prepared = 0
	if n > 0 {
		_, _ = unix.Write(r.evfd, one[:])
	}
	return n, nil
}

func (r *fakeWideRing) do(s *uring.SQE, c *passthru) int32 {
	if s.Opcode != uring.OpURingCmd || s.Flags&uring.SQEFixedFile == 0 || s.FD != 0 || c.Flags != 0 {
		return -int32(unix.EINVAL)
	}
	if r.instant {
		return 0
	}
	var mem [][]byte
	vec := []Seg{}
	switch s.Off {
	case nvmeURingIO:
		if c.DataLen > 0 {
			mem = append(mem, memoryAt(c.Addr, uint64(c.DataLen)))
			vec = append(vec, seg(mem[0]))
		}
	case nvmeURingIOVec:
		vec = piecesAt(c.Addr, uint64(c.DataLen))
		for _, v := range vec {
			mem = append(mem, memoryAt(uint64(segAddress(&v)), v.Len))
		}
	default:
		return -int32(unix.ENOTTY)
	}
	fixed := s.OpFlags&uring.URingCmdFixed != 0
	if fixed {
		b, ok := r.buffers[int(s.BufIndex)]
		if s.Off != nvmeURingIO && !r.d.fixedVec {
			return -int32(unix.EINVAL)
		}
		for _, v := range vec {
			if at := segAddress(&v); !ok || address(b) > at || at+uintptr(v.Len) > address(b)+uintptr(len(b)) {
				return -int32(unix.EFAULT)
			}
		}
	}
	if r.d.refuse != nil {
		if res, refused := r.d.refuse(c, vec); refused {
			return res
		}
	}
	r.d.pages = append(r.d.pages, uint32(len(vec)))
	r.d.fixed = append(r.d.fixed, fixed)
	return int32(r.d.run(c, mem))
}

func (r *fakeWideRing) SubmitAndWait(int) (int, error) { return r.Submit() }

func (r *fakeWideRing) ReapWide(out []uring.WideCQE) int {
	n := 0
	for n < len(out) && len(r.sent) > 0 {
		last := len(r.sent) - 1
		out[n] = r.sent[last]
		r.sent = r.sent[:last]
		n++
	}
	return n
}

func (r *fakeWideRing) EventFD() (int, error) { return r.evfd, nil }
func (r *fakeWideRing) Close() error          { return nil }

func (r *fakeWideRing) RegisterSparseBuffers(int) error {
	return nil
}

func (r *fakeWideRing) UpdateBuffers(at int, bufs [][]byte) error {
	for i, b := range bufs {
		if b == nil {
			delete(r.buffers, at+i)
		} else {
			r.buffers[at+i] = b
		}
	}
	return nil
}

// openFake is a slice of d.
func openFake(t *testing.T, d *fakeChar, s Spec) *nvmeChar {
	t.Helper()
	b, err := tryFake(d, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.id.release() })
	return b
}

var fakeZeros = make([]byte, zeroChunk)

func tryFake(d *fakeChar, s Spec) (*nvmeChar, error) {
	b := &nvmeChar{spec: s, asks: d, zeros: fakeZeros}
	if err := b.take(d.k); err != nil {
		return nil, err
	}
	b.id = takeKey(b.ident.key(s.Offset))
	b.show()
	return b, nil
}

func fakeCharQueue(t *testing.T, b *nvmeChar, d *fakeChar, size int) (*charQueue, *fakeWideRing) {
	t.Helper()
	r := newFakeWideRing(t, d, size)
	q, err := b.newQueue(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	d.seen, d.pages, d.fixed = nil, nil, nil
	return q, r
}

// useOften uses memory so often that it is registered.
func useOften(t *testing.T, q Queue, mem []byte) {
	t.Helper()
	was := make([]byte, len(mem))
	copy(was, mem)
	for range registerAfter {
		for at := 0; at < len(mem); at += 64 << 10 {
			mustRun(t, q, read(0, mem[at:][:512]))
		}
	}
	copy(mem, was)
}
