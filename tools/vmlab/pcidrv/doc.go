// Package pcidrv has the tests in which guestdrv drives PCI functions of a guest with Debian's stock kernel: QEMU's own NVMe controller, which
// nobody here wrote, and hostmed's, each by VFIO behind an IOMMU and by sysfs without one.
package pcidrv
