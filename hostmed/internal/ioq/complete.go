package ioq

import (
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/broken"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// complete ends r.
func (w *Worker) complete(r *request, st nvme.Status) {
	if w.trace != nil {
		w.trace.completed(r, st)
	}
	w.stage(r, st)
}

// stage stages the completion of r and gives r back.
func (w *Worker) stage(r *request, st nvme.Status) {
	g := r.sq.g
	dw0 := uint64(0)
	if r.step == native {
		dw0 = uint64(r.DW0)
	}
	if st == nvme.StatusSuccess {
		g.stats.count(r)
	} else {
		if st.Code() == nvme.StatusAbortSQDeleted && g.ctl.stopping.Load() {
			w.give(r) // given up for a reset, it ends without a word: a driver that is told might take that for an answer
			return
		}
		if st = w.failed(r, st); r.step == copying && r.cmd.Opcode == nvme.IOCopy {
			dw0 = r.notCopied()
		}
	}
	if g.state != Failed {
		if len(g.staged) == 0 {
			w.touched = append(w.touched, g)
		}
		g.staged = append(g.staged, ring.MakeEntry(dw0, r.sq.cons.Head(), r.sq.qid, r.cmd.CID, st))
	}
	w.give(r)
}

// postAll posts what has been staged.
func (w *Worker) postAll() {
	for n := len(w.touched) - 1; n >= 0; n = len(w.touched) - 1 {
		g := w.touched[n]
		w.touched = w.touched[:n]
		if len(g.staged) > 0 {
			w.postGroup(g)
		}
	}
}

// postGroup posts g's completions as one batch and decides once about the interrupt.
func (w *Worker) postGroup(g *group) {
	if g.state == Parked || g.mute { // commands that a gate held back, and that end with their SQ, or that ended late
		return
	}
	w.current = g
	n := uint32(len(g.staged))
	if w.extra {
		w.postExtra(g)
	} else {
		g.prod.Post(g.staged)
	}
	g.posted += uint64(n)
	g.postedAt = w.now
	g.unraised += n
	g.staged = g.staged[:0]
	if !g.ien {
		return
	}
	w.interrupt(g, n)
	if w.cost.on {
		w.cost.charge(&g.stats.Costs.Interrupt, int(n))
	}
}

// interrupt raises the interrupt for n completions of g, or finds that it need not be.
func (w *Worker) interrupt(g *group, n uint32) {
	if broken.On(broken.NoInterrupt) {
		return
	}
	if g.ctl.quiet.Load() && g.head.Quiet() {
		g.unraised = 0
		return
	}
	if entries, delay := g.ctl.coalescing.get(); delay > 0 && !g.vector.direct.Load() && !w.gather(g, n, entries, delay) {
		g.unraised = 0 // it is the vector's wait now, which another CQ may end
		return
	}
	g.stats.Interrupts++
	g.unraised = 0
	if !g.vector.fire() {
		w.raisePin(g)
	}
}

// Stats counts what a worker or a controller has done. Bytes are of successful commands.
type Stats struct {
	Reads, Writes, Others   uint64
	BytesRead, BytesWritten uint64
	Errors                  uint64
	MediaErrors             uint64 // of those, what the medium could not do
	Native, Emulated        uint64 // commands beyond read, write, flush and write zeroes: those that the medium did itself, and those that hostmed did
	Interrupts              uint64
	SQDoorbells             uint64 // that came as messages, each a VM exit in a guest; queue 0's not counted
	CQDoorbells             uint64
	Throttled               uint64        // commands that limits held back
	ThrottledFor            time.Duration // the sum of how long
	Busy                    time.Duration // with a command outstanding, as far as the worker looked at its clock
	Costs                   Costs         // of samples
}

// MMIO is how many doorbell writes an I/O command cost its driver; 0 before the first.
func (s Stats) MMIO() float64 {
	n := s.Reads + s.Writes + s.Others + s.Errors
	if n == 0 {
		return 0
	}
	return float64(s.SQDoorbells+s.CQDoorbells) / float64(n)
}

func (s *Stats) count(r *request) {
	switch r.cmd.Opcode {
	case nvme.IORead:
		s.Reads++
		s.BytesRead += r.Len
	case nvme.IOWrite:
		s.Writes++
		s.BytesWritten += r.Len
	case nvme.IOCompare:
		s.Reads++
		s.BytesRead += r.end
		s.countWho(r)
	case nvme.IOVerify: // data units, but no host command
		s.Others++
		s.BytesRead += r.end
		s.countWho(r)
	default:
		s.Others++
		s.countWho(r)
	}
}

// countWho counts who has done r, where that is not always the medium.
func (s *Stats) countWho(r *request) {
	if r.step == native {
		s.Native++
		return
	}
	switch r.cmd.Opcode {
	case nvme.IOCompare, nvme.IOVerify, nvme.IODSM, nvme.IOCopy, nvme.IOWriteUncorrectable:
		s.Emulated++
	}
}

func (s *Stats) add(o Stats) {
	s.Reads += o.Reads
	s.Writes += o.Writes
	s.Others += o.Others
	s.BytesRead += o.BytesRead
	s.BytesWritten += o.BytesWritten
	s.Errors += o.Errors
	s.MediaErrors += o.MediaErrors
	s.Native += o.Native
	s.Emulated += o.Emulated
	s.Interrupts += o.Interrupts
	s.Throttled += o.Throttled
	s.ThrottledFor += o.ThrottledFor
	s.SQDoorbells += o.SQDoorbells
	s.CQDoorbells += o.CQDoorbells
	s.Costs.add(o.Costs)
}
