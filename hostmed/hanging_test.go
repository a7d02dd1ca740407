package hostmed

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// Media that hang: what they were given they end when they like, and not because a guest resets its controller.

// hangs is how long they do, beyond what is waited for.
const hangs = 1500 * time.Millisecond

// hanging is a guest of a file whose first n reads hang for that long.
func hanging(t *testing.T, mode DoorbellMode, n string, hangFor time.Duration) (g *bareGuest, socket string, data []byte) {
	t.Helper()
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk")
	data = random(t, bareQueues*bareEntries*bareBytes)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	socket, _ = one(t, mode, "fault:stuck="+hangFor.String()+"@read@first="+n+",over=file:"+path)
	return newBareGuest(t, socket), socket, data
}

// hung begins n reads, which hang, and a flush, which ends, and says where the data will be.
func (g *bareGuest) hung(n uint64) (at uint64) {
	g.Helper()
	g.submit(0, n, false)
	q := &g.life.io[0]
	q.sq.Push(&nvme.Command{Opcode: nvme.IOFlush, NSID: 1, CID: uint16(n)})
	g.publish(q)
	g.wait(q, 1)
	return g.life.base + dataAt
}

// reads has a queue that works read what the file has.
func (g *bareGuest) reads(want []byte) {
	g.Helper()
	g.submit(1, 8, false)
	g.wait(&g.life.io[1], 8)
	at := uint64(bareEntries * bareBytes)
	got, err := g.mem.Bytes(g.life.base+dataAt+at, 8*bareBytes)
	g.must(err)
	if !bytes.Equal(got, want[at:][:len(got)]) {
		g.Fatal("other data")
	}
}

// A reset is answered while commands hang. Until they have ended CSTS.RDY is 1, and not one byte is written after it is 0. Then all is well.
func TestResetWhileCommandsHang(t *testing.T) {
	resets := []struct {
		name string
		do   func(g *bareGuest) error
		want error
		hang time.Duration
	}{
		{"CC.EN", func(g *bareGuest) error {
			g.write32(nvme.RegCC, uint32(nvme.CC(g.read32(nvme.RegCC)).WithEN(false)))
			return nil
		}, nil, hangs},
		{"NSSR", func(g *bareGuest) error { g.write32(nvme.RegNSSR, nvme.NSSRReset); return nil }, nil, hangs},
		{"FLR", func(g *bareGuest) error { g.config(pci.CapPCIe+8, 1<<15); return nil }, nil, hangs},
		{"DEVICE_RESET", func(g *bareGuest) error { g.config(4, 0); return g.c.Reset(g.Context()) }, unix.EBUSY, resetPatience + hangs},
	}
	for _, mode := range modes {
		for _, reset := range resets {
			t.Run(mode.String()+"/"+reset.name, func(t *testing.T) {
				g, _, data := hanging(t, mode, "4", reset.hang)
				g.enable(0, mode == Shadow)
				at := g.hung(4)
				old := g.life
				empty := bytes.Repeat([]byte{0x5a}, 4*bareBytes)
				g.must(g.mem.Write(at, empty))
				if err := reset.do(g); !errors.Is(err, reset.want) {
					t.Errorf("answered with %v, want %v", err, reset.want)
				}
				if got, err := g.mem.Bytes(at, uint64(len(empty))); err != nil || !bytes.Equal(got, empty) {
					t.Error("it was answered only when the commands had ended")
				}
				if !g.ready() {
					t.Fatal("CSTS.RDY is 0, and the medium still has what it will write to")
				}
				// Queues, shadow pages and doorbells are dead from the answer on.
				g.must(g.mem.Write(0, bytes.Repeat([]byte{0xa5}, dataAt)))
				for i := range old.io {
					g.life = life{}
					g.publish(&old.io[i])
				}
				g.publish(&old.admin)
				g.eventually("CSTS.RDY=0", func() bool { return !g.ready() })
				if got, err := g.mem.Bytes(at, uint64(len(empty))); err != nil || !bytes.Equal(got, data[:len(empty)]) {
					t.Error("CSTS.RDY was 0 before the commands had ended")
				}
				g.must(g.mem.Write(0, bytes.Repeat([]byte{0xa5}, guestRAM)))
				time.Sleep(5 * time.Millisecond)
				g.untouched(0, guestRAM)
				g.enable(halfLife, mode == Shadow)
				g.reads(data)
				g.untouched(0, halfLife)
			})
		}
	}
}

