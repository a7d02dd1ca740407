package guestdrv_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// pagesSeen records what the doorbell pages hold when the controller is told of them, and where they are.
type pagesSeen struct {
	mu   sync.Mutex
	dev  *nvmetest.Device
	n    int
	iova [2]uint64
	zero bool
}

func (p *pagesSeen) command(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
	if qid == 0 && (cmd.Opcode == nvme.AdminDoorbellBufferConfig || cmd.Opcode == nvme.AdminDoorbellMemory2014) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.n++
		p.iova = [2]uint64{cmd.PRP1, cmd.PRP2}
		var page [2][4096]byte
		p.zero = p.dev.ReadIOVA(cmd.PRP1, page[0][:]) && p.dev.ReadIOVA(cmd.PRP2, page[1][:]) &&
			bytes.Count(page[0][:], []byte{0}) == 4096 && bytes.Count(page[1][:], []byte{0}) == 4096
	}
	return nvmetest.Verdict{}
}

// TestRule16_AdminQueueNeverShadowed looks at queue 0's slots while admin commands run: they stay 0, and each command rings.
func TestRule16_AdminQueueNeverShadowed(t *testing.T) {
	seen := &pagesSeen{}
	dev := nvmetest.New(nvmetest.Config{Hooks: nvmetest.Hooks{Command: seen.command}})
	defer dev.Close()
	seen.dev = dev
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), testOptions())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Doorbells() != "shadow" {
		t.Fatal(c.Doorbells())
	}
	before := dev.Rings.Load()
	for range 100 { // laps the admin queue
		if _, err := c.Admin(ctx, &nvme.Command{Opcode: nvme.AdminGetFeatures, CDW10: uint32(nvme.FeatureQueues)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := dev.Rings.Load() - before; n < 100 {
		t.Errorf("%d doorbell messages for 100 admin commands", n)
	}
	for i, iova := range seen.iova {
		var slots [8]byte
		if !dev.ReadIOVA(iova, slots[:]) || slots != [8]byte{} {
			t.Errorf("page %d: slots of queue 0 hold % x", i, slots)
		}
	}
}

// TestRule22_SlotsAndRingsZeroed leaves garbage in a queue's slots and in the pool's memory; the next queue of that id must
// begin at 0 all the same.
func TestRule22_SlotsAndRingsZeroed(t *testing.T) {
	seen := &pagesSeen{}
	var slots [2][16]byte
	var rings []byte
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid == 0 && cmd.Opcode == nvme.AdminCreateCQ && cmd.QID() == 3 {
			rings = make([]byte, cmd.QSize().Count()*16)
			seen.dev.ReadIOVA(cmd.PRP1, rings)
			for i, iova := range seen.iova {
				seen.dev.ReadIOVA(iova+3*8, slots[i][:8])
			}
		}
		return seen.command(qid, cmd)
	}
	dev := nvmetest.New(cfg)
	defer dev.Close()
	seen.dev = dev
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), testOptions())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// Fill the free memory, so that the rings come from memory that is not zero.
	dirty, err := c.Alloc(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	for i := range dirty.Bytes() {
		dirty.Bytes()[i] = 0xFF
	}
	dirty.Free()
	for range 3 {
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Count(rings, []byte{0}) != len(rings) {
			t.Error("the CQ was not zeroed")
		}
		if slots != [2][16]byte{} {
			t.Errorf("slots at creation: % x", slots)
		}
		for range 7 {
			if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
				t.Fatal(err)
			}
			drain(t, p, ok(t))
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		dev.WriteIOVA(seen.iova[0]+p3(p), []byte{7, 0, 0, 0, 9, 0, 0, 0})
		dev.WriteIOVA(seen.iova[1]+p3(p), []byte{7, 0, 0, 0, 9, 0, 0, 0})
		// The ids are taken in turn: come back to this one.
		for range 3 {
			other, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
			if err != nil {
				t.Fatal(err)
			}
			other.Close()
		}
	}
}

func p3(p *guestdrv.QueuePair) uint64 { return uint64(p.QID()) * 8 }

