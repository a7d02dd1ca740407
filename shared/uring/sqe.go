package uring

import "golang.org/x/sys/unix"

// SQE is a submission entry, struct io_uring_sqe: 64 bytes, or the first 64 of 128 on a ring with
// SQE128. The fields have the kernel's meaning for the operation; the Prep methods fill
// those of the common ones and leave Flags, UserData and the rest as they are, which is zero
// after GetSQE.
//
// Memory that an entry points to must stay where it is until the operation has completed: memory
// outside the Go heap, or a heap object that the caller keeps reachable. (The vector of a Readv or Writev only
// until Submit has returned.)
type SQE struct {
	Opcode      uint8
	Flags       uint8
	IOPrio      uint16
	FD          int32
	Off         uint64 // also addr2; OpURingCmd: the command's number in the low half
	Addr        uint64 // also splice_off_in
	Len         uint32
	OpFlags     uint32 // rw_flags, fsync_flags, cancel_flags, uring_cmd_flags, ...
	UserData    uint64
	BufIndex    uint16 // also buf_group
	Personality uint16
	SpliceFDIn  int32 // also file_index
	Addr3       uint64
	_           uint64
}

// CQE is a completion entry, struct io_uring_cqe.
type CQE struct {
	UserData uint64
	Res      int32 // the operation's result, or minus an errno
	Flags    uint32
}

// WideCQE is a completion entry of a ring with CQE32.
type WideCQE struct {
	CQE
	Extra [2]uint64
}

// Errno returns the error that the operation ended with, or 0.
func (c *CQE) Errno() unix.Errno {
	if c.Res < 0 {
		return unix.Errno(-c.Res)
	}
	return 0
}

// PrepNop does nothing but complete.
func (s *SQE) PrepNop() { s.Opcode, s.FD = OpNop, -1 }

// PrepRead reads n bytes at byte off of fd to p.
func (s *SQE) PrepRead(fd int, p *byte, n uint32, off uint64) {
	s.transfer(OpRead, fd, addressOf(p), n, off)
}

// PrepWrite writes n bytes from p to byte off of fd.
func (s *SQE) PrepWrite(fd int, p *byte, n uint32, off uint64) {
	s.transfer(OpWrite, fd, addressOf(p), n, off)
}

// PrepReadv reads into the pieces of vec from byte off of fd. The kernel takes at most 1024 pieces.
func (s *SQE) PrepReadv(fd int, vec []unix.Iovec, off uint64) {
	s.transfer(OpReadv, fd, addressOfVec(vec), uint32(len(vec)), off)
}

// PrepWritev writes the pieces of vec to byte off of fd.
func (s *SQE) PrepWritev(fd int, vec []unix.Iovec, off uint64) {
	s.transfer(OpWritev, fd, addressOfVec(vec), uint32(len(vec)), off)
}

// PrepReadFixed is PrepRead to memory that lies within registered buffer buf.
func (s *SQE) PrepReadFixed(fd int, p *byte, n uint32, off uint64, buf uint16) {
	s.transfer(OpReadFixed, fd, addressOf(p), n, off)
	s.BufIndex = buf
}

// PrepWriteFixed is PrepWrite from memory that lies within registered buffer buf.
func (s *SQE) PrepWriteFixed(fd int, p *byte, n uint32, off uint64, buf uint16) {
	s.transfer(OpWriteFixed, fd, addressOf(p), n, off)
	s.BufIndex = buf
}

// PrepFsync makes what was written to fd durable; with FsyncDatasync in flags, not its times.
// It waits for no write that is in flight.
func (s *SQE) PrepFsync(fd int, flags uint32) {
	s.transfer(OpFsync, fd, 0, 0, 0)
	s.OpFlags = flags
}

// PrepFallocate is fallocate(2).
func (s *SQE) PrepFallocate(fd int, mode uint32, off, n uint64) {
	s.transfer(OpFallocate, fd, n, mode, off)
}

// PrepCancel asks for the operation with the given UserData to end early. Its own
// result is 0, or minus ENOENT or EALREADY.
func (s *SQE) PrepCancel(userData uint64) {
	s.transfer(OpAsyncCancel, -1, userData, 0, 0)
}

// PrepCommand is a driver's own command (IORING_OP_URING_CMD, 5.19). Its argument goes into
// Ring.Command of this entry.
func (s *SQE) PrepCommand(fd int, cmd uint32) {
	s.transfer(OpURingCmd, fd, 0, 0, uint64(cmd))
}

// PrepPoll completes once, when one of the events (unix.POLLIN, ...) is there on fd: at once if it is there already. Its
// result is the events that are.
func (s *SQE) PrepPoll(fd int, events uint32) {
	s.transfer(OpPollAdd, fd, 0, 0, 0)
	s.OpFlags = events
}

func (s *SQE) transfer(op uint8, fd int, addr uint64, n uint32, off uint64) {
	s.Opcode = op
	s.FD = int32(fd)
	s.Addr = addr
	s.Len = n
	s.Off = off
}
