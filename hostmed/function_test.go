package hostmed

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// The PCI function as a client meets it: interrupts by pin and by MSI-X, power states, bus mastering, resets.

func (r *raw) config(off uint64, n int) uint32 {
	r.t.Helper()
	var p [4]byte
	if err := r.c.RegionRead(context.Background(), vfiouser.RegionConfig, off, p[:n]); err != nil {
		r.t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(p[:])
}

func (r *raw) setConfig(off uint64, v uint16) {
	r.t.Helper()
	if err := r.c.RegionWrite(context.Background(), vfiouser.RegionConfig, off, binary.LittleEndian.AppendUint16(nil, v)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) irqs(index, flags, start, count uint32, fds ...int) {
	r.t.Helper()
	if err := r.c.IRQAction(context.Background(), vfiouser.SetIRQs{Index: index, Flags: flags, Start: start, Count: count}, fds); err != nil {
		r.t.Fatal(err)
	}
}

const (
	pciCommand  = 4
	pciStatus   = 6
	pciMaster   = 6 // memory and bus master
	pciPower    = pci.CapPM + 4
	pciMSIX     = pci.CapMSIX + 2
	pciDevCtl   = pci.CapPCIe + 8
	setEventFD  = vfiouser.IRQSetDataEventFD | vfiouser.IRQSetTrigger
	setNone     = vfiouser.IRQSetDataNone
	statusLevel = 1 << 3
)

// eventfd is an eventfd of the client's.
type eventfd struct {
	t  *testing.T
	fd int
}

func newEventFD(t *testing.T) eventfd {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return eventfd{t, fd}
}

func (e eventfd) write() {
	e.t.Helper()
	if _, err := unix.Write(e.fd, binary.LittleEndian.AppendUint64(nil, 1)); err != nil {
		e.t.Fatal(err)
	}
}

func (e eventfd) wait(what string) {
	e.t.Helper()
	fds := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, int(patience.Milliseconds()))
	for err == unix.EINTR { // the runtime's preemption
		n, err = unix.Poll(fds, int(patience.Milliseconds()))
	}
	if n != 1 {
		e.t.Fatalf("%s: no interrupt, %v", what, err)
	}
	if n := e.taken(); n != 1 {
		e.t.Fatalf("%s: %d interrupts", what, n)
	}
}

func (e eventfd) taken() uint64 {
	var b [8]byte
	if n, _ := unix.Read(e.fd, b[:]); n != 8 {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

// identify puts an Identify in the admin SQ's slot and rings.
func (r *raw) identify(slot int) {
	r.t.Helper()
	var c nvme.Command
	c.SetIdentify(nvme.CNSController, 0, 0)
	c.PRP1 = rawBase + rawData
	r.put(rawASQ, slot, c)
	r.reg32(nvme.DoorbellBase, uint32(slot+1))
}

func TestINTx(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	if pin := r.config(0x3d, 1); pin != 1 {
		t.Errorf("interrupt pin %d", pin)
	}
	info, err := r.c.IRQInfo(context.Background(), vfiouser.IRQINTx)
	if want := vfiouser.IRQEventFD | vfiouser.IRQMaskable | vfiouser.IRQAutomasked; err != nil || info.Count != 1 || info.Flags != want {
		t.Errorf("INTx: %+v, %v", info, err)
	}
	e, unmask := newEventFD(t), newEventFD(t)
	r.irqs(vfiouser.IRQINTx, setEventFD, 0, 1, e.fd)
	r.irqs(vfiouser.IRQINTx, vfiouser.IRQSetDataEventFD|vfiouser.IRQSetUnmask, 0, 1, unmask.fd)
	quiet := func(what string) {
		t.Helper()
		r.config(0, 4) // whatever is on its way comes before this
		if n := e.taken(); n != 0 {
			t.Fatalf("%s: %d interrupts", what, n)
		}
	}

	r.identify(0)
	e.wait("an admin completion")
	if r.config(pciStatus, 2)&statusLevel == 0 {
		t.Error("asserted, and the status register does not say so")
	}
	r.identify(1)
	r.wait(rawACQ, 1)
	quiet("automasked")
	r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetUnmask, 0, 1)
	e.wait("unmasked, with completions there")
	r.reg32(nvme.DoorbellBase+4, 2)
	if r.config(pciStatus, 2)&statusLevel != 0 {
		t.Error("all given back, and the status register says asserted")
	}
	unmask.write()
	quiet("unmasked with nothing there")
	r.identify(2)
	e.wait("after unmasking by eventfd")
	unmask.write()
	e.wait("unmasked by eventfd, with a completion there")
	r.reg32(nvme.DoorbellBase+4, 3)
	unmask.write()

	// Masked here and there: INTMS, the command register, the client.
	slot := 3
	for name, m := range map[string]struct{ off, on func() }{
		"INTMS":        {func() { r.reg32(nvme.RegINTMS, 1) }, func() { r.reg32(nvme.RegINTMC, 1) }},
		"INTx disable": {func() { r.setConfig(pciCommand, pciMaster|1<<10) }, func() { r.setConfig(pciCommand, pciMaster) }},
		"MSI-X":        {func() { r.setConfig(pciMSIX, 1<<15) }, func() { r.setConfig(pciMSIX, 0) }},
		"client":       {func() { r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetMask, 0, 1) }, func() { r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetUnmask, 0, 1) }},
	} {
		m.off()
		r.identify(slot)
		r.wait(rawACQ, slot)
		quiet(name)
		m.on()
		e.wait(name + " no more")
		slot++
		r.reg32(nvme.DoorbellBase+4, uint32(slot))
		r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetUnmask, 0, 1)
		quiet(name)
	}

	// An I/O queue, on the same pin.
	z, _ := nvme.ToZeroBased16(16)
	var cq, sq nvme.Command
	cq.SetCreateCQ(1, z, rawBase+rawCQ, 0, true)
	sq.SetCreateSQ(1, z, rawBase+rawSQ, 1, 0)
	r.put(rawASQ, slot, cq)
	r.put(rawASQ, slot+1, sq)
	r.reg32(nvme.DoorbellBase, uint32(slot+2))
	e.wait("two admin completions")
	r.wait(rawACQ, slot+1)
	r.reg32(nvme.DoorbellBase+4, uint32(slot+2))
	r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetUnmask, 0, 1)
	e.taken() // the second may have been later than the first interrupt
	for i := range 10 {
		r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetUnmask, 0, 1)
		r.put(rawSQ, i, read4K(rawBase+rawData))
		r.reg32(0x1008, uint32(i+1))
		e.wait("an I/O completion")
		r.reg32(0x100c, uint32(i+1))
	}

	// A test of the wiring, and the end: without eventfd nothing is raised, and nothing breaks.
	r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetUnmask, 0, 1)
	r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetTrigger, 0, 1)
	e.wait("loopback")
	r.irqs(vfiouser.IRQINTx, setNone|vfiouser.IRQSetTrigger, 0, 0)
	unmask.write()
	r.put(rawSQ, 10, read4K(rawBase+rawData))
	r.reg32(0x1008, 11)
	r.wait(rawCQ, 10)
	quiet("disabled")
	if err := r.c.IRQAction(context.Background(), vfiouser.SetIRQs{Index: vfiouser.IRQINTx, Flags: vfiouser.IRQSetDataEventFD | vfiouser.IRQSetMask, Count: 1}, []int{e.fd}); err == nil {
		t.Error("masking by eventfd was accepted")
	}
}

