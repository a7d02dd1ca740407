package faults

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// kexecInitramfs makes what the next kernel starts from, in a guest that was booted and not kexec'ed: the agent and the writer are behind the rest.
const kexecInitramfs = "cd / && ls usr/bin/vmlab-* | cpio -o -H newc 2>/dev/null >/tmp/more && cat /tmp/more >>/boot/initramfs && rm /tmp/more && "

// TestRestartsUnderLoad restarts one guest again and again under load. Of kexec and reboot the driver knows, and it disables its controllers. After a
// panic, by sysrq and by QEMU they are left enabled, their shadow doorbells configured and commands in flight. Each new kernel finds its disks
// in order, has nothing to complain of, and everything is there that the old one acknowledged. (R21 has a test of its own, for what a new
// kernel would not notice.)
func TestRestartsUnderLoad(t *testing.T) {
	lab := vmlab.Open(t)
	c := vmlab.Config{Reboot: true, Files: map[string]string{"/boot/bzImage": filepath.Join(lab.Dir(), "bzImage"), "/boot/initramfs": filepath.Join(lab.Dir(), "initramfs")}, MemoryMiB: 1024, Append: "crashkernel=320M"}
	var files []string
	for i, mode := range modes {
		files = append(files, filepath.Join(t.TempDir(), fmt.Sprint(i)))
		c.Devices = append(c.Devices, vmlab.Controller(t, mode, "file:"+files[i]+",size=64MiB"))
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
		{"panic", kexecInitramfs + `kexec -p /boot/bzImage --initrd=/boot/initramfs --reuse-cmdline --append="maxcpus=1 reset_devices"`, exec("echo c >/proc/sysrq-trigger"), "Spurious LAPIC timer interrupt"},
		{"reboot -f", "true", exec("reboot -f"), ""},
		{"kexec", kexecInitramfs + "kexec -l /boot/bzImage --initrd=/boot/initramfs --reuse-cmdline", exec("kexec -e"), "Spurious LAPIC timer interrupt"},
		{"sysrq b", "true", exec("echo b >/proc/sysrq-trigger"), ""},
		{"system_reset", "true", func() error { _, err := vm.QMP(t.Context(), "system_reset", nil); return err }, ""},
	} {
		t.Run(r.name, func(t *testing.T) {
			vm.Run(t, r.prepare)
			if err := os.Truncate(string(acks), 0); err != nil {
				t.Fatal(err)
			}
			// The writers on one disk in turn, fio on all.
			on := i % len(modes)
			for d := range modes {
				vm.Run(t, load(vm.Disk(t, d).Namespace(1))+" >/dev/null 2>&1 &")
			}
			l := startWriter(t, vm, vm.Disk(t, on).Namespace(1), loadBelow)
			acks.more(t, 30)
			if err := vm.Restarted(t.Context(), r.do); err != nil {
				t.Fatal(err)
			}
			checkFile(t, files[on], l, acks.read(t), 10)
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
