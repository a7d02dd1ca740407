package hostmed

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// bareGuest is a guest whose memory is one file, all of it in view, and whose driver takes no care of anything.
type bareGuest struct {
	*testing.T
	c     *vfiouser.Client
	mem   *shm.Region
	bells *shm.Region // mapped doorbells; nil: messages
	life  life
}

// life is what a guest has from one enable to the next reset: everything of it lies behind base.
type life struct {
	base   uint64
	admin  queuePair
	io     []queuePair
	shadow *shm.Region // nil: none
}

type queuePair struct {
	qid uint16
	sq  *ring.SQProducer
	cq  *ring.CQConsumer
}

const (
	guestRAM  = 8 << 20
	guestIOVA = 1 << 20 // of its first byte
	halfLife  = guestRAM / 2

	bareQueues  = 4
	bareEntries = 64
	bareBytes   = 8 << 10 // of each command

	// Offsets from a life's base.
	adminSQ, adminCQ  = 0, 0x1000
	shadowAt, eventAt = 0x2000, 0x3000
	queuesAt          = 0x4000   // 2 pages each
	dataAt            = 0x100000 // bareBytes for each entry of each queue
)

func newBareGuest(t *testing.T, socket string) *bareGuest {
	t.Helper()
	g := &bareGuest{T: t}
	var err error
	if g.c, err = vfiouser.Dial(t.Context(), socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.c.Close() })
	if g.mem, err = shm.NewMemfd("guest", guestRAM); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.mem.Close() })
	g.must(g.c.DMAMap(t.Context(), guestIOVA, guestRAM, 0, g.mem.FD(), vfiouser.DMARead|vfiouser.DMAWrite))
	info, err := g.c.RegionInfo(t.Context(), vfiouser.RegionBAR0)
	g.must(err)
	if info.FD >= 0 {
		g.bells, err = shm.Map(info.FD, int64(info.Offset)+nvme.DoorbellBase, shm.PageSize, true)
		g.must(err)
		t.Cleanup(func() { g.bells.Close() })
		g.must(os.NewFile(uintptr(info.FD), "bar0").Close())
	}
	return g
}

func (g *bareGuest) must(err error) {
	g.Helper()
	if err != nil {
		g.Fatal(err)
	}
}

func (g *bareGuest) config(off uint64, v uint16) {
	g.Helper()
	g.must(g.c.RegionWrite(g.Context(), vfiouser.RegionConfig, off, binary.LittleEndian.AppendUint16(nil, v)))
}

func (g *bareGuest) read32(off uint64) uint32 {
	g.Helper()
	var b [4]byte
	g.must(g.c.RegionRead(g.Context(), vfiouser.RegionBAR0, off, b[:]))
	return binary.LittleEndian.Uint32(b[:])
}

func (g *bareGuest) write32(off uint64, v uint32) {
	g.Helper()
	g.must(g.c.RegionWrite(g.Context(), vfiouser.RegionBAR0, off, binary.LittleEndian.AppendUint32(nil, v)))
}

func (g *bareGuest) write64(off, v uint64) {
	g.Helper()
	g.must(g.c.RegionWrite(g.Context(), vfiouser.RegionBAR0, off, binary.LittleEndian.AppendUint64(nil, v)))
}

