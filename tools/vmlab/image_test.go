package vmlab

import (
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
)

// TestRootOnNVMe: a Debian with systemd has its root on our disk, which is the guest's only one, and finds everything again after
// it was switched off.
func TestRootOnNVMe(t *testing.T) {
	lab := Open(t)
	image := t.TempDir() + "/disk"
	if err := lab.RootImage(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	device := Controller(t, hostmed.Shadow, "file:"+image)
	config := Config{Boot: RootDisk, Append: "root=/dev/nvme0n1 rw rootwait", Devices: []Device{device}, Within: 5 * time.Minute}
	vm := lab.Boot(t, config)
	t.Logf("systemd: up after %.1f s", vm.BootTime().Seconds())
	vm.Run(t, "grep -q ' / ext4' /proc/mounts && systemctl is-active local-fs.target")
	vm.Run(t, "dd if=/dev/urandom of=/var/a bs=1M count=4 2>/dev/null && sha256sum /var/a > /var/sum")
	vm.CheckDmesg(t)
	vm.Run(t, "(sleep 0.3; systemctl --no-block poweroff) >/dev/null 2>&1 &") // the agent is among what ends
	if err := vm.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}

	config.Append += " " + FastInit
	vm = lab.Boot(t, config)
	t.Logf("without: up after %.1f s", vm.BootTime().Seconds())
	vm.Run(t, "sha256sum -c /var/sum")
	if log := vm.Dmesg(t); !strings.Contains(log, "mounted filesystem") {
		t.Errorf("the file system was not left clean:\n%s", log)
	}
	vm.CheckDmesg(t)
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestFirmwareStartsOurDisk: SeaBIOS and UEFI find the disk by themselves and start what is on it: GRUB, which reads the
// kernel through the firmware's driver, and then Linux, which takes the controller over.
func TestFirmwareStartsOurDisk(t *testing.T) {
	lab := Open(t)
	image := t.TempDir() + "/disk"
	if err := lab.BootImage(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	for _, firmware := range []Firmware{SeaBIOS, OVMF} {
		t.Run(string(firmware), func(t *testing.T) {
			device := Controller(t, hostmed.Shadow, "file:"+image).With("bootindex", 0)
			vm := lab.Boot(t, Config{Boot: FromDisk, Firmware: firmware, Devices: []Device{device}})
			t.Logf("up after %.1f s", vm.BootTime().Seconds())
			vm.Run(t, "grep -q root=PARTUUID= /proc/cmdline")
			if efi := vm.Try(t, "test -d /sys/firmware/efi").Exit == 0; efi != (firmware == OVMF) {
				t.Errorf("EFI: %v", efi)
			}
			vm.CheckDmesg(t)
			if err := vm.Poweroff(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}