// TestRule26_RefusedPagesAreNotUsed refuses the doorbell pages: I/O must work by MMIO, and the pages stay as they were.
func TestRule26_RefusedPagesAreNotUsed(t *testing.T) {
	for _, vendor := range []bool{false, true} {
		seen := &pagesSeen{}
		cfg := nvmetest.Config{}
		cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			seen.command(qid, cmd)
			if qid == 0 && (cmd.Opcode == nvme.AdminDoorbellBufferConfig || cmd.Opcode == nvme.AdminDoorbellMemory2014) {
				return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusInvalidField.WithDNR()}
			}
			return nvmetest.Verdict{}
		}
		dev := nvmetest.New(cfg)
		defer dev.Close()
		seen.dev = dev
		o := testOptions()
		o.Vendor2014 = vendor
		c, err := guestdrv.OpenDevice(ctx, dev.InProc(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if c.Doorbells() != "mmio" || seen.n != 1 {
			t.Fatalf("doorbells %q after %d commands", c.Doorbells(), seen.n)
		}
		ns, err := c.Namespace(1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ns.WriteAt(make([]byte, 1<<20), 0); err != nil {
			t.Fatal(err)
		}
		o.Doorbells = guestdrv.DoorbellsShadow
		err = openFails(t, cfg, o)
		if nvme.StatusOf(err).Code() != nvme.StatusInvalidField {
			t.Errorf("shadow demanded: %v", err)
		}
	}
	o := testOptions()
	o.Doorbells = guestdrv.DoorbellsShadow
	if err := openFails(t, nvmetest.Config{NoShadow: true}, o); !errors.Is(err, guestdrv.ErrUnsupported) {
		t.Errorf("shadow demanded and not offered: %v", err)
	}
}

// TestRule28_PagesSharedAtEachEnable opens one device twice: the configuration is sent each time, with pages that are zero.
func TestRule28_PagesSharedAtEachEnable(t *testing.T) {
	for _, vendor := range []bool{false, true} {
		seen := &pagesSeen{}
		dev := nvmetest.New(nvmetest.Config{Hooks: nvmetest.Hooks{Command: seen.command}})
		defer dev.Close()
		seen.dev = dev
		for i := 1; i <= 3; i++ {
			o := testOptions()
			o.Vendor2014 = vendor
			c, err := guestdrv.OpenDevice(ctx, dev.InProc(), o)
			if err != nil {
				t.Fatal(err)
			}
			if seen.n != i || !seen.zero || c.Doorbells() != "shadow" {
				t.Errorf("enable %d: configured %d times, pages zero: %v, doorbells %q", i, seen.n, seen.zero, c.Doorbells())
			}
			ns, err := c.Namespace(1)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ns.ReadAt(make([]byte, 4096), 0); err != nil {
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestRule29_QueuesBoundedByPage uses a stride at which a page holds the slots of few queues.
func TestRule29_QueuesBoundedByPage(t *testing.T) {
	// Stride 256: a page has the slots of queues 0 to 7.
	c := openInProc(t, nvmetest.Config{CAP: nvme.CAP(0).WithMQES(63).WithTO(2).WithCSS(1).WithDSTRD(6)}, testOptions())
	if c.Doorbells() != "shadow" {
		t.Fatal(c.Doorbells())
	}
	ns := namespace(t, c, 1)
	if _, err := ns.ReadAt(make([]byte, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	o := testOptions()
	o.MaxQueuePairs = 64
	c = openInProc(t, nvmetest.Config{CAP: nvme.CAP(0).WithMQES(63).WithTO(2).WithCSS(1).WithDSTRD(6)}, o)
	made := 0
	for {
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: true})
		if err != nil {
			break
		}
		defer p.Close()
		if p.QID() > 7 {
			t.Fatalf("queue %d, whose slots lie outside the page", p.QID())
		}
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
			t.Fatal(err)
		}
		drain(t, p, ok(t))
		made++
	}
	if made != 5 {
		t.Errorf("%d pairs beside 2 queues, want 5", made)
	}
	// Stride 2048: not even queue 1 has its slots in a page, but registers it has.
	c = openSocket(t, nvmetest.Config{CAP: nvme.CAP(0).WithMQES(63).WithTO(2).WithCSS(1).WithDSTRD(9)}, testOptions())
	if c.Doorbells() != "mmio" {
		t.Error(c.Doorbells())
	}
	if _, err := namespace(t, c, 1).ReadAt(make([]byte, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
}

// TestRule34_PeerClearsNonblock makes every interrupt eventfd blocking, as a peer that shares the descriptions can, and drains them
// behind the driver's back. The driver must neither hang nor miss completions.
func TestRule34_PeerClearsNonblock(t *testing.T) {
	cfg := nvmetest.Config{NoQuiet: true}
	dev := nvmetest.New(cfg)
	defer dev.Close()
	in := &spy{Device: dev.InProc()}
	c, err := guestdrv.OpenDevice(ctx, in, testOptions())
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range in.fds {
		if err := unix.SetNonblock(fd, false); err != nil {
			t.Fatal(err)
		}
	}
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if _, err := ns.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
			t.Fatal(err)
		}
		drain(t, p, ok(t))
		for _, fd := range in.fds {
			// Only what is readable: the thief must not block either.
			pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, _ := unix.Poll(pfd, 0); n > 0 {
				var b [8]byte
				_, _ = unix.Read(fd, b[:])
			}
		}
		time.Sleep(100 * time.Microsecond)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	done := make(chan error)
	go func() { done <- c.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("Close hangs")
	}
}
