package hostmed

import (
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// What a user has to change in how a client was started: the log says it as a warning, each cause once for each client. docs/qemu.md
// has the same list.

var errVersion = errors.New("the client does not speak vfio-user 0: QEMU 10.1 or newer does, with -device " +
	`'{"driver":"vfio-user-pci","socket":{"type":"unix","path":"SOCKET"}}'; a vhost-user device does not`)

// causes are the errors that name a remedy.
var causes = []error{gmem.ErrNotShared, gmem.ErrHugePages, gmem.ErrNotMemory, gmem.ErrTooMany, gmem.ErrTooMuch, shm.ErrTooManyParts}

// advise logs err if it is of a cause that was not told yet. It is called on the session's goroutine.
func (s *session) advise(what string, err error) {
	for i, cause := range causes {
		if bit := uint32(1) << i; errors.Is(err, cause) && s.advised&bit == 0 {
			s.advised |= bit
			s.log.Warn(what, "error", err)
		}
	}
}

// unshared advises about memory that came without a descriptor, if it looks like the guest's RAM: the first of it, or what QEMU puts above 4 GiB, but
// no ROM and no frame buffer.
func (s *session) unshared(m *vfiouser.DMAMap) {
	if m.Flags&vfiouser.DMAWrite != 0 && (m.IOVA == 0 || m.IOVA >= 4<<30) {
		s.advise("the controller cannot use the client's memory", fmt.Errorf("%d MiB at %#x: %w", m.Size>>20, m.IOVA, gmem.ErrNotShared))
	}
}

// refusals is the log of clients that came while there was one: who tries again and again is told of once in a while.
type refusals struct {
	told    time.Time
	dropped int
}

// refusalPeriod is how often a port says that it has refused clients.
const refusalPeriod = 10 * time.Second

// again counts a refusal and says whether it is to be logged, and how many were not before it.
func (r *refusals) again(now time.Time) (tell bool, dropped int) {
	if !r.told.IsZero() && now.Sub(r.told) < refusalPeriod {
		r.dropped++
		return false, 0
	}
	dropped = r.dropped
	r.told, r.dropped = now, 0
	return true, dropped
}
