package faults

import (
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// kexecInitramfs makes what the next kernel starts from: this system without its modules, which the test does not need.
const kexecInitramfs = "cd / && find . -xdev -path ./usr/lib/modules -prune -o -path ./boot -prune -o -print | cpio -o -H newc 2>/dev/null >/tmp/initramfs && "

// TestRestartsUnderLoad restarts one guest again and again under load. Of kexec and reboot the driver knows, and it disables its controllers. After a
// panic and by QEMU they are left enabled, their shadow doorbells configured and commands in flight. Each new kernel finds its disks
// in order, has nothing to complain of, and everything is there that the old one acknowledged.
func TestRestartsUnderLoad(t *testing.T) {
	lab := vmlab.Open(t)
	c := vmlab.Config{Reboot: true, Files: map[string]string{"/boot/bzImage": filepath.Join(lab.Dir(), "bzImage")}, MemoryMiB: 1024, Append: "crashkernel=320M"}
	var files []string
	for i, mode := range modes {
		files = append(files, filepath.Join(t.TempDir(), fmt.Sprint(i)))
		c.Devices = append(c.Devices, vmlab.Controller(t, mode, "file:"+files[i]+",size=128MiB"))
	}
	acks := withAcks(t, &c)
	vm := lab.Boot(t, c)
	exec := func(command string) func() error {
		return func() error {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := vm.Exec(ctx, "(sleep 0.3; "+command+") >/dev/null 2>&1 &")
			return err
		}
	}
	for i, r := range []struct {
		name    string
		prepare string
		do      func() error
		allowed string
	}{
		{"panic", kexecInitramfs + `kexec -p /boot/bzImage --initrd=/tmp/initramfs --reuse-cmdline --append="maxcpus=1 reset_devices"`, exec("echo c >/proc/sysrq-trigger"), "Spurious LAPIC timer interrupt"},
		{"reboot -f", "true", exec("reboot -f"), ""},
		{"kexec", kexecInitramfs + "kexec -l /boot/bzImage --initrd=/tmp/initramfs --reuse-cmdline", exec("kexec -e"), "Spurious LAPIC timer interrupt"},
		{"system_reset", "true", func() error { return resetStandingStill(t, vm) }, ""},
	} {
		t.Run(r.name, func(t *testing.T) {
			vm.Run(t, r.prepare)
			if err := os.Truncate(string(acks), 0); err != nil {
				t.Fatal(err)
			}
			// One disk in turn; the others are enabled and idle.
			on := i % len(modes)
			ns := vm.Disk(t, on).Namespace(1)
			vm.Run(t, load(ns)+" >/dev/null 2>&1 &")
			l := startWriter(t, vm, ns, i/len(modes))
			acks.more(t, 20)
			if err := vm.Restarted(t.Context(), r.do); err != nil {
				t.Fatal(err)
			}
			checkFile(t, files[on], l, acks.read(t), 5)
			for d := range modes {
				vm.Run(t, fmt.Sprintf(verified, vm.Disk(t, d).Namespace(1)))
			}
			var allowed []string
			if r.allowed != "" {
				allowed = append(allowed, r.allowed)
			}
			vm.CheckDmesg(t, allowed...)
		})
	}
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}

// resetStandingStill has QEMU reset a machine whose processors it has stopped, so that from then on only a device could write to memory; ours
// must not (R21). Then they run on.
func resetStandingStill(t *testing.T, vm *vmlab.VM) error {
	for _, command := range []string{"stop", "system_reset"} {
		if _, err := vm.QMP(t.Context(), command, nil); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := vm.Event(ctx, "RESET"); err != nil {
		return err
	}
	before := memorySum(t, vm)
	time.Sleep(300 * time.Millisecond)
	if after := memorySum(t, vm); after != before {
		t.Error("the guest's memory was written after the machine was reset")
	}
	_, err := vm.QMP(t.Context(), "cont", nil)
	return err
}

// memorySum is a sum over all of a guest's memory, which is a file of QEMU's.
func memorySum(t *testing.T, vm *vmlab.VM) uint32 {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", vm.PID())
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		if to, err := os.Readlink(path); err != nil || !strings.HasPrefix(to, "/memfd:memory-backend-memfd") {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		sum := crc32.New(crc32.MakeTable(crc32.Castagnoli)) // the fast one
		if n, err := io.CopyBuffer(sum, f, make([]byte, 1<<20)); err != nil || n == 0 {
			t.Fatalf("%d bytes of the guest's memory: %v", n, err)
		}
		return sum.Sum32()
	}
	t.Fatal("QEMU has no file for the guest's memory")
	return 0
}
