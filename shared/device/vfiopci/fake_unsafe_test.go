package vfiopci

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const bdf = "0000:00:04.0"

// fakeKernel answers as Linux does, as far as linux/vfio.h and linux/iommufd.h say. Descriptors are numbers of its own.
type fakeKernel struct {
	t  *testing.T
	mu sync.Mutex

	next  int
	files map[int]string // open ones
	errs  map[string]error
	ioErr map[uintptr]error

	viable   bool
	flags    uint32 // of the device
	irqs     map[uint32]uint32
	vectors  int // 0: as many as there are
	sparse   []span
	noMmap   bool
	ranges   []span
	bar      *shm.Region
	config   []byte
	resets   int
	again    int // resets that are refused first
	onReset  func()
	onRead   func() // before the device is read by a system call
	readOnly bool   // this process may only read the memory that is to be mapped
	eventFDs map[uint32][]int32
	maps     map[uint64]uint64 // IOVA to size
	ioas     uint64            // what iommufd chooses next
	bound    bool
	attached bool
}

func newFake(t *testing.T) *fakeKernel {
	k := &fakeKernel{
		t: t, next: 100, files: map[int]string{}, errs: map[string]error{}, ioErr: map[uintptr]error{}, viable: true, flags: canReset | isPCI,
		irqs: map[uint32]uint32{irqMSIX: 33, irqMSI: 8, irqError: 1, irqReq: 1}, bar: shm.NewHeap(0x4000), config: make([]byte, 256),
		eventFDs: map[uint32][]int32{}, maps: map[uint64]uint64{}, ioas: 0x10000,
		ranges: []span{{0x1000, 1 << 39}},
	}
	k.config[pci.RegCommand] = 1
	t.Cleanup(func() {
		for fd, name := range k.files {
			t.Errorf("%s is left open as %d", name, fd)
		}
	})
	return k
}

// machine makes the files that VFIO and sysfs show of a function in group 7.
func (k *fakeKernel) machine(driver string, cdev bool) paths {
	k.t.Helper()
	dir := k.t.TempDir()
	p := paths{filepath.Join(dir, "sys"), filepath.Join(dir, "dev")}
	fn := p.function(bdf)
	group := filepath.Join(p.sys, "kernel/iommu_groups/7")
	must := func(err error) {
		if err != nil {
			k.t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(group, "devices", bdf), 0o755))
	must(os.MkdirAll(fn, 0o755))
	must(os.WriteFile(filepath.Join(fn, "class"), []byte("0x010802\n"), 0o600))
	must(os.Symlink(group, filepath.Join(fn, "iommu_group")))
	if driver != "" {
		must(os.Symlink("/sys/bus/pci/drivers/"+driver, filepath.Join(fn, "driver")))
	}
	if cdev {
		must(os.MkdirAll(filepath.Join(fn, "vfio-dev/vfio3"), 0o755))
	}
	return p
}

func (k *fakeKernel) open(path string) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, name, _ := strings.Cut(path, "/dev/")
	if err := k.errs[name]; err != nil {
		return -1, err
	}
	return k.add(name), nil
}

func (k *fakeKernel) add(name string) int {
	k.next++
	k.files[k.next] = name
	return k.next
}

func (k *fakeKernel) close(fd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.files[fd] == "" {
		return unix.EBADF
	}
	delete(k.files, fd)
	return nil
}

func (k *fakeKernel) ioctlValue(fd int, request, arg uintptr) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.ioErr[request]; err != nil {
		return 0, err
	}
	switch name := k.files[fd]; {
	case name == "vfio/vfio" && request == vfioGetAPIVersion:
		return apiVersion, nil
	case name == "vfio/vfio" && request == vfioCheckExtension:
		return int(1 &^ (arg - type1v2)), nil
	case name == "vfio/vfio" && request == vfioSetIOMMU && arg == type1v2 && k.attached:
		return 0, nil
	case name == "device" && request == vfioDeviceReset:
		if k.again > 0 {
			k.again--
			return 0, unix.EAGAIN
		}
		k.resets++
		if k.onReset != nil {
			k.onReset()
		}
		return 0, nil
	}
	return 0, unix.ENOTTY
}

