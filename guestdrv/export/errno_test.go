package export

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{errors.New("whatever"), unix.EIO},
		{fmt.Errorf("write: %w", nvme.StatusCapacityExceeded.WithDNR().Err()), unix.ENOSPC},
		{nvme.StatusLBAOutOfRange.Err(), unix.ENOSPC},
		{nvme.StatusNamespaceWriteProtected.Err(), unix.EPERM},
		{nvme.StatusUnrecoveredRead.Err(), unix.EIO},
		{nvme.StatusInvalidField.Err(), unix.EINVAL},
		{nvme.StatusInvalidOpcode.WithDNR().Err(), unix.EOPNOTSUPP},
		{nvme.StatusInvalidNamespace.Err(), unix.ENODEV},
		{context.DeadlineExceeded, unix.ETIMEDOUT},
		{fmt.Errorf("it is %w", unix.ENOMEM), unix.ENOMEM},
	} {
		if got := Errno(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}