// A driver that does not wait for CSTS.RDY=0 is served when that would have been.
func TestEnabledBeforeResetIsOver(t *testing.T) {
	g, _, data := hanging(t, Trap, "1", hangs)
	g.enable(0, false)
	g.hung(1)
	g.write32(nvme.RegCC, 0)
	if !g.ready() {
		t.Fatal("CSTS.RDY=0")
	}
	g.enable(halfLife, false) // which waits for RDY=1
	if got, err := g.mem.Bytes(dataAt, bareBytes); err != nil || !bytes.Equal(got, data[:bareBytes]) {
		t.Error("CSTS.RDY was 1 again before the command had ended")
	}
	g.reads(data)
}

// Memory in use by a command that hangs is unmapped in time, with EBUSY; it stays here until the command has ended. If it comes back, so do the queues.
func TestUnmapWhileCommandsHang(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			g, _, data := hanging(t, mode, "1", unmapPatience+hangs)
			g.enable(0, mode == Shadow)
			at := g.hung(1)
			if err := g.c.DMAUnmap(g.Context(), guestIOVA, guestRAM); !errors.Is(err, unix.EBUSY) {
				t.Fatalf("unmapped: %v", err)
			}
			g.must(g.c.DMAMap(g.Context(), guestIOVA, guestRAM, 0, g.mem.FD(), vfiouser.DMARead|vfiouser.DMAWrite))
			g.reads(data)
			g.wait(&g.life.io[0], 1)
			if got, err := g.mem.Bytes(at, bareBytes); err != nil || !bytes.Equal(got, data[:bareBytes]) {
				t.Error("the command has not ended as it should")
			}
			g.must(g.c.DMAUnmap(g.Context(), guestIOVA, guestRAM))
		})
	}
}

// Deleting a queue with a command that hangs takes as long as that, and other messages are answered meanwhile.
func TestDeleteQueueWhileCommandsHang(t *testing.T) {
	g, _, data := hanging(t, Trap, "1", hangs)
	g.enable(0, false)
	at := g.hung(1)
	var cmd nvme.Command
	cmd.Opcode, cmd.CDW10 = nvme.AdminDeleteSQ, 1
	g.life.admin.sq.Push(&cmd)
	g.publish(&g.life.admin)
	g.reads(data)
	if _, ok := g.life.admin.cq.Next(); ok {
		t.Error("the queue is deleted, and its command has not ended")
	}
	g.wait(&g.life.io[0], 1)
	if got, err := g.mem.Bytes(at, bareBytes); err != nil || !bytes.Equal(got, data[:bareBytes]) {
		t.Error("the command has not ended as it should")
	}
	g.wait(&g.life.admin, 1)
}

// A client that goes while its commands hang leaves the controller to the next when they have ended, and that one is told so in time.
func TestNextClientWhileCommandsHang(t *testing.T) {
	g, socket, data := hanging(t, Trap, "1", leavingPatience+hangs)
	g.enable(0, false)
	g.hung(1)
	g.must(g.c.Close())
	if c, err := vfiouser.Dial(t.Context(), socket); !errors.Is(err, unix.EBUSY) {
		if err == nil {
			c.Close()
		}
		t.Fatalf("the next client: %v", err)
	}
	time.Sleep(hangs)
	g = newBareGuest(t, socket)
	g.enable(0, false)
	g.reads(data)
}
