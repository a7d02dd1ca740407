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

// kexecInitramfs makes what the next kernel starts from: this system without its modules and programs for NBD, which the test does not need.
const kexecInitramfs = "cd / && find . -xdev -path ./usr/lib/modules -prune -o -path ./boot -prune -o -path '*/*nbd*' -prune -o -print | cpio -o -H newc 2>/dev/null >/tmp/initramfs && "

// restartsUnderLoad restarts the guest again and again under load. Of kexec and reboot the driver knows, and it disables its controllers. After a
// panic and by QEMU they are left enabled, their shadow doorbells configured and commands in flight. Each new kernel finds its disks
// in order, has nothing to complain of, and everything is there that the old one acknowledged.
func (g *guest) restartsUnderLoad(t *testing.T) {
	exec := func(command string) func() error {
		return func() error {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := g.Exec(ctx, "(sleep 0.3; "+command+") >/dev/null 2>&1 &")
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
		{"system_reset", "true", func() error { return resetStandingStill(t, g.VM) }, ""},
	} {
		t.Run(r.name, func(t *testing.T) {
			g.Run(t, r.prepare)
			// One disk in turn; the others are enabled and idle.
			on := i % len(modes)
			g.Run(t, load(g.Disk(t, on).Namespace(1))+" >/dev/null 2>&1 &")
			l := g.start(t, on)
			g.acks.more(t, 20)
			if err := g.Restarted(t.Context(), r.do); err != nil {
				t.Fatal(err)
			}
			checkFile(t, g.files[on], l, g.acks.read(t), 5)
			var disks []string
			for d := range modes {
				disks = append(disks, g.Disk(t, d).Namespace(1))
			}
			g.Run(t, verified(disks...))
			var allowed []string
			if r.allowed != "" {
				allowed = append(allowed, r.allowed)
			}
			g.CheckDmesg(t, allowed...)
		})
	}
}

// resetStandingStill has QEMU reset a machine whose processors it has stopped, so that from then on only a device could write to memory; ours
// must not (R21). Then they run on.
func resetStandingStill(t *testing.T, vm *vmlab.VM) error {
	// The machine has been reset before: the event that counts comes behind its stop.
	for _, step := range []struct{ command, event string }{{"stop", "STOP"}, {"system_reset", "RESET"}} {
		if _, err := vm.QMP(t.Context(), step.command, nil); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if _, err := vm.Event(ctx, step.event); err != nil {
			return err
		}
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
