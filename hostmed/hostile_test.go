package hostmed

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// witness is a well-behaved client of the same mediator, on the same worker: it must notice nothing.
func witness(t *testing.T) (victim, evil string) {
	t.Helper()
	dir := t.TempDir()
	victim, evil = dir+"/good", dir+"/evil"
	specs := []string{"mem:size=4MiB"}
	start(t, Config{Controllers: []ControllerConfig{{Socket: victim, Namespaces: specs}, {Socket: evil, Namespaces: specs}}, CPUs: []int{0}})
	c := open(t, victim, guestdrv.Options{Timeout: patience})
	exerciseSmall(t, c)
	t.Cleanup(func() {
		exerciseSmall(t, c)
		if err := c.Close(); err != nil {
			t.Errorf("the other client: %v", err)
		}
		// And the attacked controller serves the next client.
		exerciseSmall(t, open(t, evil, guestdrv.Options{Timeout: patience}))
	})
	return victim, evil
}

func fdCount(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestGarbageOnTheSocket(t *testing.T) {
	_, evil := witness(t)
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		conn, err := net.Dial("unix", evil)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 1+r.IntN(5000))
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		_, _ = conn.Write(p)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		_, err = conn.Read(p)
		if errors.Is(err, os.ErrDeadlineExceeded) && len(p) > vfiouser.HeaderSize {
			t.Fatalf("seed %d: a client that sends garbage keeps its connection", seed)
		}
		conn.Close()
	}
}

// raw is a vfio-user client that does as it pleases with a controller it has enabled.
type raw struct {
	t   *testing.T
	c   *vfiouser.Client
	mem *shm.Region
	fd  int
}

const (
	rawBase = 0x1000_0000
	rawSize = 1 << 20
	rawASQ  = 0
	rawACQ  = 0x1000
	rawCQ   = 0x2000
	rawSQ   = 0x3000
	rawData = 0x10000
)

// attach connects, maps unsealed memory and enables the controller with a 16-entry admin queue pair.
func attach(t *testing.T, socket string) *raw {
	t.Helper()
	fd, err := unix.MemfdCreate("raw", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, rawSize); err != nil {
		t.Fatal(err)
	}
	mem, err := shm.Map(fd, 0, rawSize, true)
	if err != nil {
		t.Fatal(err)
	}
	r := &raw{t: t, mem: mem, fd: fd}
	t.Cleanup(func() { mem.Close(); unix.Close(fd) })
	r.connect(socket)
	return r
}

func (r *raw) connect(socket string) {
	r.t.Helper()
	ctx := context.Background()
	var err error
	// The client before may still be on its way out.
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if r.c, err = vfiouser.Dial(ctx, socket); err == nil {
			break
		}
		if time.Now().After(end) {
			r.t.Fatal(err)
		}
	}
	r.t.Cleanup(func() { r.c.Close() })
	if err := r.c.DMAMap(ctx, rawBase, rawSize, 0, r.fd, vfiouser.DMARead|vfiouser.DMAWrite); err != nil {
		r.t.Fatal(err)
	}
	r.reg32(nvme.RegAQA, 15<<16|15)
	r.reg64(nvme.RegASQ, rawBase+rawASQ)
	r.reg64(nvme.RegACQ, rawBase+rawACQ)
	r.reg32(nvme.RegCC, 0x460001)
	if csts := r.read32(nvme.RegCSTS); csts != 1 {
		r.t.Fatalf("CSTS %#x after enable", csts)
	}
}

