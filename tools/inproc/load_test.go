package inproc_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	loadSize = 4096      // bytes of each command
	loadArea = 1 << 20   // each worker's, of which it uses some blocks
	loadUsed = 16 * 4096 // of its area

	// pause is between two commands of a worker, which leaves the machine to the other rows: a fault is waited for, and this does not hurry it.
	pause = time.Millisecond
)

// load is a driver at work: goroutines that write, read back and verify, and one with a queue pair that reads. Errors are noted, with how long
// the call took; what is read after a write that succeeded has to be what was written, whatever happened in between.
type load struct {
	t     *testing.T
	c     *guestdrv.Controller
	quit  atomic.Bool
	good  atomic.Uint64 // commands that succeeded
	wg    sync.WaitGroup
	mu    sync.Mutex
	notes []note
}

type note struct {
	what string
	err  error
	took time.Duration
}

func (n note) String() string { return fmt.Sprintf("%s: %v (%v)", n.what, n.err, n.took) }

// startLoad begins n writers, and a pair if the controller has one to spare.
func startLoad(t *testing.T, c *guestdrv.Controller, n int) *load {
	t.Helper()
	l := &load{t: t, c: c}
	ns := namespace(t, c, 1)
	for i := range n {
		l.wg.Go(func() { l.writer(ns, i) })
	}
	l.wg.Go(l.pair)
	return l
}

// run notes how f ended, and reports whether the worker is to go on.
func (l *load) run(what string, f func() error) (ok, on bool) {
	begin := time.Now()
	err := f()
	if err == nil {
		l.good.Add(1)
		return true, true
	}
	l.mu.Lock()
	l.notes = append(l.notes, note{what, err, time.Since(begin)})
	l.mu.Unlock()
	return false, l.c.Err() == nil
}

func (l *load) writer(ns *guestdrv.Namespace, id int) {
	got := make([]byte, loadSize)
	written := map[int64][]byte{} // nil: not known
	for i := 0; !l.quit.Load(); i++ {
		off := int64(id*loadArea + i*loadSize%loadUsed)
		data := randomBytes(uint64(id)<<12|uint64(i%4096), loadSize)
		written[off] = nil
		ok, on := l.run("write", func() error { _, err := ns.WriteAt(data, off); return err })
		if ok {
			written[off] = data
		}
		if !on {
			return
		}
		back := int64(id*loadArea + (i*7)%16*loadSize) // also what was written before the last fault
		ok, on = l.run("read", func() error { _, err := ns.ReadAt(got, back); return err })
		if want := written[back]; ok && want != nil && !bytes.Equal(got, want) {
			l.t.Errorf("worker %d: other data at %#x than was written there", id, back)
			return
		}
		if !on {
			return
		}
		time.Sleep(pause)
	}
}

// pair makes a queue pair, and another when a reset has ended it.
func (l *load) pair() {
	b, err := l.c.Alloc(loadSize)
	if err != nil {
		l.t.Error(err)
		return
	}
	defer b.Free()
	results := make([]guestdrv.Result, 1)
	for on := true; on && !l.quit.Load(); {
		var p *guestdrv.QueuePair
		var ok bool
		ok, on = l.run("pair", func() (err error) { p, err = l.c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 8}); return err })
		for ok && !l.quit.Load() {
			ok, on = l.run("pair read", func() error {
				io := []guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: loadSize >> 9, LBA: 40 << 11, IOVA: b.IOVA()}}
				_, err := p.Submit(io)
				if err == nil {
					err = p.Publish()
				}
				if err == nil {
					err = p.Wait(ctx)
				}
				if err == nil {
					_, err = p.Reap(results)
				}
				if err == nil && !results[0].Status.OK() {
					return &guestdrv.StatusError{Command: nvme.Command{Opcode: nvme.IORead}, Status: results[0].Status}
				}
				return err
			})
			time.Sleep(pause)
			var se *guestdrv.StatusError
			ok = ok || l.lastIs(&se) && on // a status ends the command and not the pair
		}
		if p != nil {
			if err := p.Close(); err != nil && l.c.Err() == nil {
				l.mu.Lock()
				l.notes = append(l.notes, note{"closing a pair", err, 0})
				l.mu.Unlock()
			}
		}
	}
}

// lastIs reports whether the pair's last error is a *guestdrv.StatusError.
func (l *load) lastIs(se **guestdrv.StatusError) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.notes) - 1; i >= 0; i-- {
		if l.notes[i].what == "pair read" {
			return errors.As(l.notes[i].err, se)
		}
	}
	return false
}

// noted returns a copy of the notes.
func (l *load) noted() []note {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]note(nil), l.notes...)
}

// until waits for cond, and fails the test if that takes too long.
func (l *load) until(what string, cond func() bool) bool {
	l.t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			l.t.Errorf("waited in vain for %s; notes: %v", what, l.noted())
			return false
		}
	}
	return true
}

// stop ends the load, and returns how long that took.
func (l *load) stop() time.Duration {
	begin := time.Now()
	l.quit.Store(true)
	l.wg.Wait()
	return time.Since(begin)
}
