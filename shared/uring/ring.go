package uring

import (
	"time"

	"golang.org/x/sys/unix"
)

// The way of an operation:
//
//	1. GetSQE, Prep…, UserData       nothing shared is touched but the entry itself
//	2. Submit                        publishes the tail; one io_uring_enter for all that was prepared
//	3. Reap                          a load of the CQ tail; an io_uring_enter only if the kernel asks for one

// GetSQE returns the next free entry, zeroed, or nil if the submission ring is full: then Submit
// makes room. An entry that was got is submitted by the next Submit, so it must be filled.
func (r *Ring) GetSQE() *SQE {
	// Pairs with the kernel's release of an entry it has consumed.
	if r.tail-r.sqHead.Load() >= r.sqEntries {
		return nil
	}
	s := r.slot(r.tail & r.sqMask)
	*s = SQE{}
	if r.sqShift == 7 {
		clear(r.Command(s)[16:])
	}
	r.tail++
	return s
}

// Space returns how many entries GetSQE can still give.
func (r *Ring) Space() int { return int(r.sqEntries - (r.tail - r.sqHead.Load())) }

// Pending returns how many entries are prepared and not yet taken by the kernel.
func (r *Ring) Pending() int { return int(r.tail - r.sqHead.Load()) }

// Entries returns the sizes of the submission and the completion ring.
func (r *Ring) Entries() (sq, cq int) { return int(r.sqEntries), int(r.cqEntries) }

// Submit hands what is prepared to the kernel, without waiting, and returns how many
// entries it took. An entry that the kernel finds wrong is taken and completes with its
// error. EAGAIN and EBUSY say that the kernel is short of memory or that completions must be
// reaped first: what was not taken stays, for the next Submit.
func (r *Ring) Submit() (int, error) { return r.enter(0) }

// SubmitAndWait is Submit, and waits until at least n completions can be reaped.
func (r *Ring) SubmitAndWait(n int) (int, error) { return r.enter(uint32(n)) }

// SubmitAndFetch is Submit in one call with what Reap does to have the kernel bring completions that it held back.
func (r *Ring) SubmitAndFetch() (int, error) {
	r.sqTail.Store(r.tail) // pairs with the kernel's acquire
	for {
		n, errno := enterNow(r.fd, r.tail-r.sqHead.Load(), enterGetEvents)
		switch errno {
		case 0:
			return n, nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// SubmitAndWaitFor is SubmitAndWait that ends after d at the latest, and when a signal comes, which are no errors. It needs
// FeatExtArg (5.11), and is for rings without SQPoll.
func (r *Ring) SubmitAndWaitFor(n int, d time.Duration) (int, error) {
	r.sqTail.Store(r.tail) // pairs with the kernel's acquire
	r.wait = timespec{sec: int64(d / time.Second), nsec: int64(d % time.Second)}
	taken, errno := enterTimed(r.fd, r.tail-r.sqHead.Load(), uint32(n), enterGetEvents, &r.wait)
	switch errno {
	case 0:
		return taken, nil
	case unix.ETIME, unix.EINTR:
		return 0, nil
	}
	return 0, errno
}

func (r *Ring) enter(wait uint32) (taken int, err error) {
	r.sqTail.Store(r.tail) // pairs with the kernel's acquire: the entries are visible before it
	for {
		todo := r.tail - r.sqHead.Load()
		var flags uint32
		if wait > 0 || r.polled {
			flags = enterGetEvents
		}
		if r.sqPoll {
			// The store of the tail above and this load are both sequentially consistent: either the
			// kernel's thread sees the tail before it sleeps or we see its flag.
			if r.sqFlags.Load()&sqNeedWakeup != 0 {
				flags |= enterSQWakeup
			}
		}
		if flags == 0 && (todo == 0 || r.sqPoll) {
			return taken + int(todo), nil
		}
		var n int
		var errno unix.Errno
		if wait > 0 {
			n, errno = enterWait(r.fd, todo, wait, flags)
		} else {
			n, errno = enterNow(r.fd, todo, flags)
		}
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return taken, errno
		}
		taken += n
		// A kernel without SUBMIT_ALL stops after an entry that it finds wrong.
		if uint32(n) >= todo || r.sqPoll {
			return taken, nil
		}
		if n == 0 {
			return taken, unix.EAGAIN
		}
	}
}

// Held reports whether the kernel has completions that Reap would have to enter it for.
func (r *Ring) Held() bool { return r.sqFlags.Load()&(sqCQOverflow|sqTaskrun) != 0 }

// Ready returns how many completions lie in the ring.
func (r *Ring) Ready() int { return int(r.cqTail.Load() - r.head) }

// Reap moves up to len(out) completions to out and returns how many. It enters the
// kernel, without waiting, only to fetch completions that did not fit into the ring or
// that the kernel left for the owner to finish (CoopTaskrun, DeferTaskrun, IOPoll).
func (r *Ring) Reap(out []CQE) int {
	n := r.reap(out)
	if n < len(out) && r.fetch() {
		n += r.reap(out[n:])
	}
	return n
}

func (r *Ring) reap(out []CQE) int {
	// Pairs with the kernel's release of the entries below the tail.
	n := min(r.cqTail.Load()-r.head, uint32(len(out)))
	if n == 0 {
		return 0
	}
	for i := range out[:n] {
		out[i] = r.cqes[(r.head+uint32(i))&r.cqMask]
	}
	r.head += n
	r.cqHead.Store(r.head) // pairs with the kernel's acquire: the entries have been read
	return int(n)
}

// ReapWide is Reap for a ring with CQE32.
func (r *Ring) ReapWide(out []WideCQE) int {
	n := r.reapWide(out)
	if n < len(out) && r.fetch() {
		n += r.reapWide(out[n:])
	}
	return n
}

func (r *Ring) reapWide(out []WideCQE) int {
	n := min(r.cqTail.Load()-r.head, uint32(len(out)))
	if n == 0 {
		return 0
	}
	for i := range out[:n] {
		out[i] = r.wide[(r.head+uint32(i))&r.cqMask]
	}
	r.head += n
	r.cqHead.Store(r.head)
	return int(n)
}

// fetch reports whether it made the kernel bring completions that it held back.
func (r *Ring) fetch() bool {
	if !r.Held() && !r.polled {
		return false
	}
	// EBUSY and EINTR mean "later"; the flag stays, and so does what is held.
	_, errno := enterNow(r.fd, 0, enterGetEvents)
	return errno == 0 || errno == unix.EINTR
}
