// Package hostnvme drives an NVMe device of the host for many guests: their requests become its commands, whose data moves between
// the device and guest memory with no copy in between.
//
// The life of a device is in device.go and the files that it names. The way of a request, with its files:
//
//	Queue      a worker's way to a slice of a namespace               queue.go, request.go
//	pointers   PRPs or an SGL towards the device, or none: a copy     prp.go, bounce.go
//	Memory     guest memory that the device reaches, and where        memory.go, pages.go
//	exposed    a function that no IOMMU stands before                 exposed.go
//	mux        commands of many queues on one pair of the device      mux.go, user.go
//	Pairs      which queue is on which pair                           pairs.go
//	Ask        admin commands of guests                               ask.go
//
// The device is not trusted, nor are guests: what the one says bounds nothing here, and the other's addresses reach the device only
// through Memory.
package hostnvme
