package vfiopci

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func opened(t *testing.T, k *fakeKernel, cdev bool) *Device {
	t.Helper()
	d, err := open(k, k.machine("vfio-pci", cdev), bdf, Options{})
	check(t, err)
	t.Cleanup(func() {
		if err := errors.Join(d.Close(), d.Close(), d.Unmap()); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestBothWaysToAFunction(t *testing.T) {
	for cdev, way := range map[bool]string{false: "VFIO group", true: "VFIO device and iommufd"} {
		t.Run(way, func(t *testing.T) {
			k := newFake(t)
			k.ranges = []span{{0x1000, 0xfee00000}, {0xfef00000, 1 << 39}}
			d := opened(t, k, cdev)
			if d.Way() != way || !d.Isolated() || d.Notice() != "" || d.MaxInterrupts() != 33 {
				t.Errorf("%s, isolated %v, notice %q, %d vectors", d.Way(), d.Isolated(), d.Notice(), d.MaxInterrupts())
			}
			if c := k.config[pci.RegCommand:]; c[0] != 7 || c[1] != 4 {
				t.Errorf("command register % x, want memory, bus master and no INTx beside what was there", c[:2])
			}
			check(t, d.Write32(nvme.RegCC, 0x460001))
			if v, err := d.Read32(nvme.RegCC); v != 0x460001 || err != nil {
				t.Errorf("CC=%#x, %v", v, err)
			}

			mem, err := d.AllocDMA(64 << 10)
			check(t, err)
			if k.maps[mem.IOVA] != 64<<10 || mem.Contiguous != 0 {
				t.Errorf("memory at %#x; the function has %#x", mem.IOVA, k.maps)
			}
			check(t, mem.Free())
			if len(k.maps) != 0 {
				t.Errorf("freed, and the function still has %#x", k.maps)
			}

			fds, err := d.Interrupts(5)
			check(t, err)
			for i, fd := range fds {
				if got := k.eventFDs[irqMSIX]; len(got) != 5 || got[i] != int32(fd) {
					t.Errorf("vectors %v, the kernel has %v", fds, got)
				}
				check(t, unix.Close(fd))
			}
			if _, err := d.Interrupts(34); err == nil {
				t.Error("34 of 33 vectors")
			}

			// Memory that is freed after Close was taken away by the kernel.
			late, err := d.AllocDMA(4096)
			check(t, err)
			check(t, d.Close())
			if got := k.config[pci.RegCommand]; got != 3 {
				t.Errorf("command register %#x after Close, want bus mastering off", got)
			}
			check(t, late.Free())
			if _, err := d.AllocDMA(4096); !errors.Is(err, device.ErrGone) {
				t.Errorf("memory from what is closed: %v", err)
			}
		})
	}
}

func TestWhatIsNotMappableIsReadAndWritten(t *testing.T) {
	k := newFake(t)
	k.sparse = []span{{0x1000, 0x2000}}
	d := opened(t, k, false)
	if len(d.Areas) != 1 || d.Areas[0].Off != 0x1000 || d.Areas[0].Mem.Len() != 0x1000 {
		t.Fatalf("mapped: %+v", d.Areas)
	}
	check(t, errors.Join(d.Write64(nvme.RegASQ, 0x1_2345_6000), d.Doorbell(nvme.DoorbellBase).Ring(7), d.Doorbell(0x2000).Ring(9)))
	for off, want := range map[uint64]uint32{nvme.RegASQ: 0x2345_6000, nvme.RegASQ + 4: 1, nvme.DoorbellBase: 7, 0x2000: 9} {
		if w, err := k.bar.Word32(off); err != nil || w.Load() != want {
			t.Errorf("%#x is %#x, want %#x", off, w.Load(), want)
		}
	}
	check(t, d.Close())
	if err := d.Doorbell(0x2000).Ring(1); !errors.Is(err, device.ErrGone) {
		t.Errorf("a doorbell through a closed descriptor: %v", err)
	}

	none := newFake(t)
	none.noMmap = true
	if d := opened(t, none, false); !strings.Contains(d.Notice(), "not mapped") || len(d.Areas) != 0 {
		t.Errorf("notice %q", d.Notice())
	}
}

func TestResetSetsTheCommandRegisterAgain(t *testing.T) {
	k := newFake(t)
	k.again = 3
	k.onReset = func() { k.config[pci.RegCommand] = 0 }
	d := opened(t, k, false)
	check(t, d.Reset())
	if k.resets != 1 || k.config[pci.RegCommand] != pci.CommandMemory|pci.CommandBusMaster {
		t.Errorf("%d resets, command register %#x", k.resets, k.config[pci.RegCommand])
	}
	k.onReset = func() { k.config[pci.RegCommand], k.config[pci.RegCommand+1] = 0xff, 0xff }
	if err := d.Reset(); !errors.Is(err, device.ErrGone) {
		t.Errorf("reset of what is gone: %v", err)
	}
	k.config[pci.RegCommand], k.config[pci.RegCommand+1] = 0, 0
	k.ioErr[vfioDeviceReset] = unix.EAGAIN
	if err := d.Reset(); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("reset that never comes: %v", err)
	}

	without := newFake(t)
	without.flags = isPCI
	if err := opened(t, without, false).Reset(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("reset of a function without: %v", err)
	}
}

// TestGoneOrReset: registers that read as all ones are of a function that has gone if its configuration space reads so too, or stays there without them.
func TestGoneOrReset(t *testing.T) {
	for name, c := range map[string]struct {
		command byte
		back    bool
	}{"reset": {3, true}, "without registers": {3, false}, "pulled out": {0xff, false}} {
		t.Run(name, func(t *testing.T) {
			k := newFake(t)
			d := opened(t, k, false)
			check(t, errors.Join(d.Write32(nvme.RegCSTS, ^uint32(0)), d.Write32(nvme.RegVS, ^uint32(0))))
			k.onRead = func() {
				k.config[pci.RegCommand], k.config[pci.RegCommand+1] = c.command, c.command
				if c.back {
					check(t, errors.Join(d.Write32(nvme.RegCSTS, 1), d.Write32(nvme.RegVS, 0x10400)))
				}
			}
			v, err := d.Read32(nvme.RegCSTS)
			k.onRead = nil
			if c.back && (err != nil || v != 1 || d.Err() != nil) {
				t.Errorf("CSTS=%#x, %v", v, err)
			}
			if !c.back && (!errors.Is(err, device.ErrGone) || d.Err() == nil) {
				t.Errorf("CSTS=%#x, %v", v, err)
			}
		})
	}
}

func TestTheKernelWantsItBack(t *testing.T) {
	for index, why := range endings {
		k := newFake(t)
		d := opened(t, k, false)
		if d.Err() != nil {
			t.Fatal(d.Err())
		}
		k.event(index)
		select {
		case <-d.Done():
		case <-time.After(time.Minute):
			t.Fatalf("event %d is not seen", index)
		}
		if err := d.Err(); !errors.Is(err, device.ErrGone) || !strings.Contains(err.Error(), why) {
			t.Errorf("event %d: %v", index, err)
		}
	}
}

func TestEventsThatTheOwnerHandles(t *testing.T) {
	k := newFake(t)
	faulted, wanted := make(chan struct{}, 1), make(chan struct{}, 1)
	d, err := open(k, k.machine("vfio-pci", false), bdf, Options{
		Faulted: func() { faulted <- struct{}{} }, Wanted: func() { wanted <- struct{}{} },
	})
	check(t, err)
	for range 2 {
		for index, told := range map[uint32]chan struct{}{irqError: faulted, irqReq: wanted} {
			k.event(index)
			select {
			case <-told:
			case <-time.After(time.Minute):
				t.Fatalf("event %d is not told", index)
			}
		}
	}
	check(t, d.Err())
	check(t, errors.Join(d.Close(), d.Unmap()))
}

func TestSeveredFunctionReachesNothing(t *testing.T) {
	for _, cdev := range []bool{false, true} {
		k := newFake(t)
		d := opened(t, k, cdev)
		mem, err := d.AllocDMA(64 << 10)
		check(t, err)
		for range 2 {
			_, err := d.MapDMA(make([]byte, 64<<10))
			check(t, err)
		}
		d.Sever()
		if len(k.maps) != 0 || k.config[pci.RegCommand]&pci.CommandBusMaster != 0 {
			t.Errorf("the function still has %#x, command register %#x", k.maps, k.config[pci.RegCommand])
		}
		check(t, mem.Free())
		if err := d.Reset(); !errors.Is(err, device.ErrGone) {
			t.Errorf("reset of what was severed: %v", err)
		}
		check(t, d.Close())
	}
}

func TestMemoryOfOthers(t *testing.T) {
	for _, cdev := range []bool{false, true} {
		k := newFake(t)
		d := opened(t, k, cdev)
		mem := make([]byte, 64<<10)
		iova, err := d.MapDMA(mem)
		check(t, err)
		if k.maps[iova] != uint64(len(mem)) {
			t.Errorf("at %#x; the function has %#x", iova, k.maps)
		}
		check(t, d.UnmapDMA(iova, uint64(len(mem))))
		if len(k.maps) != 0 {
			t.Errorf("taken back, and the function still has %#x", k.maps)
		}
		k.readOnly = true
		if iova, err = d.MapDMA(mem); err != nil || k.maps[iova] != uint64(len(mem)) {
			t.Errorf("memory that may only be read: %v", err)
		}
		check(t, d.Close())
		check(t, d.UnmapDMA(iova, uint64(len(mem))))
		if _, err := d.MapDMA(mem); !errors.Is(err, device.ErrGone) {
			t.Errorf("mapped for what is closed: %v", err)
		}
	}
	k := newFake(t)
	d := opened(t, k, false)
	k.ioErr[vfioIOMMUMapDMA] = unix.ENOMEM
	var was unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &was))
	check(t, unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: was.Max}))
	defer unix.Setrlimit(unix.RLIMIT_MEMLOCK, &was)
	if _, err := d.MapDMA(make([]byte, 1<<20)); !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "LimitMEMLOCK") {
		t.Errorf("no memory to pin: %v", err)
	}
}