func (g *bareGuest) eventually(what string, done func() bool) {
	g.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			g.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func (g *bareGuest) ready() bool { return nvme.CSTS(g.read32(nvme.RegCSTS)).RDY() }

// doorbell rings by message, and by the page where there is one.
func (g *bareGuest) doorbell(off uint32, v uint32) {
	g.Helper()
	if g.bells != nil {
		w, err := g.bells.Word32(uint64(off - nvme.DoorbellBase))
		g.must(err)
		w.Store(v)
		return
	}
	g.must(g.c.RegionWritePosted(context.Background(), vfiouser.RegionBAR0, uint64(off), binary.LittleEndian.AppendUint32(nil, v)))
}

// publish rings for q and, with shadow doorbells, whether the controller asked for it or not: that is allowed.
func (g *bareGuest) publish(q *queuePair) {
	g.Helper()
	if g.life.shadow != nil && q.qid != 0 {
		tail, head, err := dbbuf.Slots(g.life.shadow, q.qid, 0)
		g.must(err)
		tail.Store(q.sq.Tail())
		head.Store(q.cq.Head())
	}
	g.doorbell(nvme.SQTailDoorbell(q.qid, 0), q.sq.Tail())
	g.doorbell(nvme.CQHeadDoorbell(q.qid, 0), q.cq.Head())
}

func (g *bareGuest) pair(qid uint16, sqAt, cqAt uint64) queuePair {
	g.Helper()
	view := func(at uint64) *shm.Region {
		v, err := g.mem.View(at, shm.PageSize)
		g.must(err)
		g.must(v.Zero(0, shm.PageSize))
		return v
	}
	q := queuePair{qid: qid}
	var err error
	q.sq, err = ring.NewSQProducer(view(sqAt), bareEntries)
	g.must(err)
	q.cq, err = ring.NewCQConsumer(view(cqAt), bareEntries)
	g.must(err)
	return q
}

// wait takes n completions, each of which must be a success.
func (g *bareGuest) wait(q *queuePair, n int) {
	g.Helper()
	for range n {
		var e ring.Entry
		g.eventually("a completion", func() (ok bool) { e, ok = q.cq.Next(); return ok })
		if !e.Status().OK() {
			g.Fatalf("queue %d, command %d: %v", q.qid, e.CID(), e.Status())
		}
		g.must(q.sq.Released(e.SQHead()))
	}
	g.publish(q)
}

func (g *bareGuest) adminCommand(cmd nvme.Command) {
	g.Helper()
	g.life.admin.sq.Push(&cmd)
	g.publish(&g.life.admin)
	g.wait(&g.life.admin, 1)
}

// enable begins a life in the memory behind base.
func (g *bareGuest) enable(base uint64, shadow bool) {
	g.Helper()
	g.life = life{base: base}
	g.config(4, 6) // memory space, bus master
	z, _ := nvme.ToZeroBased16(bareEntries)
	g.life.admin = g.pair(0, base+adminSQ, base+adminCQ)
	g.write32(nvme.RegAQA, uint32(nvme.AQA(0).WithASQS(z).WithACQS(z)))
	g.write64(nvme.RegASQ, guestIOVA+base+adminSQ)
	g.write64(nvme.RegACQ, guestIOVA+base+adminCQ)
	g.write32(nvme.RegCC, uint32(nvme.CC(0).WithEN(true).WithIOSQES(6).WithIOCQES(4)))
	g.eventually("CSTS.RDY=1", g.ready)
	if shadow {
		pages, err := g.mem.View(base+shadowAt, 2*shm.PageSize)
		g.must(err)
		g.must(pages.Zero(0, pages.Len()))
		var cmd nvme.Command
		cmd.SetDoorbellBuffers(nvme.AdminDoorbellBufferConfig, guestIOVA+base+shadowAt, guestIOVA+base+eventAt)
		g.adminCommand(cmd)
		g.life.shadow, err = g.mem.View(base+shadowAt, shm.PageSize)
		g.must(err)
	}
	for i := range uint16(bareQueues) {
		qid, at := i+1, base+queuesAt+uint64(i)*2*shm.PageSize
		q := g.pair(qid, at, at+shm.PageSize)
		var cmd nvme.Command
		cmd.SetCreateCQ(qid, z, guestIOVA+at+shm.PageSize, 0, false)
		g.adminCommand(cmd)
		cmd = nvme.Command{}
		cmd.SetCreateSQ(qid, z, guestIOVA+at, qid, 0)
		g.adminCommand(cmd)
		g.life.io = append(g.life.io, q)
	}
}

// submit fills queue i with reads, and with writes where write says so, and rings.
func (g *bareGuest) submit(i int, n uint64, write bool) {
	g.Helper()
	q := &g.life.io[i]
	for k := range n {
		var cmd nvme.Command
		op := uint8(nvme.IORead)
		if write {
			op = nvme.IOWrite
		}
		nth := uint64(i)*bareEntries + k
		z, _ := nvme.ToZeroBased16(bareBytes / 512)
		cmd.SetRW(op, 1, nth*bareBytes/512, z)
		cmd.CID = uint16(k)
		cmd.PRP1 = guestIOVA + g.life.base + dataAt + nth*bareBytes
		cmd.PRP2 = cmd.PRP1 + shm.PageSize
		q.sq.Push(&cmd)
	}
	g.publish(q)
}

// bareResets are the ways to reset a controller. Each returns when the guest may use its memory for other things.
var bareResets = []struct {
	name string
	do   func(g *bareGuest)
}{
	{"CC.EN", func(g *bareGuest) { g.write32(nvme.RegCC, uint32(nvme.CC(g.read32(nvme.RegCC)).WithEN(false))) }},
	{"NSSR", func(g *bareGuest) { g.write32(nvme.RegNSSR, nvme.NSSRReset) }},
	{"FLR", func(g *bareGuest) { g.config(pci.CapPCIe+8, 1<<15) }},
	// As QEMU does when its machine is reset.
	{"DEVICE_RESET", func(g *bareGuest) { g.config(4, 0); g.must(g.c.Reset(g.Context())) }},
}

// R21: from the moment that a reset is done not a byte of guest memory is written, whatever was in flight and whatever is rung: not the
// pages of shadow doorbells and event indices, no queue, no data. What the next life has elsewhere does not change that.
func TestRule21_NoByteIsWrittenAfterAReset(t *testing.T) {
	for _, mode := range modes {
		for _, reset := range bareResets {
			t.Run(mode.String()+"/"+reset.name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "disk")
				want := random(t, bareQueues*bareEntries*bareBytes)
				if err := os.WriteFile(path, want, 0o600); err != nil {
					t.Fatal(err)
				}
				socket, _ := one(t, mode, "file:"+path)
				g := newBareGuest(t, socket)
				sentinel := bytes.Repeat([]byte{0xa5}, guestRAM)
				for round := range 4 {
					// Each life has one half of the memory, and the other is the grave of the one before.
					base := uint64(round%2) * halfLife
					g.enable(base, mode == Shadow)
					for i := range bareQueues {
						g.submit(i, bareEntries-1, false)
					}
					old := g.life
					reset.do(g)
					g.eventually("CSTS.RDY=0", func() bool { return !g.ready() })
					g.must(g.mem.Write(0, sentinel))
					for i := range old.io {
						g.life = life{}
						g.publish(&old.io[i])
					}
					g.publish(&old.admin)
					time.Sleep(5 * time.Millisecond)
					g.untouched(0, guestRAM)

					g.enable(halfLife-base, mode == Shadow)
					for i := range bareQueues {
						g.submit(i, 8, false)
						g.wait(&g.life.io[i], 8)
						at := uint64(i) * bareEntries * bareBytes
						got, err := g.mem.Bytes(g.life.base+dataAt+at, 8*bareBytes)
						g.must(err)
						if !bytes.Equal(got, want[at:][:len(got)]) {
							t.Fatal("the next life reads other data")
						}
					}
					g.untouched(base, halfLife)
					reset.do(g)
					g.eventually("CSTS.RDY=0", func() bool { return !g.ready() })
				}
			})
		}
	}
}

// untouched checks that memory has what the last reset left there.
func (g *bareGuest) untouched(off, n uint64) {
	g.Helper()
	got, err := g.mem.Bytes(off, n)
	g.must(err)
	if bytes.Count(got, []byte{0xa5}) != len(got) {
		for i, b := range got {
			if b != 0xa5 {
				g.Fatalf("guest memory was written after the reset, at %#x of its life", (off+uint64(i))%halfLife)
			}
		}
	}
}
