package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Reservation commands. Package subsys does what they ask for, at once; where somebody has to wait for the rest (a save, the end of
// others' commands), that is another goroutine, and the command is held back until it is done, with no memory translated.

// reserving is a command that is held back until it is complete.
type reserving struct {
	over bool
	st   nvme.Status
}

// reserve runs Reservation Register, Acquire and Release.
func (w *Worker) reserve(r *request) nvme.Status {
	n := r.ns.of
	if !n.Reservable() || r.sq.g.ctl.cfg.Self == nil {
		return nvme.StatusInvalidOpcode.WithDNR()
	}
	q := &subsys.ReservationRequest{Command: r.cmd, Host: r.sq.g.ctl.host()}
	if st := w.take16(r, q.Keys.Bytes()); st != nvme.StatusSuccess {
		return st
	}
	st, later := n.Reserve(q)
	if later == nil {
		return st
	}
	p := &reserving{}
	r.reserving = p
	w.hold(r)
	r.sq.g.ctl.cfg.Self.Subsystem().Go(func() {
		st := later()
		w.post(func() {
			p.over, p.st = true, st
			w.reserved(r, p)
		})
	})
	return waits
}

// reserved completes r, unless it has ended with its queue, and was reused perhaps. What is paused is completed when it is resumed.
func (w *Worker) reserved(r *request, p *reserving) {
	if r.reserving != p || !r.sq.g.begins() {
		return
	}
	w.unhold(func(x *request) bool { return x == r })
	w.begin(r)
	w.postAll()
}

// goesOn deals with a command of reserve that retryHeld or reserved begins again.
func (w *Worker) goesOn(r *request) {
	if p := r.reserving; p.over {
		w.complete(r, p.st)
	} else {
		w.hold(r)
	}
}

// take16 reads the keys, which every one of the commands has room for; Release has but the first.
func (w *Worker) take16(r *request, keys *[16]byte) nvme.Status {
	r.Len = 16
	if r.cmd.Opcode == nvme.IOReservationRelease {
		r.Len = 8
	}
	st := w.translate(r, false)
	if st == nvme.StatusSuccess {
		left := keys[:r.Len]
		for _, s := range r.Vec {
			left = left[copy(left, bytesOf(s)):]
		}
	}
	r.Vec = nil
	return st
}

// report runs Reservation Report. NVMe Base 2.0c 7.2.
func (w *Worker) report(r *request) nvme.Status {
	n, host := r.ns.of, r.sq.g.ctl.host()
	switch {
	case !n.Reservable() || r.sq.g.ctl.cfg.Self == nil:
		return nvme.StatusInvalidOpcode.WithDNR()
	case host.Anon == 0 && host.Extended != r.cmd.ExtendedData():
		return nvme.StatusHostIDInconsistent.WithDNR()
	}
	r.Len = r.cmd.ReportBytes()
	if st := w.translate(r, true); st != nvme.StatusSuccess {
		return st
	}
	data := n.Report().Encode(r.cmd.ExtendedData())
	for _, s := range r.Vec {
		b := bytesOf(s)
		k := copy(b, data)
		clear(b[k:])
		data = data[k:]
	}
	r.Vec = nil
	return nvme.StatusSuccess
}
