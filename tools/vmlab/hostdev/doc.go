// Package hostdev tests what hostmed does with an NVMe controller of its own (hostmed/internal/hostnvme) on one that is not made for tests: QEMU's, by
// VFIO behind an IOMMU, in a guest. The guest runs that package's own test.
package hostdev
