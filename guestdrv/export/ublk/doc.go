// Package ublk gives a namespace to Linux's block layer: it is the server of a ublk device, /dev/ublkbN, that mkfs, mount and every program
// take for a disk (Documentation/block/ublk.rst). It needs Linux 6.5, CAP_SYS_ADMIN while it sets up, and no cgo.
//
// The way of a request, in the order of queue.go:
//
//	/dev/ublkbN        the block layer picks the queue of its CPU and a tag
//	ublk_drv           a write's data is copied into the tag's buffer, which is DMA memory of the driver; the tag's command completes
//	queue.take         the descriptor is read once, checked, and made an NVMe command on that buffer
//	Queue.Submit       all that came together; one Publish, so one doorbell
//	Queue.Reap         what has ended is committed, many with one io_uring_enter: the one that sleeps, if there is nothing more to do
//	ublk_drv           a read's data is copied out of the buffer; the request ends and the tag waits for its next one
//
// So the kernel's copy between the page cache and the buffer is the only one. A queue is one OS thread with one ring and one queue pair of the disk's
// (export.Queued): there is no lock, no channel and no allocation on the way. It polls for as long as that pays, then sleeps in one system call on both
// the ring and the controller's interrupt. A disk without queue pairs is served by its methods, with a goroutine for each request (disk.go).
//
// # Zero copy
//
// ublk can lend the pages of a request to the server's ring (UBLK_F_SUPPORT_ZERO_COPY, UBLK_F_AUTO_BUF_REG). They are registered
// buffers, known by an index to operations of that ring on other files. They have no address in this process and none on the
// bus: a driver in user space, which writes addresses into PRP entries, can do nothing with them. That stays so with an IOMMU, which maps what is
// mapped in this process. UBLK_F_USER_COPY moves the same copy into a system call for each request, and UBLK_F_NEED_GET_DATA adds a round trip:
// both cost more than the copy in the driver, which goes straight to DMA memory. The way without a copy is the library: guestdrv.Buffer.
//
// # When the server dies
//
// Devices are made with user recovery. The process goes, and requests wait, also those that it had begun: they are issued once
// more to the next process that takes the device over (Recover). Only the process that drives the same namespace may: the device carries
// its Identity.
package ublk
