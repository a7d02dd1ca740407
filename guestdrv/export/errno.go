package export

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Errno returns what a client of a block device is told of err: 0 for nil, EIO for what has no better name. It follows what Linux's own
// nvme driver makes of a status, as far as clients can do something with the difference.
func Errno(err error) unix.Errno {
	if err == nil {
		return 0
	}
	if e, ok := errors.AsType[*nvme.StatusError](err); ok {
		return statusErrno(e.Status)
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return unix.ETIMEDOUT
	case errors.Is(err, errors.ErrUnsupported):
		return unix.EOPNOTSUPP
	}
	if e, ok := errors.AsType[unix.Errno](err); ok && e != 0 {
		return e
	}
	return unix.EIO
}

func statusErrno(s nvme.Status) unix.Errno {
	switch s.Code() {
	case nvme.StatusSuccess:
		return 0
	case nvme.StatusInvalidOpcode:
		return unix.EOPNOTSUPP
	case nvme.StatusInvalidField, nvme.StatusInvalidProtectionInfo:
		return unix.EINVAL
	case nvme.StatusLBAOutOfRange, nvme.StatusCapacityExceeded:
		return unix.ENOSPC
	case nvme.StatusNamespaceWriteProtected, nvme.StatusReadOnly, nvme.StatusReservationConflict, nvme.StatusAccessDenied:
		return unix.EPERM
	case nvme.StatusInvalidNamespace:
		return unix.ENODEV
	}
	return unix.EIO
}