func TestInterruptsThatThereAreNot(t *testing.T) {
	k := newFake(t)
	k.vectors = 4
	d := opened(t, k, false)
	if _, err := d.Interrupts(5); err == nil || !strings.Contains(err.Error(), "no more than 4") {
		t.Errorf("5 of 4: %v", err)
	}

	delete(k.irqs, irqMSIX)
	msi := opened(t, k, false)
	fds, err := msi.Interrupts(msi.MaxInterrupts())
	check(t, err)
	if len(fds) != 1 || len(k.eventFDs[irqMSI]) != 1 {
		t.Errorf("MSI: %v, %v", fds, k.eventFDs)
	}
	check(t, unix.Close(fds[0]))

	delete(k.irqs, irqMSI)
	if n := opened(t, k, false).MaxInterrupts(); n != 0 {
		t.Errorf("%d interrupts from nowhere", n)
	}
}

func TestWhatCannotBeOpenedSaysWhy(t *testing.T) {
	for name, tc := range map[string]struct {
		driver string // "": vfio-pci
		cdev   bool
		o      Options
		edit   func(k *fakeKernel, p paths)
		is     error
		says   string
	}{
		"nvme has it": {driver: "nvme", is: unix.EBUSY, says: "guestdrv bind " + bdf},
		"nobody":      {driver: "none", is: unix.ENODEV, says: "guestdrv bind " + bdf},
		"no IOMMU": {edit: func(_ *fakeKernel, p paths) { _ = os.Remove(filepath.Join(p.function(bdf), "iommu_group")) },
			is: errors.ErrUnsupported, says: "sysfs:" + bdf},
		"no IOMMU behind it": {edit: func(_ *fakeKernel, p paths) {
			_ = os.WriteFile(filepath.Join(p.function(bdf), "iommu_group/name"), []byte("vfio-noiommu\n"), 0o600)
		}, is: errors.ErrUnsupported, says: "vfio:" + bdf + ",noiommu"},
		"noiommu with one": {o: Options{NoIOMMU: true}, is: errors.ErrUnsupported, says: "there is an IOMMU"},
		"group in use":     {edit: func(k *fakeKernel, _ paths) { k.errs["vfio/7"] = unix.EBUSY }, is: unix.EBUSY, says: "another process"},
		"group is root's":  {edit: func(k *fakeKernel, _ paths) { k.errs["vfio/7"] = unix.EACCES }, is: unix.EACCES, says: "chown"},
		"no VFIO":          {edit: func(k *fakeKernel, _ paths) { k.errs["vfio/vfio"] = unix.ENOENT }, is: unix.ENOENT, says: "modprobe vfio-pci"},
		"not viable": {edit: func(k *fakeKernel, p paths) {
			k.viable = false
			other := p.function("0000:00:05.0")
			_ = os.MkdirAll(other, 0o755)
			_ = os.Mkdir(filepath.Join(p.sys, "kernel/iommu_groups/7/devices/0000:00:05.0"), 0o755)
			_ = os.Symlink("/sys/bus/pci/drivers/e1000", filepath.Join(other, "driver"))
		}, is: unix.EBUSY, says: "0000:00:05.0 (e1000)"},
		"bound elsewhere": {cdev: true, edit: func(k *fakeKernel, _ paths) {
			k.ioErr[vfioDeviceBindIOMMUFD] = unix.EINVAL
			k.errs["vfio/7"] = unix.EBUSY
		}, is: unix.EBUSY, says: "binding it to iommufd"},
		"no device":       {edit: func(k *fakeKernel, _ paths) { k.ioErr[vfioGroupGetDeviceFD] = unix.ENODEV }, is: unix.ENODEV, says: "the function"},
		"small BAR0":      {edit: func(k *fakeKernel, _ paths) { k.bar, _ = k.bar.View(0, 0x1000) }, says: "BAR0 of 0x1000 bytes"},
		"mapping outside": {edit: func(k *fakeKernel, _ paths) { k.sparse = []span{{0, 0x5000}} }, says: "can be mapped from 0x0 to 0x5000"},
		"not PCI":         {edit: func(k *fakeKernel, _ paths) { k.flags = 4 }, says: "no PCI function"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFake(t)
			driver := "vfio-pci"
			switch tc.driver {
			case "":
			case "none":
				driver = ""
			default:
				driver = tc.driver
			}
			p := k.machine(driver, tc.cdev)
			if tc.edit != nil {
				tc.edit(k, p)
			}
			_, err := open(k, p, bdf, tc.o)
			if err == nil || !strings.Contains(err.Error(), tc.says) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("got %v, want %q", err, tc.says)
			}
		})
	}
}

