package ioq

import (
	"sync"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// ErrorKind says what a driver did to make a queue fail.
type ErrorKind uint8

// What can be wrong with a queue.
const (
	BadSQTail   ErrorKind = iota // an SQ tail doorbell value that cannot be
	BadCQHead                    // a CQ head doorbell value that cannot be
	NoQueue                      // a doorbell of a queue that does not exist
	MemoryFault                  // guest memory was taken away under the queue, without a word
)

func (k ErrorKind) String() string {
	return [...]string{"invalid SQ tail", "invalid CQ head", "doorbell of no queue", "guest memory fault"}[k]
}

// Word is k in one word, as snapshots have it.
func (k ErrorKind) Word() string {
	return [...]string{"bad-sq-tail", "bad-cq-head", "no-queue", "memory-fault"}[k]
}

// QueueError is reported to the control side when a queue has failed.
type QueueError struct {
	QID  uint16
	Kind ErrorKind
	Err  error
	At   int64 // CLOCK_MONOTONIC, of whom it is reported to
}

// maxFailures is how many failed commands are kept for the error log, which has as many entries.
const maxFailures = 64

// failures are the newest commands of a controller that failed, until its error log takes them. However many a guest makes fail, they
// wake nobody and take no more room. The lock is taken by commands that fail only.
type failures struct {
	mu   sync.Mutex // guards the rest
	ring []ctrl.IOError
	n    uint64 // how many there were since the last take
}

func (f *failures) add(e ctrl.IOError) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.ring) < maxFailures {
		f.ring = append(f.ring, e)
	} else {
		f.ring[f.n%maxFailures] = e
	}
	f.n++
}

// TakeIOErrors returns the commands that failed since it was called last: how many, and the newest of them, oldest first.
func (c *Controller) TakeIOErrors() (newest []ctrl.IOError, n uint64) {
	f := &c.failures
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n == 0 {
		return nil, 0
	}
	newest, n = f.ring, f.n
	f.ring, f.n = nil, 0
	if first := n % maxFailures; n > maxFailures {
		newest = append(newest[first:len(newest):len(newest)], newest[:first]...)
	}
	return newest, n
}

// nowhere is the Location of what is no parameter's fault.
const nowhere = 0xffff

// failed counts and reports a command that is about to be completed with st, and returns the status to complete it with: it says
// that the error log has more.
func (w *Worker) failed(r *request, st nvme.Status) nvme.Status {
	g := r.sq.g
	g.stats.Errors++
	if c := st.Code(); c == nvme.StatusUnrecoveredRead || c == nvme.StatusWriteFault {
		g.stats.MediaErrors++
	}
	if w.log.IsDebug() {
		w.log.Debug("command failed", "sq", r.sq.qid, "command", r.cmd.Describe(false), "status", st.String())
	}
	st = st.WithMore()
	g.ctl.failures.add(ctrl.IOError{
		SQID: r.sq.qid, CID: r.cmd.CID, Status: st, Location: r.locate(st.Code()), NSID: r.cmd.NSID, LBA: r.lba(),
	})
	return st
}

// lba is the first block of what r was doing, 0 if that has none.
func (r *request) lba() uint64 {
	switch r.cmd.Opcode {
	case nvme.IOFlush:
		return 0
	case nvme.IODSM:
		if r.ns == nil {
			return 0
		}
		return r.Off >> r.ns.info.LBAShift
	}
	if r.cmd.Opcode >= firstVendor {
		return 0
	}
	return r.cmd.SLBA()
}

// locate returns the parameter of r's command that st is about.
func (r *request) locate(st nvme.Status) uint16 {
	c := &r.cmd
	const opcode, flags, nsid, dptr, cdw10, cdw12 = 0, 1, 4, 24, 40, 48
	switch st {
	case nvme.StatusInvalidOpcode:
		return opcode
	case nvme.StatusInvalidNamespace:
		return nsid
	case nvme.StatusLBAOutOfRange:
		return cdw10
	case nvme.StatusPRPOffsetInvalid, nvme.StatusDataTransferError, nvme.StatusSGLSegmentInvalid, nvme.StatusSGLCountInvalid,
		nvme.StatusSGLDataLengthInvalid, nvme.StatusSGLTypeInvalid:
		return dptr
	case nvme.StatusInvalidField:
		if c.PSDT() > nvme.PSDTSGLMPTR || c.FUSE() != nvme.FuseNormal {
			return flags
		}
		if r.ns == nil && c.Flags == 0 {
			return nsid
		}
		return cdw12
	case nvme.StatusCommandSizeLimit:
		return dptr
	}
	return nowhere
}
