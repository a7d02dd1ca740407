package admin

import (
	"context"
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// QueueCount asks for n I/O queue pairs and returns how many there may be: what the controller grants, and at most n.
func (a *Admin) QueueCount(ctx context.Context, n int) (int, error) {
	z, ok := nvme.ToZeroBased16(uint32(n))
	if !ok || z == 0xFFFF {
		return 0, fmt.Errorf("%d I/O queue pairs: at most 65535", n)
	}
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureQueues, 0, uint32(nvme.MakeQueueCounts(z, z)))
	result, err := a.exec(ctx, cmd, nil)
	if err != nil {
		return 0, err
	}
	granted := nvme.QueueCounts(result)
	return min(n, int(granted.SQs().Count()), int(granted.CQs().Count())), nil
}

// SetArbitration sets the weights of the priorities and the burst.
func (a *Admin) SetArbitration(ctx context.Context, v nvme.Arbitration) error {
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureArbitration, 0, uint32(v))
	_, err := a.exec(ctx, cmd, nil)
	return err
}

// Pair is what the controller must know of an I/O queue pair; SQ and CQ have the same id and number of entries.
type Pair struct {
	QID            uint16
	Size           uint32
	SQIOVA, CQIOVA uint64
	Vector         uint16
	Interrupts     bool
	Priority       uint8 // QPRIO, which counts with Config.Weighted only
}

// CreatePair creates the CQ, then the SQ. If the SQ is refused the CQ is deleted again. The error is a failure of the controller
// if known is false: it may then have either queue.
func (a *Admin) CreatePair(ctx context.Context, p Pair) (known bool, err error) {
	size, ok := nvme.ToZeroBased16(p.Size)
	if !ok {
		return true, fmt.Errorf("queue of %d entries", p.Size)
	}
	var cmd nvme.Command
	cmd.SetCreateCQ(p.QID, size, p.CQIOVA, p.Vector, p.Interrupts)
	if known, err := a.try(ctx, cmd); err != nil {
		return known, err
	}
	cmd.SetCreateSQ(p.QID, size, p.SQIOVA, p.QID, p.Priority)
	known, err = a.try(ctx, cmd)
	if err != nil && known {
		del := nvme.Command{Opcode: nvme.AdminDeleteCQ, CDW10: uint32(p.QID)}
		if _, delErr := a.try(ctx, del); delErr != nil {
			return false, fmt.Errorf("%w (and then %w)", err, delErr)
		}
	}
	return known, err
}

// DeletePair deletes the SQ, then the CQ. After nil the controller touches their memory no more, nor that of commands in them.
func (a *Admin) DeletePair(ctx context.Context, qid uint16) error {
	for _, opcode := range []uint8{nvme.AdminDeleteSQ, nvme.AdminDeleteCQ} {
		if _, err := a.try(ctx, nvme.Command{Opcode: opcode, CDW10: uint32(qid)}); err != nil {
			return err
		}
	}
	return nil
}

// ForgetPair deletes what there may be of a queue pair: it is for one whose creation was interrupted. After nil the controller has none of
// its memory.
func (a *Admin) ForgetPair(ctx context.Context, qid uint16) error {
	for _, opcode := range []uint8{nvme.AdminDeleteSQ, nvme.AdminDeleteCQ} {
		known, err := a.try(ctx, nvme.Command{Opcode: opcode, CDW10: uint32(qid)})
		if errors.Is(err, queue.ErrReset) {
			return nil // that has made it forget
		}
		if !known {
			return err
		}
	}
	return nil
}

// try executes a command and says whether its outcome is known.
func (a *Admin) try(ctx context.Context, cmd nvme.Command) (known bool, err error) {
	status, _, err := a.Exec(ctx, cmd, nil)
	if err != nil {
		return false, err
	}
	if !status.OK() {
		return true, a.cfg.Refused(cmd, status)
	}
	return true, nil
}