func TestIOMMUFDFallsBackToTheGroup(t *testing.T) {
	k := newFake(t)
	k.errs["iommu"] = unix.EACCES
	if d := opened(t, k, true); d.Way() != "VFIO group" {
		t.Errorf("opened by %s", d.Way())
	}
}

func TestNoMemoryToPinNamesTheLimit(t *testing.T) {
	k := newFake(t)
	d := opened(t, k, false)
	k.ioErr[vfioIOMMUMapDMA] = unix.ENOMEM
	var was unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &was))
	check(t, unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: was.Max}))
	defer unix.Setrlimit(unix.RLIMIT_MEMLOCK, &was)
	if _, err := d.AllocDMA(1 << 20); !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "ulimit -l") {
		t.Errorf("got %v", err)
	}
	if c := d.space.(*container); len(c.taken) != 0 {
		t.Errorf("addresses that nothing is at: %#x", c.taken)
	}
}

func TestCapabilitiesAreReadWithinBounds(t *testing.T) {
	b := make([]byte, 64)
	native.PutUint16(b[16:], 9)
	native.PutUint32(b[20:], 16) // a ring
	if c := capability(b, 16, capSparse); c != nil {
		t.Errorf("found % x in a ring", c)
	}
	for _, first := range []uint32{0, 57, 64, 1 << 31} {
		if c := capability(b, first, 9); c != nil {
			t.Errorf("found a capability at %d", first)
		}
	}
	if c := capability(b, 16, 9); len(c) != 64-24 {
		t.Errorf("%d bytes", len(c))
	}
	for _, c := range [][]byte{nil, {1, 0, 0, 0, 0, 0, 0, 0}, {255, 255, 255, 255, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8}} {
		if got, err := spans(c, func(a, b uint64) span { return span{a, b} }); err == nil {
			t.Errorf("% x: %v", c, got)
		}
	}
}

