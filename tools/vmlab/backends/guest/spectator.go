package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// spectator is a guest that uses all its namespaces, writing and reading back, and says in lines of JSON what it hears of the controller and what becomes
// of each namespace:
//
//	controller event                the completion of an Asynchronous Event Request (guestdrv's own line)
//	controller has changed namespaces   what the Changed Namespace List then said (guestdrv's too)
//	using, failed                   a namespace is used; it is not any more, and by which error, of a command that took so long
//	changed                         what guestdrv made of the event, and what Identify says then
//	late                            how a Read ended that was in the queue already when the namespace went
//	end used                        the last bytes of one that has grown were written and read
//	commands                        what each namespace has done so far
type spectator struct {
	log     hclog.Logger
	ctx     context.Context
	c       *guestdrv.Controller
	changes chan guestdrv.Change
	running sync.WaitGroup
	uses    map[uint32]*use
}

// use is one namespace in use.
type use struct {
	ns   *guestdrv.Namespace
	pair *guestdrv.QueuePair // with a Read that is not published
	buf  *guestdrv.Buffer
	done atomic.Uint64 // writes that were read back; all workers
}

const (
	spectatorWorkers = 2
	spectatorBytes   = 32 << 10
	// A moment between two of a worker's turns leaves emulated CPUs to the others.
	spectatorPause = 2 * time.Millisecond
	// Whatever becomes of a namespace, hostmed ends its commands: the guest's own deadline is not what does.
	spectatorTimeout = 5 * time.Minute
)

// spectate does that with device until SIGTERM.
func spectate(device string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	s := &spectator{
		ctx: ctx, changes: make(chan guestdrv.Change, 16), uses: map[uint32]*use{},
		log: hclog.New(&hclog.LoggerOptions{Output: os.Stdout, JSONFormat: true, Level: hclog.Info}),
	}
	var err error
	s.c, err = guestdrv.Open(ctx, device, guestdrv.Options{Logger: s.log, Timeout: spectatorTimeout, OnChange: func(c guestdrv.Change) {
		select {
		case s.changes <- c:
		case <-ctx.Done():
		}
	}})
	if err != nil {
		return err
	}
	defer func() {
		s.running.Wait()
		s.c.Close()
	}()
	for _, ns := range s.c.Namespaces() {
		if err := s.use(ns); err != nil {
			return err
		}
	}
	for {
		select {
		case c := <-s.changes:
			if err := s.changed(c); err != nil {
				return err
			}
		case <-ctx.Done():
			s.commands()
			return nil
		}
	}
}

// use begins to use a namespace.
func (s *spectator) use(ns *guestdrv.Namespace) (err error) {
	u := &use{ns: ns}
	if u.pair, err = s.c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 2}); err != nil {
		return err
	}
	if u.buf, err = s.c.Alloc(ns.BlockSize()); err != nil {
		return err
	}
	if _, err := u.pair.Submit([]guestdrv.IO{{Op: nvme.IORead, NSID: ns.NSID(), Blocks: 1, IOVA: u.buf.IOVA()}}); err != nil {
		return err
	}
	s.uses[ns.NSID()] = u
	for i := range spectatorWorkers {
		s.running.Go(func() { s.work(u, int64(i)*spectatorBytes) })
	}
	s.log.Info("using", "nsid", ns.NSID(), "size", ns.Size())
	return nil
}

// work writes and reads back the bytes at off until that fails.
func (s *spectator) work(u *use, off int64) {
	for n := uint64(1); s.ctx.Err() == nil; n++ {
		begin := time.Now()
		if err := u.writeAndRead(n, off); err != nil {
			s.log.Info("failed", "nsid", u.ns.NSID(), "error", err.Error(), "ms", time.Since(begin).Milliseconds())
			return
		}
		u.done.Add(1)
		time.Sleep(spectatorPause)
	}
}

var errWrong = errors.New("what is read is not what was written")

// writeAndRead writes bytes that tell the offset and n, and reads them back.
func (u *use) writeAndRead(n uint64, off int64) error {
	in, out := make([]byte, spectatorBytes), make([]byte, spectatorBytes)
	for i := 0; i < len(out); i += 8 {
		binary.LittleEndian.PutUint64(out[i:], n*uint64(off+int64(i)+1))
	}
	if _, err := u.ns.WriteAt(out, off); err != nil {
		return err
	}
	if _, err := u.ns.ReadAt(in, off); err != nil {
		return err
	}
	if !bytes.Equal(in, out) {
		return errWrong
	}
	return nil
}

// changed says what a change is and what the controller says of it, and goes on with what there is now.
func (s *spectator) changed(c guestdrv.Change) error {
	nsid := c.NSID
	status, id, err := s.identify(nsid)
	if err != nil {
		return err
	}
	s.log.Info("changed", "nsid", nsid, "kind", c.Kind.String(), "size", c.Namespace.Size(), "identify", uint16(status.Code()), "zeroes", *id == nvme.IdentifyNamespace{})
	switch u := s.uses[nsid]; c.Kind {
	case guestdrv.Vanished:
		status, err := s.late(u)
		if err != nil {
			return err
		}
		s.log.Info("late", "nsid", nsid, "status", uint16(status.Code()), "text", status.String())
		delete(s.uses, nsid)
	case guestdrv.Appeared:
		if err := s.use(c.Namespace); err != nil {
			return err
		}
	case guestdrv.Resized: // the last bytes are used too
		off := c.Namespace.Size() - spectatorBytes
		if err := u.writeAndRead(1, off); err != nil {
			return err
		}
		s.log.Info("end used", "nsid", nsid, "offset", off)
	}
	s.commands()
	return nil
}

// identify asks what a namespace is, by CNS 00h.
func (s *spectator) identify(nsid uint32) (nvme.Status, *nvme.IdentifyNamespace, error) {
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSNamespace, nsid, 0)
	id := new(nvme.IdentifyNamespace)
	var refused *guestdrv.StatusError
	_, err := s.c.Admin(context.Background(), &cmd, id.Bytes()[:])
	if errors.As(err, &refused) {
		return refused.Status, id, nil
	}
	return 0, id, err
}

// late has the controller see the Read that it had not seen yet.
func (s *spectator) late(u *use) (nvme.Status, error) {
	defer u.pair.Close()
	if err := u.pair.Publish(); err != nil {
		return 0, err
	}
	var out [1]guestdrv.Result
	for {
		if n, err := u.pair.Reap(out[:]); n == 1 || err != nil {
			return out[0].Status, err
		}
		if err := u.pair.Wait(s.ctx); err != nil {
			return 0, err
		}
	}
}

// commands says what has been done.
func (s *spectator) commands() {
	st := s.c.Stats()
	for nsid, u := range s.uses {
		s.log.Info("commands", "nsid", nsid, "done", u.done.Load(), "timeouts", st.Timeouts, "aborts", st.Aborts, "resets", st.Resets)
	}
}