func (r *raw) reg32(off uint64, v uint32) {
	r.t.Helper()
	if err := r.c.RegionWrite(context.Background(), vfiouser.RegionBAR0, off, binary.LittleEndian.AppendUint32(nil, v)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) reg64(off, v uint64) {
	r.t.Helper()
	if err := r.c.RegionWrite(context.Background(), vfiouser.RegionBAR0, off, binary.LittleEndian.AppendUint64(nil, v)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) read32(off uint64) uint32 {
	r.t.Helper()
	var p [4]byte
	if err := r.c.RegionRead(context.Background(), vfiouser.RegionBAR0, off, p[:]); err != nil {
		r.t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(p[:])
}

// queues creates I/O queue pair 1 of 16 entries by admin commands 0 and 1.
func (r *raw) queues() {
	r.t.Helper()
	z, _ := nvme.ToZeroBased16(16)
	var cq, sq nvme.Command
	cq.SetCreateCQ(1, z, rawBase+rawCQ, 1, false)
	sq.SetCreateSQ(1, z, rawBase+rawSQ, 1, 0)
	r.put(rawASQ, 0, cq)
	r.put(rawASQ, 1, sq)
	r.reg32(nvme.DoorbellBase, 2)
	r.wait(rawACQ, 1)
}

func (r *raw) put(ring uint64, slot int, c nvme.Command) {
	r.t.Helper()
	c.CID = uint16(slot)
	if err := r.mem.Write(ring+uint64(slot)*64, c.Bytes()[:]); err != nil {
		r.t.Fatal(err)
	}
}

// wait returns the completion in entry i of a CQ that is in its first lap.
func (r *raw) wait(cq uint64, i int) nvme.Status {
	r.t.Helper()
	w, err := r.mem.Word64(cq + uint64(i)*16 + 8)
	if err != nil {
		r.t.Fatal(err)
	}
	for end := time.Now().Add(patience); w.Load()>>48&1 == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatal("no completion")
		}
	}
	return nvme.Status(w.Load() >> 49)
}

func read4K(iova uint64) nvme.Command {
	return nvme.Command{Opcode: nvme.IORead, NSID: 1, PRP1: iova, CDW12: 7}
}

func TestWildDoorbells(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	r.queues()
	for _, x := range []struct {
		off uint64
		v   uint32
	}{{0x1008, 99}, {0x100c, 99}, {0x1010, 1}, {0x1f00, 1}, {0x1000 + 65*8, 3}, {0x3ffc, 7}} {
		r.reg32(x.off, x.v)
	}
	if csts := r.read32(nvme.RegCSTS); csts&1 != 1 {
		t.Errorf("CSTS %#x after invalid doorbells of I/O queues", csts)
	}
	r.reg32(nvme.DoorbellBase, 16)
	_ = r.read32(nvme.RegCSTS)
}

func TestPRPsOutsideMemory(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	r.queues()
	bad := []nvme.Command{read4K(0), read4K(rawBase + rawSize), read4K(^uint64(0xfff)), read4K(rawBase + rawSize - 512)}
	bad[3].PRP2 = rawBase + rawSize
	bad = append(bad, read4K(rawBase+rawData), read4K(rawBase+rawData+4))
	for i, c := range bad {
		r.put(rawSQ, i, c)
	}
	r.reg32(0x1008, uint32(len(bad)))
	got := map[uint16]nvme.Status{} // they need not complete in order
	for i := range bad {
		st := r.wait(rawCQ, i)
		w, _ := r.mem.Word64(rawCQ + uint64(i)*16 + 8)
		got[uint16(w.Load()>>32)] = st
	}
	for i := range bad {
		want := nvme.StatusDataTransferError
		if i == 4 {
			want = nvme.StatusSuccess
		}
		if st := got[uint16(i)]; st.Code() != want {
			t.Errorf("command %d: %v, want %v", i, st, want)
		}
	}
}

func TestRule36_ClientTruncatesItsMemory(t *testing.T) {
	for _, when := range []string{"idle", "I/O queue", "admin queue"} {
		t.Run(when, func(t *testing.T) {
			_, evil := witness(t)
			r := attach(t, evil)
			r.queues()
			r.put(rawSQ, 0, read4K(rawBase+rawData))
			if err := unix.Ftruncate(r.fd, 0); err != nil {
				t.Fatal(err)
			}
			four := binary.LittleEndian.AppendUint32(nil, 1)
			switch when {
			case "I/O queue":
				_ = r.c.RegionWrite(context.Background(), vfiouser.RegionBAR0, 0x1008, four)
			case "admin queue":
				four[0] = 3
				_ = r.c.RegionWrite(context.Background(), vfiouser.RegionBAR0, 0x1000, four)
			}
			r.c.Close()
		})
	}
}

func TestClientDiesMidCommand(t *testing.T) {
	_, evil := witness(t)
	before := fdCount(t)
	for i := range 20 {
		r := attach(t, evil)
		r.queues()
		for slot := range 15 {
			r.put(rawSQ, slot, read4K(rawBase+rawData))
		}
		r.reg32(0x1008, 15)
		if i%2 == 0 {
			_ = unix.Ftruncate(r.fd, 0)
		}
		r.c.Close()
	}
	// Each client left two descriptors to the test's own clean-up.
	for end := time.Now().Add(patience); fdCount(t) > before+20+2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors, %d before 20 clients came and died", fdCount(t), before)
		}
	}
}

