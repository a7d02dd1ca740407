// Package hostnvme drives an NVMe device of the host for many guests: their requests become its commands, whose data moves between
// the device and guest memory with no copy in between.
//
// The way of a request's data:
//
//	Memory     guest memory that the device reaches, and where        memory.go
//	pointers   PRPs or an SGL towards the device, or none: a copy     prp.go
//
// The device is not trusted, nor are guests: what the one says bounds nothing here, and the other's addresses reach the device only
// through Memory.
package hostnvme
