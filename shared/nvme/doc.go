// Package nvme holds the wire types of NVMe: what lies in registers, queue
// entries, Identify data, features, log pages and status fields, as laid down in NVMe Base
// 2.0c and the NVM Command Set 1.0c. It does no I/O, keeps no state and
// decides nothing; rings are in package ring, data pointers in package prp.
//
// # Memory layout
//
// The structs are the wire layout itself on a little-endian machine, and the
// package refuses to build for any other. The method Bytes gives a struct's own
// memory as an array, without a copy; to decode, copy into it:
//
//	var c nvme.Command
//	copy(c.Bytes()[:], entry)
//
// A struct must be private memory: never lay one over memory that a peer can
// write. Sizes are asserted at compile time.
//
// # Zero-based values
//
// Many NVMe counts are stored as one less than they mean, and a 16-bit one then
// means up to 65536, which no uint16 holds. Such fields have the type [ZeroBased8] or
// [ZeroBased16], whose Count is a uint32, or, where the field is narrower than its word, a getter
// that returns one of them. A plain integer field is never zero-based.
//
// # Names
//
// Field names are the specification's own abbreviations (MDTS, NLBAF, IOSQES),
// since that is what an engineer looks up. Values print themselves the same way:
//
//	READ nsid=1 slba=0x10 nlb=8
//	Invalid Field in Command (0/02h, DNR)
//	CC=0x460001 (EN, IOSQES=6, IOCQES=4)
package nvme
