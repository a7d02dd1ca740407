// Package backends has the tests of hostmed over real NVMe devices: a stock guest with QEMU's own NVMe controllers behind an Intel IOMMU plays the
// host. hostmed runs in it, guestdrv processes in it play the guests, and the kernel's own driver there is the one to compare with.
//
// All tests share one boot, which takes some seconds and is made by the first one that asks for it. Each plugs in the disks that it needs:
//
//	func TestBlockTrims(t *testing.T) {
//		h := open(t)
//		d := h.disk(t, diskConfig{partitions: []int{64, 64}}) // MiB; out of the machine at the end of t
//		m := h.serve(t, "block:"+d.part(1))                   // hostmed, with one controller; ended in order at the end of t
//		h.verify(t, m.device(0), "--bs 512,4k,64k --qd 32")   // guestdrv bench --verify, which must find nothing wrong
//		before := h.sum(t, d.part(2), 0, 64<<20)              // by the kernel's driver, past its cache
//	}
//
// What else there is: h.start runs a command, h.startVerify a checked load, in the background; h.mount makes a file system; h.vfio gives a disk to vfio-pci, and back at the end; h.mediate takes
// a whole configuration; m.kill is SIGKILL, m.start starts hostmed again, m.says waits for a line of its log; d.unplug is QMP's
// device_del, d.pullOut a surprise removal of which the slot tells the kernel, d.vanish one of which it does not, and d.forget the kernel's being told all the same; h.spectate is a guest
// that says what it hears of its namespaces; h.traced returns what QEMU traced while something ran, such as the addresses of pci_nvme_map_addr.
// The kernel runs with nvme.poll_queues=1, and with iommu=pt: what it does itself has physical addresses as IOVAs, what VFIO does has its own.
//
// One test is run by
//
//	go test ./tools/vmlab/backends -run TestFileOnDisk -v
package backends
