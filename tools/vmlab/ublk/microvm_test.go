package ublk

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// script is the program on the disk. It kills its disk's driver half-way.
const script = `set -e
echo "program: process $$ on $(uname -r), root: $(ls /)"
[ "$(sha256sum < /data)" = "$(cat /data.sha256)" ] && echo "program: data read well"
dd if=/data of=/copy bs=64k 2>/dev/null
sync
if [ "$1" = kill ]; then
	kill -9 $(pidof guestdrv)
	echo "program: killed the driver"
	dd if=/data of=/copy2 bs=4k conv=fsync 2>/dev/null
	cmp /copy2 /data && echo "program: wrote without it, and on"
fi
cmp /copy /data
echo "written in the guest" > /result
(trap "" TERM; sleep 1000) &
echo "program: ends"
`

// image makes an ext4 file system with the script, a static shell to run it, and data.
func image(t *testing.T, lab *vmlab.Lab) string {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = byte(i * i >> 7)
	}
	for name, b := range map[string][]byte{"program.sh": []byte(script), "data": data} {
		write(t, filepath.Join(tree, name), b, 0o644)
	}
	write(t, filepath.Join(tree, "data.sha256"), fmt.Appendf(nil, "%x  -\n", sha256.Sum256(data)), 0o644)
	shell, err := lab.File("usr/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(tree, "bin/busybox"), shell, 0o755)
	for _, a := range []string{"sh", "ls", "uname", "sha256sum", "cat", "dd", "sync", "kill", "pidof", "cmp", "sleep"} {
		if err := os.Symlink("busybox", filepath.Join(tree, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"proc", "sys", "dev"} {
		if err := os.Mkdir(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(dir, "disk")
	run(t, lab, "usr/sbin/mkfs.ext4", "-q", "-d", tree, "-E", "root_owner=0:0", disk, "64M")
	return disk
}

func write(t *testing.T, name string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, mode); err != nil {
		t.Fatal(err)
	}
}

// run runs a program of the lab's on this machine.
func run(t *testing.T, lab *vmlab.Lab, name string, args ...string) string {
	t.Helper()
	out, err := lab.Program(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestMicroVM boots a microVM with guestdrv as its first process and one disk, and reads from the console what became of it.
func TestMicroVM(t *testing.T) {
	lab := vmlab.Open(t)
	for _, c := range []struct {
		name, args, boot string
		device           func(image string) vmlab.Device
		want             []string
		cpus             int
	}{
		{"hostmed", "", "shadowbell.unbind", func(image string) vmlab.Device { return vmlab.Controller(t, hostmed.Shadow, "file:"+image) }, nil, 1},
		{"QEMU", "", "shadowbell.unbind", func(image string) vmlab.Device { return vmlab.QEMUNVMe(image, "qemu") }, nil, 2},
		{"driver killed", "kill", "shadowbell.unbind", func(image string) vmlab.Device { return vmlab.Controller(t, hostmed.Shadow, "file:"+image) },
			[]string{"guestdrv serve has ended: killed by signal 9", "program: wrote without it, and on"}, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := image(t, lab)
			vm := lab.Boot(t, vmlab.Config{
				Machine: vmlab.Microvm, CPUs: c.cpus, MemoryMiB: 256, Devices: []vmlab.Device{c.device(disk)},
				Initramfs: &vmlab.Initramfs{
					Programs: map[string]string{"init": "guestdrv"}, Modules: map[string]string{"lib/modules/guestdrv/ublk_drv.ko": "ublk_drv"},
				},
				Append: fmt.Sprintf("shadowbell.device=sysfs:0000:00:02.0 %s -- /bin/busybox sh /program.sh %s", c.boot, c.args),
			})
			if err := vm.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			console := vm.Console()
			for _, want := range append([]string{
				"/dev/ublkb0 is mounted on /disk", "program: process", "program: data read well", "program: ends", "exit status 0", "/disk is unmounted",
			}, c.want...) {
				if !strings.Contains(console, want) {
					t.Errorf("the console does not say %q", want)
				}
			}
			for _, bad := range []string{"Kernel panic", "I/O error", "EXT4-fs error", "sandbox: warning", "BUG:", "Call Trace"} {
				if strings.Contains(console, bad) {
					t.Errorf("the console says %q", bad)
				}
			}
			for _, line := range regexp.MustCompile(`(?m)^guestdrv: init: .*$`).FindAllString(console, -1) {
				t.Log(strings.TrimSpace(line))
			}
			run(t, lab, "usr/sbin/e2fsck", "-fn", disk)
			if got := run(t, lab, "usr/sbin/debugfs", "-R", "cat /result", disk); !strings.Contains(got, "written in the guest") {
				t.Errorf("/result is %q", got)
			}
		})
	}
	t.Run("failures", func(t *testing.T) {
		for name, c := range map[string]struct{ line, want string }{
			"driver in the way": {"shadowbell.device=sysfs:0000:00:02.0 -- /bin/true", "nvme"},
			"no device":         {"shadowbell.device=sysfs:0000:00:09.0 -- /bin/true", "0000:00:09.0"},
			"no program":        {"shadowbell.device=sysfs:0000:00:02.0 shadowbell.unbind -- /bin/nothing", "/bin/nothing: no such file"},
			"no arguments":      {"", "guestdrv init --help"},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel() // machines of one CPU, that mostly boot
				disk := image(t, lab)
				vm := lab.Boot(t, vmlab.Config{
					Machine: vmlab.Microvm, CPUs: 1, MemoryMiB: 256, Devices: []vmlab.Device{vmlab.QEMUNVMe(disk, "qemu")},
					Initramfs: &vmlab.Initramfs{
						Programs: map[string]string{"init": "guestdrv"}, Modules: map[string]string{"lib/modules/guestdrv/ublk_drv.ko": "ublk_drv"},
					},
					Append: c.line,
				})
				if err := vm.Wait(t.Context()); err != nil {
					t.Fatal(err)
				}
				if console := vm.Console(); !strings.Contains(console, c.want) || strings.Contains(console, "Kernel panic") {
					t.Errorf("the console does not say %q, or the kernel died:\n%s", c.want, console)
				}
				run(t, lab, "usr/sbin/e2fsck", "-fn", disk)
			})
		}
	})
}
