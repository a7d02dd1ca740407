package trace

import (
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of /dev/kvm. include/uapi/linux/kvm.h
const (
	kvmCreateVM      = 0xae01
	kvmVCPUMapSize   = 0xae04
	kvmCreateVCPU    = 0xae41
	kvmSetMemory     = 0x4020ae46
	kvmRun           = 0xae80
	kvmGetSRegs      = 0x8138ae83
	kvmSetSRegs      = 0x4138ae84
	kvmSetRegs       = 0x4090ae82
	exitReasonAt     = 8 // in struct kvm_run
	exitHLT          = 5
	exitMMIO         = 6
	sregsSize        = 0x138
	regsSize         = 0x90
	ripAt, rflagsAt  = 16 * 8, 17 * 8
	selectorAt       = 12 // in struct kvm_segment, of which CS is the first
	guestPage        = 0x1000
	guestMMIOWrites  = 3
	guestMMIOAddress = 0x8000
)

// guestCode stores a byte guestMMIOWrites times where there is no memory, and halts: mov byte [0x8000], n; hlt, in 16 bits.
func guestCode() []byte {
	var code []byte
	for n := range byte(guestMMIOWrites) {
		code = append(code, 0xc6, 0x06, guestMMIOAddress&0xff, guestMMIOAddress>>8, n)
	}
	return append(code, 0xf4)
}

// runGuest runs a virtual machine to its end and returns how often its MMIO came to this process.
func runGuest(t *testing.T) (mmio int) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		if os.Getenv("CI") == "true" {
			t.Fatalf("the guest's code is for x86: CI needs such a machine, this is %s", runtime.GOARCH)
		}
		t.Skip("the guest's code is for x86")
	}
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		if os.Getenv("CI") != "true" {
			t.Skipf("/dev/kvm: %v", err)
		}
		t.Fatal(err)
	}
	defer unix.Close(kvm)
	ioctl := func(fd int, request uint, arg uintptr) int {
		t.Helper()
		n, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), arg)
		if no != 0 {
			t.Fatalf("ioctl %#x: %v", request, no)
		}
		return int(n)
	}
	vm := ioctl(kvm, kvmCreateVM, 0)
	defer unix.Close(vm)
	memory, err := unix.Mmap(-1, 0, guestPage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(memory)
	copy(memory, guestCode())
	region := struct {
		slot, flags        uint32
		address, size, hva uint64
	}{address: guestPage, size: guestPage, hva: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	ioctl(vm, kvmSetMemory, uintptr(unsafe.Pointer(&region)))
	cpu := ioctl(vm, kvmCreateVCPU, 0)
	defer unix.Close(cpu)
	run, err := unix.Mmap(cpu, 0, ioctl(kvm, kvmVCPUMapSize, 0), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(run)
	var sregs [sregsSize]byte
	ioctl(cpu, kvmGetSRegs, uintptr(unsafe.Pointer(&sregs)))
	clear(sregs[:8])                        // CS begins at 0
	clear(sregs[selectorAt : selectorAt+2]) // and is 0
	ioctl(cpu, kvmSetSRegs, uintptr(unsafe.Pointer(&sregs)))
	var regs [regsSize / 8]uint64
	regs[ripAt/8], regs[rflagsAt/8] = guestPage, 2
	ioctl(cpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs)))
	for range 100 {
		ioctl(cpu, kvmRun, 0)
		switch reason := run[exitReasonAt]; reason {
		case exitMMIO:
			mmio++
		case exitHLT:
			return mmio
		default:
			t.Fatalf("the guest left with %d", reason)
		}
	}
	t.Fatal("the guest does not end")
	return 0
}

// TestExitsOfAVirtualMachine counts what a guest of this process does: its stores to where it has no memory leave it.
func TestExitsOfAVirtualMachine(t *testing.T) {
	needBPF(t)
	me := uint32(os.Getpid())
	for _, vm := range []uint32{me, 0, 1} { // this process's, everybody's, one that is none
		tr, err := Open(t.Context(), Options{KVM: true, VM: vm})
		if err != nil {
			t.Fatal(err)
		}
		defer tr.Close()
		before, err := tr.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		mmio := runGuest(t)
		after, err := tr.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		if mmio != guestMMIOWrites {
			t.Fatalf("%d writes came out", mmio)
		}
		found := false
		for _, c := range after.Sub(before).KVM {
			if c.PID != me {
				continue
			}
			found = true
			reasons := uint64(0)
			for _, n := range c.Reasons {
				reasons += n
			}
			// A KVM without hardware's help emulates such a guest without an exit.
			if c.MMIO != guestMMIOWrites || reasons != c.Exits || c.FastMMIO != 0 {
				t.Errorf("%+v, want %d MMIO writes, and a reason for each exit", c, guestMMIOWrites)
			}
		}
		if found != (vm != 1) {
			t.Errorf("VM %d: %+v", vm, after.KVM)
		}
	}
}
