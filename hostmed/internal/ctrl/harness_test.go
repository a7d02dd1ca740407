package ctrl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Where the tests' driver has its things.
const (
	ramBase   = 0x100000
	ramSize   = 1 << 20
	sqIOVA    = ramBase
	cqIOVA    = ramBase + 0x1000
	dataIOVA  = ramBase + 0x2000 // 16 KiB
	dataBytes = 0x4000
	listIOVA  = ramBase + 0x6000
	page1IOVA = ramBase + 0x7000
	page2IOVA = ramBase + 0x8000
	page3IOVA = ramBase + 0x9000
	page4IOVA = ramBase + 0xa000
	ioIOVA    = ramBase + 0x10000

	adminDepth = 32
)

// ram is guest memory in one mapping, of which pages can be unmapped.
type ram struct {
	r    *shm.Region
	gone map[uint64]bool // by page
}

func (m ram) View(iova, n uint64) (*shm.Region, error) {
	for p := iova &^ 0xfff; p < iova+n && len(m.gone) > 0; p += 0x1000 {
		if m.gone[p] {
			return nil, fmt.Errorf("%#x is not mapped", p)
		}
	}
	return m.r.View(iova-ramBase, n)
}
func (m ram) ReadIOVA(iova uint64, p []byte) bool  { return m.r.Read(iova-ramBase, p) == nil }
func (m ram) WriteIOVA(iova uint64, p []byte) bool { return m.r.Write(iova-ramBase, p) == nil }

func (m ram) word(iova uint64) *atomic.Uint32 {
	w, err := m.r.Word32(iova - ramBase)
	if err != nil {
		panic(err)
	}
	return w
}

// fakePath is a data path that writes down what it is told.
type fakePath struct {
	calls      []string
	tail, head atomic.Uint32
	taken      [2]uint32
	interrupts int
	onIRQ      func()
	cqs, sqs   map[uint16]bool
	prio       uint8 // of the last SQ
	shadow, ei *shm.Region
	aborts     map[uint16]bool // by CID
	fail       error           // of the next call that can fail
	flushErr   error
	flushing   chan struct{} // Flush waits until it is closed; nil: it does not
	onStop     func()
	hangs      bool          // Stop finds commands that do not end
	ended      chan struct{} // DeleteSQ does until it is closed; nil: not
}

func (f *fakePath) note(format string, args ...any) {
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
}

func (f *fakePath) failure() error {
	err := f.fail
	f.fail = nil
	return err
}

func (f *fakePath) CreateCQ(p CQParams) error {
	if err := f.failure(); err != nil {
		return err
	}
	f.note("CreateCQ %d size %d vector %d ien %v mem %d", p.QID, p.Size, p.Vector, p.IEN, p.Mem.Len())
	f.cqs[p.QID] = true
	return nil
}

func (f *fakePath) CreateSQ(p SQParams) error {
	if err := f.failure(); err != nil {
		return err
	}
	f.note("CreateSQ %d on %d size %d mem %d", p.QID, p.CQID, p.Size, p.Mem.Len())
	f.sqs[p.QID], f.prio = true, p.Prio
	return nil
}

func (f *fakePath) DeleteCQ(qid uint16) { delete(f.cqs, qid) }
func (f *fakePath) DeleteSQ(qid uint16) (later func()) {
	if f.ended != nil {
		select {
		case <-f.ended:
		default:
			return func() { <-f.ended }
		}
	}
	delete(f.sqs, qid)
	return nil
}

func (f *fakePath) Abort(_, cid uint16) bool { return f.aborts[cid] }

func (f *fakePath) SetDoorbellPages(shadow, ei *shm.Region) error {
	if err := f.failure(); err != nil {
		return err
	}
	f.shadow, f.ei = shadow, ei
	return nil
}

func (f *fakePath) ResumeDoorbellPages(shadow, ei *shm.Region) error {
	f.note("ResumeDoorbellPages")
	return f.SetDoorbellPages(shadow, ei)
}

func (f *fakePath) SetQuiet(on bool)                   { f.note("SetQuiet %v", on) }
func (f *fakePath) SetCoalescing(thr, time uint8)      { f.note("SetCoalescing %d %d", thr, time) }
func (f *fakePath) SetVectorConfig(v uint16, off bool) { f.note("SetVectorConfig %d %v", v, off) }
func (f *fakePath) SetDULBE(nsid uint32, on bool)      { f.note("SetDULBE %d %v", nsid, on) }
func (f *fakePath) SetArbitration(on bool, v nvme.Arbitration) {
	f.note("SetArbitration %v %#x", on, v)
}
func (f *fakePath) SetWriteCache(on bool)                 { f.note("SetWriteCache %v", on) }
func (f *fakePath) AdminDoorbells() (t, h *atomic.Uint32) { return &f.tail, &f.head }
func (f *fakePath) AdminTaken(t, h uint32)                { f.taken = [2]uint32{t, h} }
func (f *fakePath) ZeroAdminDoorbells()                   { f.tail.Store(0); f.head.Store(0) }

