package vmlab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// recipeVersion stands for how a cache is made: whoever changes that raises it, and each machine makes it anew.
const recipeVersion = 5

const (
	suite     = "trixie"
	backports = "trixie-backports"

	// kernelPackage depends on the newest stock kernel for virtual machines that a suite has.
	kernelPackage = "linux-image" + kernelFlavour
	kernelFlavour = "-cloud-amd64"
)

// fromBackports has a vfio-user client: QEMU 10.1 or newer. Its firmware comes along.
var fromBackports = []string{"qemu-*", "seabios"}

// packages are installed without what they recommend, and never configured: they are unpacked into one directory.
var packages = []string{
	"qemu-system-x86", "qemu-utils", "seabios", "ovmf",
	"busybox-static", "fio", "nvme-cli", "e2fsprogs", "kexec-tools", "nbd-client", "libnbd-bin", // for guests
	"kmod", "xz-utils", "zstd", // to make the kernel and its modules ready
	"dosfstools", "mtools", "fdisk", "grub-pc-bin", "grub-efi-amd64-bin", "grub-common", // to make bootable disks
}

// guestPrograms are in the initramfs, each with the libraries that it needs.
var guestPrograms = []string{
	"usr/bin/busybox", guestFio, "usr/sbin/nvme", "usr/sbin/kexec",
	"usr/sbin/mke2fs", "usr/sbin/mkfs.ext4", "usr/sbin/e2fsck", "usr/sbin/fsck.ext4",
	"usr/sbin/nbd-client", "usr/bin/nbdinfo", "usr/bin/nbdcopy",
}

const guestFio = "usr/bin/fio"

// guestFioWithout are libraries of fio's engines for disks on networks and other things that no guest has: most of what would be linked each time that fio
// starts there, and a third of the initramfs.
var guestFioWithout = []string{
	"libgfapi.so.0", "libibverbs.so.1", "libnbd.so.0", "libnfs.so.14", "libpmem.so.1", "librados.so.2", "librbd.so.1", "librdmacm.so.1",
}

// guestModules are the kernel modules in the initramfs; what they depend on comes along. nvme, ext4, virtio-pci and
// virtio-console are built into the kernel.
var guestModules = []string{
	"vfio", "vfio_iommu_type1", "vfio-pci", "virtio_blk", "virtio_mmio", "configfs", "null_blk", "loop", "nvme-fabrics", "nvme-tcp",
	"nvmet", "nvmet-tcp", "nvme-loop", "ublk_drv", "nbd", "kvm-amd", "kvm-intel", "vfat", "nls_cp437", "nls_iso8859-1", "efivarfs", "xfs",
}

// newerModules are those of the kernel from backports.
var newerModules = []string{"ublk_drv", "vfio_iommu_type1", "vfio-pci"}

// debianPackages are the system that is installed on disks, besides what Debian cannot do without.
var debianPackages = []string{"?essential", "systemd-sysv", "udev", "kmod", "e2fsprogs"}

// trimmed is of no use here and half of what the packages hold.
var trimmed = []string{"usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/i18n", "usr/share/zoneinfo", "usr/share/perl", "usr/share/gconv", "usr/lib/python3*"}

// recipeKey names the cache that this recipe makes.
func recipeKey() string {
	h := sha256.New()
	fmt.Fprint(h, recipeVersion, suite, backports, kernelPackage, initScript)
	for _, list := range [][]string{fromBackports, packages, guestPrograms, guestFioWithout, guestModules, newerModules, debianPackages, debianFiles, debianLinks, trimmed} {
		fmt.Fprintln(h, strings.Join(list, " "))
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}
