package hostnvme

import (
	"bytes"
	"context"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Admin commands of guests. They go by the queue, and have their data in the memory, that the device's own life depends on: a reset identifies the
// controller and creates queues by it. So there are few at a time, whoever asks, and one that its guest no longer waits for counts until the device has
// ended it.

const (
	// maxAsks is how many there are at a time. With MaxAsk each they leave half of the memory, and of the queue all but a few entries.
	maxAsks = 2
	// MaxAsk is the most data of one, in bytes.
	MaxAsk = adminMemory / 2 / maxAsks
)

// Ask executes an admin command that a guest has asked for, with data to the controller or from it as bits 1:0 of its opcode say, and waits until ctx
// ends at the most: for its turn, for a reset that is under way, and for the device. One that the device does not end within Options.Timeout is
// a reason to reset the controller, as of its own commands. An error says that it did not end; one that wraps queue.ErrReset, that a reset has ended it.
func (d *Device) Ask(ctx context.Context, cmd nvme.Command, data []byte) (nvme.Status, uint32, error) {
	if len(data) > MaxAsk {
		return nvme.StatusInvalidField.WithDNR(), 0, nil
	}
	say := func(err error) error { return fmt.Errorf("%s: %s: %w", d.address, cmd.Describe(true), err) }
	select {
	case d.asks <- struct{}{}:
	case <-d.life.Done():
		return 0, 0, d.Err()
	case <-ctx.Done():
		return 0, 0, say(context.Cause(ctx))
	}
	type answer struct {
		status nvme.Status
		dw0    uint32
		err    error
	}
	own, end := bytes.Clone(data), make(chan answer, 1)
	go func() {
		var a answer
		a.status, a.dw0, a.err = d.Exec(d.life, cmd, own)
		<-d.asks
		end <- a
	}()
	select {
	case a := <-end:
		if a.err == nil && a.status.OK() && cmd.Opcode&fromDevice != 0 {
			copy(data, own)
		}
		return a.status & visible, a.dw0, a.err
	case <-ctx.Done():
		return 0, 0, say(context.Cause(ctx))
	}
}

// fromDevice is the bit of an opcode that says that data comes from the device.
const fromDevice = 2

var _ [admin.MaxData - MaxAsk]struct{} // Exec takes as much