func (f *fakePath) Interrupt(uint16) {
	f.interrupts++
	if f.onIRQ != nil {
		f.onIRQ()
	}
}

func (f *fakePath) Stop(time.Duration) bool {
	if f.onStop != nil {
		f.onStop()
	}
	f.note("Stop")
	clear(f.cqs)
	clear(f.sqs)
	f.shadow, f.ei = nil, nil
	return !f.hangs
}

func (f *fakePath) Flush() error {
	if f.flushing != nil {
		<-f.flushing
	}
	return f.flushErr
}

// host is the tests' driver.
type host struct {
	testing.TB
	mem ram
	dp  *fakePath
	c   *Controller
	sq  *ring.SQProducer
	cq  *ring.CQConsumer
	cid uint16

	sqAt, cqAt uint64 // the admin queues
}

func testConfig() Config {
	info := backend.Info{
		Blocks: 1 << 21, LBAShift: 9, Discard: true, DiscardZeroes: true, WriteZeroes: true, VolatileCache: true, OptimalBlocks: 8,
		NGUID: [16]byte{1, 2, 3}, UUID: [16]byte{4, 5, 6},
	}
	readOnly := backend.Info{Blocks: 1000, LBAShift: 12, ReadOnly: true}
	return Config{
		CNTLID: 7, SubNQN: "nqn.2026-11.io.shadowbell:test", Serial: "SB0001", Model: "shadowbell", Firmware: "1.0",
		Namespaces: []Namespace{{NSID: 3, Info: readOnly}, {NSID: 1, Info: info}},
		VID:        nvme.PCIVendorGoogle, SSVID: nvme.PCIVendorGoogle,
		Stats: func() IOStats {
			return IOStats{ReadBytes: 512_001, WriteBytes: 1, ReadCommands: 10, WriteCommands: 20, MediaErrors: 3, Busy: 150 * time.Second}
		},
	}
}

// newHost returns a driver of a controller that is still disabled.
func newHost(t testing.TB, cfg Config) *host {
	h := &host{TB: t, mem: ram{shm.NewHeap(ramSize), map[uint64]bool{}}, dp: &fakePath{cqs: map[uint16]bool{}, sqs: map[uint16]bool{}}}
	h.c = New(cfg, h.dp, h.mem)
	t.Cleanup(h.c.Close)
	return h
}

func newEnabled(t testing.TB, cfg Config) *host {
	h := newHost(t, cfg)
	h.enable()
	return h
}

const goodCC = nvme.CC(1 | 6<<16 | 4<<20)

func (h *host) enable() { h.Helper(); h.enableWith(goodCC, 0) }

// enableWith enables with cc and has the admin queues off bytes above their usual places.
func (h *host) enableWith(cc nvme.CC, off uint64) {
	h.Helper()
	h.sqAt, h.cqAt = sqIOVA+off, cqIOVA+off
	if off > 0 {
		h.cqAt = h.sqAt + off
	}
	for _, iova := range []uint64{h.sqAt, h.cqAt} {
		if err := h.mem.r.Zero(iova-ramBase, 0x1000); err != nil {
			h.Fatal(err)
		}
	}
	h.writeReg(nvme.RegAQA, 4, (adminDepth-1)|(adminDepth-1)<<16)
	h.writeReg(nvme.RegASQ, 8, h.sqAt)
	h.writeReg(nvme.RegACQ, 8, h.cqAt)
	h.writeReg(nvme.RegCC, 4, uint64(cc))
	if st := h.csts(); !st.RDY() || st.CFS() {
		h.Fatalf("after enable: %v", st)
	}
	h.newRings()
}

func (h *host) newRings() {
	sqMem, err1 := h.mem.View(h.sqAt, adminDepth*ring.SQESize)
	cqMem, err2 := h.mem.View(h.cqAt, adminDepth*ring.CQESize)
	if err := errors.Join(err1, err2); err != nil {
		h.Fatal(err)
	}
	h.sq, err1 = ring.NewSQProducer(sqMem, adminDepth)
	h.cq, err2 = ring.NewCQConsumer(cqMem, adminDepth)
	if err := errors.Join(err1, err2); err != nil {
		h.Fatal(err)
	}
}

func (h *host) disable() { h.writeReg(nvme.RegCC, 4, 0) }

func (h *host) csts() nvme.CSTS { return nvme.CSTS(h.readReg(nvme.RegCSTS, 4)) }

