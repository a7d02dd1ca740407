package hostmed

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// The interrupts that a client sees: MSI-X, or the pin INTA# while MSI-X is off. What a client does with eventfds is VFIO's.

func (d *device) IRQInfo(i uint32) (vfiouser.IRQInfo, bool) {
	switch i {
	case vfiouser.IRQINTx:
		return vfiouser.IRQInfo{Index: i, Flags: vfiouser.IRQEventFD | vfiouser.IRQMaskable | vfiouser.IRQAutomasked, Count: 1}, true
	case vfiouser.IRQMSIX:
		return vfiouser.IRQInfo{Index: i, Flags: vfiouser.IRQEventFD, Count: uint32(d.cfg.Vectors())}, true
	case vfiouser.IRQErr:
		// It stops the whole machine, so it is never signalled; but QEMU complains at each start of a device without it.
		return vfiouser.IRQInfo{Index: i, Flags: vfiouser.IRQEventFD, Count: 1}, true
	}
	return vfiouser.IRQInfo{}, false
}

// SetIRQs takes eventfds; without fds, it takes them away. It owns fds.
func (d *device) SetIRQs(r vfiouser.SetIRQs, fds []int) (err error) {
	eventfd := r.Flags&vfiouser.IRQSetDataEventFD != 0
	action := r.Flags &^ (vfiouser.IRQSetDataNone | vfiouser.IRQSetDataBool | vfiouser.IRQSetDataEventFD)
	switch {
	case r.Index == vfiouser.IRQErr && action == vfiouser.IRQSetTrigger:
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil
	case r.Index == vfiouser.IRQINTx && !(action == vfiouser.IRQSetMask && eventfd):
		d.setPin(r, action, fds)
	case r.Index == vfiouser.IRQMSIX && !(action != vfiouser.IRQSetTrigger && eventfd):
		d.setVectors(r, action, fds)
	default:
		for _, fd := range fds {
			unix.Close(fd)
		}
		err = fmt.Errorf("interrupt index %d flags %#x are not supported: %w", r.Index, r.Flags, unix.EINVAL)
	}
	d.interruptsChanged()
	return err
}

func (d *device) setVectors(r vfiouser.SetIRQs, action uint32, fds []int) {
	switch {
	case r.DisableAll():
		d.data.SetVectors(0, nil, int(d.cfg.Vectors()))
	case r.Flags&vfiouser.IRQSetDataEventFD != 0:
		d.data.SetVectors(int(r.Start), fds, int(r.Count))
	case action == vfiouser.IRQSetTrigger: // a test of the wiring: fire these
		eachIRQ(r, func(i int) { d.data.Interrupt(uint16(i)) })
	default:
		eachIRQ(r, func(i int) { d.data.MaskVectors(i, 1, ioq.MaskClient, action == vfiouser.IRQSetMask) })
	}
}

// setPin is SetIRQs for INTx, which is masked when it fires (VFIO's AUTOMASKED).
func (d *device) setPin(r vfiouser.SetIRQs, action uint32, fds []int) {
	fd := -1
	if len(fds) > 0 {
		fd = fds[0]
	}
	switch {
	case r.DisableAll():
		d.data.SetPin(-1)
		d.setUnmask(-1)
	case action == vfiouser.IRQSetTrigger && r.Flags&vfiouser.IRQSetDataEventFD != 0:
		d.data.SetPin(fd)
	case r.Flags&vfiouser.IRQSetDataEventFD != 0:
		d.setUnmask(fd)
	case action == vfiouser.IRQSetTrigger:
		eachIRQ(r, func(int) { d.data.RaisePin() })
	case action == vfiouser.IRQSetMask:
		eachIRQ(r, func(int) { d.data.MaskPin() })
	default:
		eachIRQ(r, func(int) { d.checkPin(true) })
	}
}

func eachIRQ(r vfiouser.SetIRQs, f func(i int)) {
	for i := range r.Count {
		if r.Flags&vfiouser.IRQSetDataBool == 0 || r.Bools[i] != 0 {
			f(int(r.Start + i))
		}
	}
}

// setUnmask takes the eventfd by which the client unmasks the pin, -1 for none.
func (d *device) setUnmask(fd int) {
	s := d.session
	old := s.unmaskFD
	s.unmaskFD = fd
	if old < 0 && fd < 0 {
		return
	}
	s.home.Call(func() {
		if old >= 0 {
			s.home.Remove(old)
		}
		if fd >= 0 {
			if err := s.home.AddEdge(fd, unmasked{s}); err != nil {
				s.log.Warn("the client's eventfd for unmasking INTx", "error", err)
			}
		}
	})
	if old >= 0 {
		unix.Close(old)
	}
}

// unmasked is that eventfd. It is never read, which could block (R34): each write to it is an edge.
type unmasked struct{ s *session }

func (u unmasked) Ready(uint32) {
	u.s.unmask.Store(true)
	u.s.wake()
}

// interruptsChanged finds out whether the function interrupts by its pin. It is called when the PCI registers or
// the client's eventfds for it have changed.
func (d *device) interruptsChanged() {
	d.data.MaskVectors(0, int(d.cfg.Vectors()), ioq.MaskFunction, d.cfg.MSIXMasked())
	// A client that gives MSI-X eventfds need not write to the capability.
	d.data.UsePin(!d.cfg.MSIXEnabled() && !d.cfg.INTxDisabled() && !d.data.AnyVector())
	d.checkPin(false)
}

// checkPin looks at the pin's level, and raises it if it stands.
func (d *device) checkPin(unmask bool) { d.data.CheckPin(d.ctl.AdminUnconsumed(), unmask) }

// pinLater is called by any thread to have the pin raised for what is still there after a while.
func (s *session) pinLater(rung uint32, after time.Duration) {
	time.AfterFunc(after, func() {
		s.overdue.Store(overdueBit | uint64(rung))
		s.wake()
	})
}

const overdueBit = 1 << 32

// interruptStatus is the level, which the PCI status register shows also when INTx is disabled.
func (d *device) interruptStatus() bool {
	return !d.cfg.MSIXEnabled() && !d.data.AnyVector() && d.data.PinLevel(d.ctl.AdminUnconsumed())
}

// configChanged does what a write to the configuration space asks for.
func (d *device) configChanged(ev pci.Events) {
	if ev.FLR {
		d.reset()
		return
	}
	if ev.Command || ev.Power {
		d.power()
	}
	if ev.Command || ev.MSIX {
		d.interruptsChanged()
	}
}

// power holds the controller while it must not touch guest memory: in D3hot, and when the driver has taken bus mastering away,
// as Linux does before kexec. A client that has never switched it on is none of Linux's kind, and is served.
func (d *device) power() {
	master := d.cfg.BusMaster()
	d.masterLost = !master && (d.master || d.masterLost)
	d.master = master
	d.asleep.Store(d.cfg.D3hot())
	hold := d.masterLost || d.cfg.D3hot()
	if hold != d.held {
		d.held = hold
		d.data.Hold(hold)
		d.ctl.Hold(hold)
	}
}
