package backend

import (
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// check refuses what a caller should not have let through, so that no range error of its can become
// an access outside the medium. It calls no method of Info: each would copy all of it first, for each request.
func (i *Info) check(r *Request) nvme.Status {
	if r.Op == OpFlush {
		return nvme.StatusSuccess
	}
	if r.Op > OpDiscard {
		return nvme.StatusInvalidOpcode.WithDNR()
	}
	shift := i.LBAShift & 63 // which it is: the compiler need not ask
	if size := i.Blocks << shift; r.Off > size || r.Len > size-r.Off {
		return nvme.StatusLBAOutOfRange.WithDNR()
	}
	if (r.Off|r.Len)&(1<<shift-1) != 0 {
		return nvme.StatusInvalidField.WithDNR()
	}
	if i.ReadOnly && r.Op != OpRead {
		return nvme.StatusReadOnly.WithDNR()
	}
	return nvme.StatusSuccess
}

// status is statusOf for what the file is.
func (b *file) status(op Op, e unix.Errno) nvme.Status {
	if b.device {
		return deviceStatus(op, e)
	}
	return statusOf(op, e)
}

// deviceStatus maps the errno of an operation on a block device: its driver had a status of the device's, and the block layer has made
// an errno of it (blk_status_to_errno). What is not here is as for a file.
func deviceStatus(op Op, e unix.Errno) nvme.Status {
	switch e {
	case unix.EBADE: // BLK_STS_RESV_CONFLICT
		return nvme.StatusReservationConflict.WithDNR()
	case unix.EILSEQ: // BLK_STS_PROTECTION: which of the checks it was is not said
		return nvme.StatusGuardCheck
	case unix.ENOLINK, unix.ENODEV, unix.ENXIO: // BLK_STS_TRANSPORT, BLK_STS_OFFLINE
		return nvme.StatusInternalPathError
	case unix.EREMOTEIO, unix.ETIMEDOUT, unix.ETIME: // BLK_STS_TARGET, BLK_STS_TIMEOUT, BLK_STS_DURATION_LIMIT
		return nvme.StatusInternalError
	}
	return statusOf(op, e)
}

// statusOf maps the errno of a file operation to what the guest is told. Do Not Retry is set where
// the same command would meet the same fate.
func statusOf(op Op, e unix.Errno) nvme.Status {
	switch e {
	case 0:
		return nvme.StatusSuccess
	case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
		return nvme.StatusCapacityExceeded.WithDNR()
	case unix.EFAULT:
		return nvme.StatusDataTransferError
	case unix.EROFS:
		return nvme.StatusReadOnly.WithDNR()
	case unix.EACCES, unix.EPERM:
		return nvme.StatusAccessDenied.WithDNR()
	case unix.ENOMEM, unix.EAGAIN, unix.ECANCELED, unix.EINTR, unix.EBUSY:
		return nvme.StatusInternalError
	case unix.EINVAL, unix.EBADF, unix.EOPNOTSUPP, unix.ENOSYS:
		return nvme.StatusInternalError.WithDNR()
	}
	// EIO, ENODATA, EILSEQ, EUCLEAN, EREMOTEIO, ETIMEDOUT, ENXIO, ...: the medium.
	if op == OpRead {
		return nvme.StatusUnrecoveredRead
	}
	return nvme.StatusWriteFault
}