func (k *fakeKernel) ioctl(fd int, request uintptr, arg []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.ioErr[request]; err != nil {
		return 0, err
	}
	switch name := k.files[fd]; {
	case name == "vfio/7" && request == vfioGroupGetDeviceFD && k.attached && string(arg) == bdf+"\x00":
		return k.add("device"), nil
	case name == "vfio/7" && request == vfioGroupSetContainer:
		if k.files[int(native.Uint32(arg))] != "vfio/vfio" {
			return 0, unix.EBADF
		}
		k.attached = true
		return 0, nil
	case len(arg) < 8 || native.Uint32(arg) != uint32(len(arg)):
		k.t.Errorf("request %#x with a structure of %d bytes that says %d", request, len(arg), native.Uint32(arg))
		return 0, unix.EINVAL
	case name == "vfio/7" && request == vfioGroupGetStatus:
		if k.viable {
			native.PutUint32(arg[4:], viable)
		}
		return 0, nil
	case name == "vfio/vfio":
		return k.container(request, arg)
	case name == "iommu":
		return k.iommu(request, arg)
	case name == "vfio/devices/vfio3" && request == vfioDeviceBindIOMMUFD && k.files[int(native.Uint32(arg[8:]))] == "iommu":
		k.bound = true
		return 0, nil
	case name == "vfio/devices/vfio3" && request == vfioDeviceAttachPT && k.bound && native.Uint32(arg[8:]) == 5:
		k.files[fd] = "device"
		return 0, nil
	case name == "device":
		return k.device(request, arg)
	}
	return 0, unix.ENOTTY
}

func (k *fakeKernel) container(request uintptr, arg []byte) (int, error) {
	switch request {
	case vfioIOMMUGetInfo:
		native.PutUint32(arg[4:], 1|iommuCaps)
		// Another capability first: it is skipped.
		caps := native.AppendUint32(native.AppendUint32(nil, 3|1<<16), 40)
		caps = append(caps, make([]byte, 8)...)
		caps = native.AppendUint32(native.AppendUint32(caps, capIOVARanges|1<<16), 0)
		caps = native.AppendUint32(native.AppendUint32(caps, uint32(len(k.ranges))), 0)
		for _, r := range k.ranges {
			caps = native.AppendUint64(native.AppendUint64(caps, r.begin), r.end-1)
		}
		return k.withCaps(arg, 16, 24, caps)
	case vfioIOMMUMapDMA:
		iova, size := native.Uint64(arg[16:]), native.Uint64(arg[24:])
		if err := k.pinnable(native.Uint32(arg[4:]), dmaRead, dmaWrite, native.Uint64(arg[8:])); err != nil {
			return 0, err
		}
		k.maps[iova] = size
		return 0, nil
	case vfioIOMMUUnmapDMA:
		return 0, k.unmap(native.Uint64(arg[8:]), native.Uint64(arg[16:]))
	}
	return 0, unix.ENOTTY
}

// pinnable says what the kernel does about memory at the address at that is asked for with flags.
func (k *fakeKernel) pinnable(flags, read, write uint32, at uint64) error {
	switch {
	case flags&read == 0 || flags&^(read|write) != 0 || at == 0:
		return unix.EINVAL
	case flags&write != 0 && k.readOnly:
		return unix.EFAULT
	}
	return nil
}

func (k *fakeKernel) unmap(iova, size uint64) error {
	if iova == 0 && size == ^uint64(0) { // as iommufd has it
		if len(k.maps) == 0 {
			return unix.ENOENT
		}
		clear(k.maps)
		return nil
	}
	if k.maps[iova] != size {
		return unix.ENOENT
	}
	delete(k.maps, iova)
	return nil
}