// TestIOVAsAreFreeAndAllowed takes and gives back at random in odd ranges, against a list.
func TestIOVAsAreFreeAndAllowed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &container{}
		at := uint64(0)
		for range rapid.IntRange(1, 4).Draw(t, "ranges") {
			at += uint64(rapid.IntRange(0, 6<<20).Draw(t, "gap"))
			end := at + uint64(rapid.IntRange(1, 40<<20).Draw(t, "length"))
			c.ranges = append(c.ranges, span{at, end})
			at = end
		}
		if rapid.Bool().Draw(t, "all") {
			c.ranges = append(c.ranges, span{1 << 62, 0})
		}
		var live []span
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			if len(live) > 0 && rapid.IntRange(0, 2).Draw(t, "leave") == 0 {
				i := rapid.IntRange(0, len(live)-1).Draw(t, "which")
				c.leave(live[i].begin)
				live = append(live[:i], live[i+1:]...)
				continue
			}
			size := uint64(rapid.IntRange(1, 2000).Draw(t, "pages")) * 4096
			iova, err := c.place(size)
			if err != nil {
				if len(live) == 0 && c.ranges[len(c.ranges)-1].end == 0 {
					t.Fatalf("no room for %d bytes: %v", size, err)
				}
				continue
			}
			s := span{iova, iova + size}
			allowed := false
			for _, r := range c.ranges {
				allowed = allowed || s.begin >= r.begin && s.end-1 <= r.end-1
			}
			for _, l := range live {
				allowed = allowed && (s.end <= l.begin || s.begin >= l.end)
			}
			if !allowed || iova == 0 || iova%(2<<20) != 0 {
				t.Fatalf("%#x in %#x, with %#x taken", s, c.ranges, live)
			}
			live = append(live, s)
		}
	})
	if _, err := (&container{ranges: []span{{0, 1 << 21}}}).place(4096); !errors.Is(err, unix.ENOSPC) {
		t.Error(fmt.Sprint("no room: ", err))
	}
}
