package backend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// adminTimeout bounds one admin command of a guest, in all.
const adminTimeout = 10 * time.Second

// describe is what of the device a guest may use. A device that has no Commands Supported and Effects log, or does not give it, gets no command.
func (b *vfio) describe() Device {
	d := Device{NSID: b.spec.NSID, Whole: b.spec.whole(), Vendor: b.spec.Vendor, Controller: *b.dev.Controller()}
	if d.Controller.LPA&nvme.LPACommandEffects == 0 {
		return d
	}
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogCommandEffects, 0, 0, nvme.IdentifySize, true); err != nil {
		return d
	}
	if _, st, err := b.Admin(&cmd, d.Effects.Bytes()[:]); err != nil || !st.OK() {
		b.log.Warn("no Commands Supported and Effects log: no admin command of guests gets to the device", "spec", b.spec.String(), "status", st, "error", err)
		d.Effects = nvme.CommandEffects{}
	}
	return d
}

// Device is what of the device a guest may use.
func (b *vfio) Device() *Device { return &b.device }

// Admin has one command at a time of each namespace. While the controller is reset it waits. A log page that a reset has come over is read again; of other
// commands nobody knows what they have done by then, and they end with an error.
func (b *vfio) Admin(c *nvme.Command, data []byte) (dw0 uint32, status nvme.Status, err error) {
	ctx, cancel := context.WithTimeoutCause(b.life, adminTimeout, fmt.Errorf("%w after %v", queue.ErrTimeout, adminTimeout))
	defer cancel()
	select {
	case b.asking <- struct{}{}:
		defer func() { <-b.asking }()
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return 0, 0, context.Cause(ctx)
	}
	cmd := nvme.Command{Opcode: c.Opcode, NSID: c.NSID, CDW10: c.CDW10, CDW11: c.CDW11, CDW12: c.CDW12, CDW13: c.CDW13, CDW14: c.CDW14, CDW15: c.CDW15}
	for {
		status, dw0, err = b.dev.Ask(ctx, cmd, data)
		if !errors.Is(err, queue.ErrReset) || c.Opcode != nvme.AdminGetLogPage {
			return dw0, status, err
		}
	}
}
