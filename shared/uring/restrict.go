package uring

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Restrictions are what is left of a ring once it is enabled: a process that goes into a sandbox keeps a ring that can do what it was
// made for and nothing else. seccomp sees none of the operations in a ring.
type Restrictions struct {
	// Ops are the operations that entries may have.
	Ops []uint8
	// Flags are those of SQE.Flags that entries may have.
	Flags uint8
	// RegisteredFilesOnly makes SQEFixedFile compulsory: no descriptor that is not registered can be named.
	RegisteredFilesOnly bool
}

// Restrict takes effect with Enable, for good: entries with another operation or flag end with EACCES, and nothing can be registered any
// more. The ring must have been made with Config.Disabled, and its files, buffers and personalities registered before (5.10).
func (r *Ring) Restrict(x Restrictions) error {
	v := make([]restriction, 0, len(x.Ops)+3)
	// From Linux 7.0 on registering is restricted only where something of it is allowed: what has no effect on a ring that is enabled.
	v = append(v, restriction{opcode: restrictRegisterOp, value: regEnableRings})
	for _, op := range x.Ops {
		v = append(v, restriction{opcode: restrictSQEOp, value: op})
	}
	v = append(v, restriction{opcode: restrictSQEFlagsAllowed, value: x.Flags})
	if x.RegisteredFilesOnly {
		v = append(v, restriction{opcode: restrictSQEFlagsRequired, value: SQEFixedFile})
	}
	if errno := registerRestrictions(r.fd, v); errno != 0 {
		e := &Error{Op: fmt.Sprintf("restricting an io_uring to %d operations", len(x.Ops)), Errno: errno}
		switch errno {
		case unix.EBADFD:
			e.Remedy = "it is enabled already: make it with Disabled"
		case unix.EBUSY:
			e.Remedy = "it has been restricted before"
		}
		return e
	}
	return nil
}

// RegisterPersonality keeps the caller's credentials as they are now, and returns their number for SQE.Personality: an
// entry with it is executed with them even when the process has given up its own.
func (r *Ring) RegisterPersonality() (uint16, error) {
	id, errno := registerPersonality(r.fd)
	if errno != 0 {
		return 0, &Error{Op: "registering credentials with io_uring", Errno: errno}
	}
	return uint16(id), nil
}

// Restricted returns nil if the ring is restricted and enabled. Its issuer asks.
func (r *Ring) Restricted() error {
	// A restricted ring refuses what it was not made for before it looks at the arguments.
	if errno := registerNothing(r.fd, regProbe); errno != unix.EACCES {
		return fmt.Errorf("io_uring is not restricted: registering a probe: %v, want %w", errno, unix.EACCES)
	}
	return nil
}