func (k *fakeKernel) iommu(request uintptr, arg []byte) (int, error) {
	switch request {
	case iommuIOASAlloc:
		native.PutUint32(arg[8:], 5)
		return 0, nil
	case iommuIOASMap:
		if err := k.pinnable(native.Uint32(arg[4:]), ioasRead, ioasWrite, native.Uint64(arg[16:])); err != nil || native.Uint32(arg[8:]) != 5 {
			return 0, errors.Join(err, unix.EINVAL)
		}
		size := native.Uint64(arg[24:])
		native.PutUint64(arg[32:], k.ioas)
		k.maps[k.ioas] = size
		k.ioas += size
		return 0, nil
	case iommuIOASUnmap:
		return 0, k.unmap(native.Uint64(arg[8:]), native.Uint64(arg[16:]))
	}
	return 0, unix.ENOTTY
}

// withCaps puts capabilities behind a structure, if there is room: at is where their offset goes, size the structure's.
func (k *fakeKernel) withCaps(arg []byte, at, size int, caps []byte) (int, error) {
	if len(arg) < size+len(caps) {
		native.PutUint32(arg, uint32(size+len(caps)))
		return 0, nil
	}
	native.PutUint32(arg[at:], uint32(size))
	copy(arg[size:], caps)
	return 0, nil
}

func (k *fakeKernel) device(request uintptr, arg []byte) (int, error) {
	switch request {
	case vfioDeviceGetInfo:
		native.PutUint32(arg[4:], k.flags)
		return 0, nil
	case vfioDeviceGetRegion:
		flags, size := uint32(regionRead|regionWrite), uint64(256)
		index := native.Uint32(arg[8:])
		if index == regionBAR0 {
			size = k.bar.Len()
			if !k.noMmap {
				flags |= regionMmap
			}
			if k.sparse != nil {
				flags |= regionCaps
			}
		}
		native.PutUint32(arg[4:], flags)
		native.PutUint64(arg[16:], size)
		native.PutUint64(arg[24:], uint64(index)<<40)
		if flags&regionCaps == 0 {
			return 0, nil
		}
		caps := native.AppendUint32(native.AppendUint32(nil, capSparse|1<<16), 0)
		caps = native.AppendUint32(native.AppendUint32(caps, uint32(len(k.sparse))), 0)
		for _, s := range k.sparse {
			caps = native.AppendUint64(native.AppendUint64(caps, s.begin), s.end-s.begin)
		}
		return k.withCaps(arg, 12, 32, caps)
	case vfioDeviceGetIRQ:
		native.PutUint32(arg[4:], irqEventFD)
		native.PutUint32(arg[12:], k.irqs[native.Uint32(arg[8:])])
		return 0, nil
	case vfioDeviceSetIRQs:
		index, n := native.Uint32(arg[8:]), int(native.Uint32(arg[16:]))
		if native.Uint32(arg[4:]) != setEventFD|setTrigger || len(arg) != 20+4*n {
			return 0, unix.EINVAL
		}
		if k.vectors > 0 && n > k.vectors {
			return k.vectors, nil
		}
		k.eventFDs[index] = nil
		for b := arg[20:]; len(b) > 0; b = b[4:] {
			k.eventFDs[index] = append(k.eventFDs[index], int32(native.Uint32(b)))
		}
		return 0, nil
	}
	return 0, unix.ENOTTY
}

// event raises an interrupt.
func (k *fakeKernel) event(index uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, err := unix.Write(int(k.eventFDs[index][0]), []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		k.t.Error(err)
	}
}

func (k *fakeKernel) pread(fd int, p []byte, off int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.onRead != nil {
		k.onRead()
	}
	return k.access(fd, off, func(mem []byte) { copy(p, mem) })
}

func (k *fakeKernel) pwrite(fd int, p []byte, off int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.access(fd, off, func(mem []byte) { copy(mem, p) })
}

func (k *fakeKernel) access(fd int, off int64, f func([]byte)) error {
	switch at := off & (1<<40 - 1); {
	case k.files[fd] != "device":
		return unix.EBADF
	case off>>40 == regionConfig:
		f(k.config[at:])
	default:
		f(unsafe.Slice((*byte)(k.bar.Base()), k.bar.Len())[at:])
	}
	return nil
}

func (k *fakeKernel) mmap(fd int, off int64, size uint64) (*shm.Region, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.files[fd] != "device" || off>>40 != regionBAR0 {
		return nil, unix.EINVAL
	}
	return k.bar.View(uint64(off), size)
}