// QEMU wants an interrupt for errors, and warns at each start of a device that has none.
func TestErrorInterruptIsTaken(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	if i, err := r.c.IRQInfo(context.Background(), vfiouser.IRQErr); err != nil || i.Count != 1 {
		t.Errorf("%+v, %v", i, err)
	}
	e := newEventFD(t)
	r.irqs(vfiouser.IRQErr, setEventFD, 0, 1, e.fd)
	r.irqs(vfiouser.IRQErr, setNone|vfiouser.IRQSetTrigger, 0, 0)
}

// MSI-X as QEMU does it, by eventfds alone, and as a client does that lets us keep the table.
func TestMSIXMasks(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	e := newEventFD(t)
	r.irqs(vfiouser.IRQMSIX, setEventFD, 0, 1, e.fd)
	pba := func() byte {
		t.Helper()
		var p [8]byte
		if err := r.c.RegionRead(context.Background(), pci.BARPBA, 0, p[:]); err != nil {
			t.Fatal(err)
		}
		return p[0]
	}
	table := func(on byte) {
		t.Helper()
		if err := r.c.RegionWrite(context.Background(), pci.BARTable, 12, []byte{on, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
	}
	r.identify(0)
	e.wait("without any masks")
	slot := 1
	for name, m := range map[string]struct{ off, on func() }{
		"function mask": {func() { r.setConfig(pciMSIX, 3<<14) }, func() { r.setConfig(pciMSIX, 1<<15) }},
		"table":         {func() { table(1) }, func() { table(0) }},
		"client":        {func() { r.irqs(vfiouser.IRQMSIX, setNone|vfiouser.IRQSetMask, 0, 1) }, func() { r.irqs(vfiouser.IRQMSIX, setNone|vfiouser.IRQSetUnmask, 0, 1) }},
		"no eventfds":   {func() { r.irqs(vfiouser.IRQMSIX, setNone|vfiouser.IRQSetTrigger, 0, 0) }, func() { r.irqs(vfiouser.IRQMSIX, setEventFD, 0, 1, e.fd) }},
	} {
		m.off()
		r.identify(slot)
		r.wait(rawACQ, slot)
		r.config(0, 4)
		if n := e.taken(); n != 0 || pba() != 1 {
			t.Errorf("%s: %d interrupts, pending bits %#x", name, n, pba())
		}
		m.on()
		e.wait(name + " no more")
		if pba() != 0 {
			t.Errorf("%s: still pending", name)
		}
		slot++
	}
	// A reset forgets what was pending, and the masks.
	r.setConfig(pciMSIX, 3<<14)
	table(1)
	r.identify(slot)
	r.wait(rawACQ, slot)
	r.setConfig(pciDevCtl, 1<<15)
	if e.taken() != 0 || pba() != 0 {
		t.Error("an interrupt survives an FLR")
	}
	r.enableAgain()
	r.identify(0)
	e.wait("after an FLR")
	if err := r.c.IRQAction(context.Background(), vfiouser.SetIRQs{Index: vfiouser.IRQMSIX, Flags: vfiouser.IRQSetDataEventFD | vfiouser.IRQSetMask, Count: 1}, []int{e.fd}); err == nil {
		t.Error("masking by eventfd was accepted")
	}
}

// enableAgain enables the controller after a reset, with cleared rings.
func (r *raw) enableAgain() {
	r.t.Helper()
	if cc, csts := r.read32(nvme.RegCC), r.read32(nvme.RegCSTS); cc != 0 || csts != 0 {
		r.t.Fatalf("CC %#x, CSTS %#x after a reset", cc, csts)
	}
	if aqa, asq := r.read32(nvme.RegAQA), r.read32(nvme.RegASQ); aqa != 0 || asq != 0 {
		r.t.Fatalf("AQA %#x, ASQ %#x after a reset", aqa, asq)
	}
	if err := r.mem.Zero(0, rawSize); err != nil {
		r.t.Fatal(err)
	}
	r.reg32(nvme.RegAQA, 15<<16|15)
	r.reg64(nvme.RegASQ, rawBase+rawASQ)
	r.reg64(nvme.RegACQ, rawBase+rawACQ)
	r.reg32(nvme.RegCC, 0x460001)
}

// In D3hot only the configuration space answers; back in D0 all is as it was (No_Soft_Reset). Without bus mastering
// no memory is touched.
func TestPowerAndBusMaster(t *testing.T) {
	_, evil := witness(t)
	for name, m := range map[string]struct {
		off, on func(r *raw)
		asleep  bool
	}{
		"D3hot":      {func(r *raw) { r.setConfig(pciPower, 3) }, func(r *raw) { r.setConfig(pciPower, 0) }, true},
		"bus master": {func(r *raw) { r.setConfig(pciCommand, 2) }, func(r *raw) { r.setConfig(pciCommand, pciMaster) }, false},
		"both": {
			func(r *raw) { r.setConfig(pciCommand, 2); r.setConfig(pciPower, 3) },
			func(r *raw) { r.setConfig(pciPower, 0); r.setConfig(pciCommand, pciMaster) }, true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := attach(t, evil)
			defer r.c.Close()
			r.setConfig(pciCommand, pciMaster)
			r.queues()
			for i := range 5 {
				r.put(rawSQ, i, read4K(rawBase+rawData))
				if !m.asleep {
					m.off(r)
					r.reg32(0x1008, uint32(i+1))
				} else {
					r.reg32(0x1008, uint32(i+1))
					r.wait(rawCQ, i)
					m.off(r)
					r.reg32(0x1008, 77) // nobody hears it
					r.reg32(nvme.RegCC, 0)
					if csts := r.read32(nvme.RegCSTS); csts != ^uint32(0) {
						t.Errorf("CSTS %#x in D3hot", csts)
					}
				}
				r.config(0, 4)
				time.Sleep(2 * time.Millisecond)
				w, _ := r.mem.Word64(rawCQ + uint64(i)*16 + 8)
				if done := w.Load()>>48&1 != 0; done != m.asleep {
					t.Fatalf("completion %d: %v", i, done)
				}
				m.on(r)
				r.wait(rawCQ, i)
				if csts := r.read32(nvme.RegCSTS); csts != 1 {
					t.Errorf("CSTS %#x afterwards", csts)
				}
			}
			// The admin queue too.
			if !m.asleep {
				m.off(r)
				r.identify(2)
				r.config(0, 4)
				time.Sleep(2 * time.Millisecond)
				if w, _ := r.mem.Word64(rawACQ + 2*16 + 8); w.Load()>>48&1 != 0 {
					t.Error("an admin command was done")
				}
				m.on(r)
				r.wait(rawACQ, 2)
			}
			// A reset leads out of both.
			m.off(r)
			if err := r.c.Reset(context.Background()); err != nil {
				t.Fatal(err)
			}
			r.enableAgain()
			r.queues()
			r.put(rawSQ, 0, read4K(rawBase+rawData))
			r.reg32(0x1008, 1)
			r.wait(rawCQ, 0)
		})
	}
}

// Anything a client can do to the function, in any order, while commands are rung: nothing hangs or fails for good, no descriptor is left
// behind, and after a reset the controller works.
func TestWildFunction(t *testing.T) {
	_, evil := witness(t)
	r := attach(t, evil)
	ctx := context.Background()
	e := newEventFD(t)
	before := fdCount(t)
	rng := rand.New(rand.NewPCG(1, 2))
	mapped := true
	for round := range 30 {
		for step := range 60 {
			switch rng.IntN(12) {
			case 0:
				r.setConfig(pciCommand, uint16(rng.Uint32()))
			case 1:
				r.setConfig(pciPower, uint16(rng.IntN(4)))
			case 2:
				r.setConfig(pciMSIX, uint16(rng.Uint32()))
			case 3:
				r.config(uint64(rng.IntN(64))*4, 4)
			case 4, 5:
				s := vfiouser.SetIRQs{Index: uint32(rng.IntN(5)), Flags: 1<<rng.IntN(3) | 8<<rng.IntN(3), Start: uint32(rng.IntN(3)), Count: uint32(rng.IntN(3))}
				var fds []int
				if s.Flags&vfiouser.IRQSetDataEventFD != 0 && rng.IntN(3) > 0 {
					for range s.Count {
						fds = append(fds, e.fd)
					}
				}
				s.Bools = make([]byte, s.Count)
				_ = r.c.IRQAction(ctx, s, fds)
			case 6:
				if mapped {
					if err := r.c.DMAUnmap(ctx, rawBase, rawSize); err != nil {
						t.Fatal(err)
					}
				} else if err := r.c.DMAMap(ctx, rawBase, rawSize, 0, r.fd, vfiouser.DMARead|vfiouser.DMAWrite); err != nil {
					t.Fatal(err)
				}
				mapped = !mapped
			case 7:
				e.write()
			case 8:
				_ = r.c.RegionWrite(ctx, vfiouser.RegionBAR0, uint64(nvme.RegINTMS+4*rng.IntN(2)), binary.LittleEndian.AppendUint32(nil, rng.Uint32()))
			case 9:
				var p [8]byte
				_ = r.c.RegionRead(ctx, pci.BARPBA, 0, p[:])
				_ = r.c.RegionWrite(ctx, pci.BARTable, uint64(rng.IntN(4)*16+12), []byte{byte(rng.IntN(2)), 0, 0, 0})
			case 10:
				r.put(rawASQ, step%16, nvme.Command{Opcode: nvme.AdminAsyncEventRequest})
				r.put(rawSQ, step%16, read4K(rawBase+rawData))
				r.reg32(0x1000+uint64(rng.IntN(4))*4, uint32(rng.IntN(16)))
			case 11:
				if rng.IntN(8) == 0 {
					r.setConfig(pciDevCtl, 1<<15)
				}
			}
		}
		if !mapped {
			if err := r.c.DMAMap(ctx, rawBase, rawSize, 0, r.fd, vfiouser.DMARead|vfiouser.DMAWrite); err != nil {
				t.Fatal(err)
			}
			mapped = true
		}
		if err := r.c.Reset(ctx); err != nil {
			t.Fatal(err)
		}
		r.setConfig(pciCommand, pciMaster)
		for i := range uint32(5) {
			_ = r.c.DisableIRQs(ctx, i)
		}
		r.enableAgain()
		r.queues()
		r.put(rawSQ, 0, read4K(rawBase+rawData))
		r.reg32(0x1008, 1)
		if st := r.wait(rawCQ, 0); st != nvme.StatusSuccess {
			t.Fatalf("round %d: a read after a reset: %v", round, st)
		}
	}
	eventually(t, "the eventfds to be closed", func() bool { return fdCount(t) <= before+1 })
}
