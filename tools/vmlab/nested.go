package vmlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"github.com/cavaliergopher/cpio"
)

// A guest with Config.Nested can be a host itself: it runs the lab's QEMU with the stock kernel, by KVM. Under emulation KVM has the AMD-V that QEMU emulates, so that
// its guest's code is translated once and not twice. What the guest needs for that is on a disk of its own.

const (
	nestedQEMU     = "usr/bin/qemu-system-x86_64"
	nestedImageMiB = 192
)

// nestedFirmware is what a pc that is given a kernel reads besides.
var nestedFirmware = []string{"usr/share/seabios/bios-256k.bin", "usr/share/qemu/pvh.bin", "usr/share/qemu/kvmvapic.bin"}

// NestedImage makes an ext4 file system at image with what a guest needs to have guests of its own: QEMU with its libraries and firmware, the stock kernel, and a
// first file system of busybox and of init, a script for it, which ends with reboot -f. NestedCommand runs it.
func (l *Lab) NestedImage(ctx context.Context, image, init string) error {
	s, err := newScratch()
	if err != nil {
		return err
	}
	defer s.remove()
	place := func(name string) (string, error) {
		to := s.file(name)
		return to, os.MkdirAll(filepath.Dir(to), 0o755)
	}
	all := closure{root: l.root(), have: map[string]bool{}, file: func(name, from string) error {
		to, err := place(name)
		if err != nil {
			return err
		}
		return errors.Join(copySparse(to, from, 0), os.Chmod(to, 0o755))
	}, link: func(name, target string) error {
		to, err := place(name)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	}}
	for _, name := range []string{nestedQEMU, path.Join(libDir, loader)} {
		if err := all.add(name); err != nil {
			return err
		}
	}
	for _, name := range nestedFirmware {
		if err := all.file(name, filepath.Join(l.root(), name)); err != nil {
			return err
		}
	}
	if err := all.file("vmlinux", filepath.Join(l.kernelDir(Stable), "vmlinux")); err != nil {
		return err
	}
	if err := l.nestedInitrd(s.file("initrd"), init); err != nil {
		return err
	}
	_, err = output(ctx, l.root(), "usr/sbin/mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-d", s.path, "-E", "root_owner=0:0", image, fmt.Sprintf("%dM", nestedImageMiB))
	return err
}

func (l *Lab) nestedInitrd(name, init string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	if err := a.content("init", cpio.TypeReg|0o755, []byte(init)); err != nil {
		return err
	}
	if err := a.file("bin/busybox", filepath.Join(l.root(), "usr/bin/busybox")); err != nil {
		return err
	}
	for _, d := range []string{"dev/x", "proc/x", "sys/x", "tmp/x"} {
		if err := a.parents(d); err != nil {
			return err
		}
	}
	if err := a.w.Close(); err != nil {
		return err
	}
	return f.Close()
}

// nestedQuick leaves out what takes a stock kernel longest and what such a guest has no use for.
const nestedQuick = " acpi=off initcall_blacklist=jent_mod_init,trace_eval_init"

// NestedCommand is the shell command that runs QEMU from a NestedImage that is mounted at dir: a pc with one CPU, 128 MiB of memory that it shares, and what args say,
// with its console as standard output.
func (l *Lab) NestedCommand(dir, args string) string {
	lib := path.Join(dir, libDir)
	return fmt.Sprintf("%[1]s/"+loader+" --library-path %[1]s --argv0 qemu %[2]s/"+nestedQEMU+" -L %[2]s/usr/share/qemu -L %[2]s/usr/share/seabios"+
		" -nodefaults -no-user-config -display none -serial stdio -no-reboot -accel kvm -cpu host -smp cpus=1,maxcpus=%[3]d"+
		" -m 128 -object memory-backend-memfd,share=on,id=mem,size=128M -machine pc,memory-backend=mem,usb=off,hpet=off"+
		" -kernel %[2]s/vmlinux -initrd %[2]s/initrd -append '%[4]s%[5]s' %[6]s", lib, dir, minMaxCPUs, kernelLine(tcg), nestedQuick, args)
}