// TestMemoryTakenBack unmaps memory under the queues and the data. Nothing fails: the controller waits for its memory, or for a
// reset.
func TestMemoryTakenBack(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	r.queues()
	ctx := context.Background()
	remap := func() {
		t.Helper()
		if err := r.c.DMAMap(ctx, rawBase, rawSize, 0, r.fd, vfiouser.DMARead|vfiouser.DMAWrite); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		if err := r.c.DMAUnmap(ctx, rawBase, rawSize); err != nil {
			t.Fatal(err)
		}
		r.put(rawSQ, i, read4K(rawBase+rawData))
		r.reg32(0x1008, uint32(i+1))
		if csts := r.read32(nvme.RegCSTS); csts != 1 {
			t.Errorf("CSTS %#x without memory, want RDY alone", csts)
		}
		remap()
		if st := r.wait(rawCQ, i); st != nvme.StatusSuccess {
			t.Errorf("a read that was rung without memory: %v", st)
		}
	}
	if err := r.c.DMAUnmap(ctx, rawBase, rawSize); err != nil {
		t.Fatal(err)
	}
	r.reg32(0x1008, 6)
	r.reg32(nvme.RegCC, 0)
	remap()
	if err := r.mem.Zero(0, rawSize); err != nil {
		t.Fatal(err)
	}
	r.reg32(nvme.RegCC, 0x460001)
	r.queues()
	r.put(rawSQ, 0, read4K(rawBase+rawData))
	r.reg32(0x1008, 1)
	if st := r.wait(rawCQ, 0); st != nvme.StatusSuccess {
		t.Errorf("a read after a reset: %v", st)
	}
}

// TestFloodOfDoorbells does not keep the worker from its other client.
func TestFloodOfDoorbells(t *testing.T) {
	victim, evil := witness(t)
	_ = victim
	r := attach(t, evil)
	r.queues()
	end := time.Now().Add(300 * time.Millisecond)
	four := make([]byte, 4)
	for time.Now().Before(end) {
		for range 64 {
			if err := r.c.RegionWritePosted(context.Background(), vfiouser.RegionBAR0, 0x1008, four); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestClientThatReadsNoReplies fills the socket with requests whose answers it never takes.
func TestClientThatReadsNoReplies(t *testing.T) {
	_, evil := witness(t)
	conn, err := net.Dial("unix", evil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	v := vfiouser.Version{}
	var msg []byte
	h := vfiouser.Header{ID: 1, Cmd: vfiouser.CmdVersion}
	body := v.Append(nil)
	h.Size = uint32(vfiouser.HeaderSize + len(body))
	msg = append(h.Append(msg), body...)
	h = vfiouser.Header{ID: 2, Cmd: vfiouser.CmdRegionRead, Size: vfiouser.HeaderSize + vfiouser.RegionAccessSize}
	get := append(h.Append(nil), vfiouser.AppendRegionAccess(nil, 0, vfiouser.RegionConfig, 4096)...)
	for range 500 {
		msg = append(msg, get...)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = conn.Write(msg)
	time.Sleep(50 * time.Millisecond)
}