func (h *host) readReg(off uint64, n int) uint64 {
	h.Helper()
	var b [8]byte
	if err := h.c.ReadReg(off, b[:n]); err != nil {
		h.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

func (h *host) writeReg(off uint64, n int, v uint64) {
	h.Helper()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	if err := h.c.WriteReg(off, b[:n]); err != nil {
		h.Fatal(err)
	}
}

// push puts a command in the ring and does not ring.
func (h *host) push(cmd nvme.Command) uint16 {
	h.cid++
	cmd.CID = h.cid
	h.sq.Push(&cmd)
	return cmd.CID
}

// ring rings the tail doorbell as a register and lets the controller work.
func (h *host) ring() {
	h.dp.tail.Store(h.sq.Tail())
	for h.c.AdminKick() {
	}
}

// reap takes what was posted, and rings the head doorbell.
func (h *host) reap() []ring.Entry {
	h.Helper()
	var es []ring.Entry
	for e, ok := h.cq.Next(); ok; e, ok = h.cq.Next() {
		if err := h.sq.Released(e.SQHead()); err != nil {
			h.Fatal(err)
		}
		es = append(es, e)
	}
	if len(es) > 0 {
		h.dp.head.Store(h.cq.Head())
		for h.c.AdminKick() {
		}
	}
	return es
}

// do runs one command and returns its completion, which must be the only one.
func (h *host) do(cmd nvme.Command) ring.Entry {
	h.Helper()
	cid := h.push(cmd)
	h.ring()
	es := h.reap()
	if len(es) != 1 || es[0].CID() != cid || es[0].SQID() != 0 {
		h.Fatalf("%s: completions %+v, want one of %d", cmd.Describe(true), es, cid)
	}
	return es[0]
}

// ok runs a command that must succeed and returns DW0.
func (h *host) ok(cmd nvme.Command) uint32 {
	h.Helper()
	e := h.do(cmd)
	if !e.Status().OK() {
		h.Fatalf("%s: %v", cmd.Describe(true), e.Status())
	}
	return e.Result()
}

// fails runs a command that must fail with want, DNR and M.
func (h *host) fails(cmd nvme.Command, want nvme.Status) {
	h.Helper()
	if got := h.do(cmd).Status(); got != want.WithDNR().WithMore() {
		h.Errorf("%s: %v, want %v", cmd.Describe(true), got, want)
	}
}

// data returns what the controller wrote at dataIOVA.
func (h *host) data(n int) []byte {
	p := make([]byte, n)
	if !h.mem.ReadIOVA(dataIOVA, p) {
		h.Fatal("data buffer")
	}
	return p
}

func (h *host) identify(cns nvme.CNS, nsid uint32) []byte {
	h.Helper()
	h.ok(identifyCmd(cns, nsid))
	return h.data(nvme.IdentifySize)
}

func identifyCmd(cns nvme.CNS, nsid uint32) nvme.Command {
	cmd := nvme.Command{PRP1: dataIOVA}
	cmd.SetIdentify(cns, nsid, nvme.CSINVM)
	return cmd
}

func (h *host) log(lid nvme.LogPage, n uint64, retain bool) []byte {
	h.Helper()
	h.ok(logCmd(lid, 0, n, retain))
	return h.data(int(n))
}

func logCmd(lid nvme.LogPage, off, n uint64, retain bool) nvme.Command {
	cmd := nvme.Command{PRP1: dataIOVA, PRP2: dataIOVA + 0x1000}
	if err := cmd.SetGetLogPage(lid, nvme.NSIDAll, off, n, retain); err != nil {
		panic(err)
	}
	return cmd
}

func setFeature(fid nvme.FeatureID, nsid, value uint32) nvme.Command {
	cmd := nvme.Command{PRP1: dataIOVA}
	cmd.SetSetFeatures(fid, nsid, value)
	return cmd
}

func getFeature(fid nvme.FeatureID, nsid uint32, sel nvme.FeatureSelect, cdw11 uint32) nvme.Command {
	cmd := nvme.Command{PRP1: dataIOVA}
	cmd.SetGetFeatures(fid, nsid, sel)
	cmd.CDW11 = cdw11
	return cmd
}

func createCQ(qid uint16, size uint32, vector uint16) nvme.Command {
	var cmd nvme.Command
	cmd.SetCreateCQ(qid, nvme.ZeroBased16(size-1), ioIOVA, vector, true)
	return cmd
}

func createSQ(qid uint16, size uint32, cqid uint16) nvme.Command {
	var cmd nvme.Command
	cmd.SetCreateSQ(qid, nvme.ZeroBased16(size-1), ioIOVA, cqid, 0)
	return cmd
}

func deleteQueue(opcode uint8, qid uint16) nvme.Command {
	return nvme.Command{Opcode: opcode, CDW10: uint32(qid)}
}

func aer() nvme.Command { return nvme.Command{Opcode: nvme.AdminAsyncEventRequest} }

func doorbellConfig(opcode uint8, shadow, ei uint64) nvme.Command {
	var cmd nvme.Command
	cmd.SetDoorbellBuffers(opcode, shadow, ei)
	return cmd
}

// called reports whether the data path was told call.
func (f *fakePath) called(call string) bool { return slices.Contains(f.calls, call) }
