package guestdrv_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// TestFatalErrorUnderPair is found long before the pair's command is late.
func TestFatalErrorUnderPair(t *testing.T) {
	for _, poll := range []bool{false, true} {
		m := newMoody(nvmetest.Config{})
		o := testOptions()
		o.Timeout = time.Minute
		c := openInProc(t, m.cfg, o)
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: poll})
		if err != nil {
			t.Fatal(err)
		}
		m.drop.Store(1)
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
			t.Fatal(err)
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the device has fetched it", func() bool { return m.drop.Load() == 0 })
		c.dev.Fault()
		err = p.Wait(ctx)
		mustMention(t, err, guestdrv.ErrReset, "CFS")
		mustMention(t, err, guestdrv.ErrFatal)
		p.Close()
		if err := pairOnce(c.Controller); err != nil {
			t.Error(err)
		}
	}
}

// TestLateCommandOfPairIsAborted ends it with the status of an aborted command; pair and controller live on. The deadline is a whole number of
// seconds, at which a pair also has the controller looked at: that once swallowed what it told of its late command, and cost a reset.
func TestLateCommandOfPairIsAborted(t *testing.T) {
	t.Parallel()
	for _, poll := range []bool{false, true} {
		t.Run(fmt.Sprintf("poll=%v", poll), func(t *testing.T) {
			t.Parallel()
			m := newMoody(nvmetest.Config{})
			o := quickOptions()
			o.Timeout = 4 * time.Second
			c := openInProc(t, m.cfg, o)
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: poll})
			if err != nil {
				t.Fatal(err)
			}
			m.hold.Store(true)
			const late = 2
			for i := range late {
				if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1, Tag: uint64(i)}}); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(p.Publish(), p.Wait(ctx)); err != nil {
					t.Fatal(err)
				}
				var r [1]guestdrv.Result
				if n, err := p.Reap(r[:]); n != 1 || err != nil || r[0].Tag != uint64(i) || r[0].Status.Code() != nvme.StatusAbortRequested {
					t.Fatalf("%d, %v, %+v", n, err, r[0])
				}
			}
			p.Close()
			if s := c.Stats(); s.Resets != 0 || s.Aborts != late || s.Timeouts != late {
				t.Errorf("%d resets, %d aborts, %d timeouts", s.Resets, s.Aborts, s.Timeouts)
			}
		})
	}
}

// TestAdminCommandWithLongDeadline is a Format: it may take longer than other commands, if its caller says so.
func TestAdminCommandWithLongDeadline(t *testing.T) {
	t.Parallel()
	m := newMoody(nvmetest.Config{})
	inner := m.cfg.Command
	m.cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid == 0 && cmd.Opcode == nvme.AdminFormatNVM {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return inner(qid, cmd)
	}
	o := quickOptions()
	c := openInProc(t, m.cfg, o)
	long, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	go func() {
		for c.dev.Held() == 0 {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(2 * o.Timeout)
		c.dev.Release()
	}()
	_, err := c.Admin(long, &nvme.Command{Opcode: nvme.AdminFormatNVM, NSID: 1}, nil)
	if nvme.StatusOf(err).Code() != nvme.StatusInvalidOpcode { // the device does not know it, but takes its time to say so
		t.Errorf("got %v", err)
	}
	if n := c.Stats().Resets; n != 0 {
		t.Errorf("%d resets", n)
	}
	_, err = c.Admin(ctx, &nvme.Command{Opcode: nvme.AdminFormatNVM, NSID: 1}, nil)
	mustMention(t, err, guestdrv.ErrReset, "FORMAT NVM", "timed out")
}

// TestCompletionFromBeforeResetMatchesNothing is a device that remembers a command over a reset and completes it afterwards: nobody else's
// command may end by that.
func TestCompletionFromBeforeResetMatchesNothing(t *testing.T) {
	var old, now atomic.Uint32 // SQ identifier and command identifier, and 1 << 31
	m := newMoody(nvmetest.Config{})
	inner := m.cfg.Command
	m.cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		v := inner(qid, cmd)
		if qid != 0 {
			seen := 1<<31 | uint32(qid)<<16 | uint32(cmd.CID)
			if v.Action == nvmetest.Drop {
				old.Store(seen)
			} else {
				now.Store(seen)
			}
		}
		return v
	}
	o := testOptions()
	o.Queues = 1
	c := openInProc(t, m.cfg, o)
	ns := namespace(t, c, 1)
	done := make(chan error)
	read := func() {
		_, err := ns.ReadAt(make([]byte, 512), 0)
		done <- err
	}
	m.drop.Store(1)
	go read()
	eventually(t, "the device has fetched it", func() bool { return old.Load() != 0 })
	c.ForceReset(errors.New("the test wants it"))
	if err := <-done; !errors.Is(err, guestdrv.ErrReset) {
		t.Fatal(err)
	}
	m.hold.Store(true)
	go read()
	for c.dev.Held() == 0 {
		time.Sleep(time.Millisecond)
	}
	if old.Load() == now.Load() {
		t.Fatalf("the command after the reset has the identifier of that before: %#x", old.Load())
	}
	qid := uint16(old.Load() >> 16 & 0xFF)
	c.dev.PostRaw(qid, ring.MakeEntry(0, 0, qid, uint16(old.Load()), nvme.StatusSuccess))
	if err := <-done; !errors.Is(err, guestdrv.ErrProtocol) {
		t.Errorf("got %v", err)
	}
	if !errors.Is(c.Err(), guestdrv.ErrProtocol) {
		t.Errorf("the controller: %v", c.Err())
	}
}

// TestPairAfterResetBeginsElsewhere makes a pair anew: its first command has another identifier than that of the pair before.
func TestPairAfterResetBeginsElsewhere(t *testing.T) {
	var mu sync.Mutex
	seen := map[uint32]int{}
	m := newMoody(nvmetest.Config{})
	m.cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 {
			mu.Lock()
			seen[uint32(qid)<<16|uint32(cmd.CID)]++
			mu.Unlock()
		}
		return nvmetest.Verdict{}
	}
	c := openInProc(t, m.cfg, testOptions())
	for i := range 3 {
		if err := pairOnce(c.Controller); err != nil {
			t.Fatal(err)
		}
		if err := c.ResetByForce(errors.New("the test wants it")); err != nil || c.Stats().Resets != uint64(i+1) {
			t.Errorf("%v, %d resets", err, c.Stats().Resets)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 3 {
		t.Errorf("queue and command identifiers: %x", seen)
	}
}

// TestOpenKeepsCommandDeadlines opens a device that loses an admin command, with a context that could wait for much longer.
func TestOpenKeepsCommandDeadlines(t *testing.T) {
	t.Parallel()
	m := newMoody(nvmetest.Config{})
	m.mute.Store(true)
	dev := nvmetest.New(m.cfg)
	defer dev.Close()
	long, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	begin := time.Now()
	_, err := guestdrv.OpenDevice(long, dev.InProc(), quickOptions())
	if err == nil {
		t.Fatal("opened")
	}
	mustMention(t, err, guestdrv.ErrTimeout, "IDENTIFY")
	if d := time.Since(begin); d > patience {
		t.Errorf("took %v", d)
	}
}

// TestAbortsKeepToACL makes many commands late at once on a controller that takes one Abort at a time (ACL 0).
func TestAbortsKeepToACL(t *testing.T) {
	t.Parallel()
	var flying, most, aborts atomic.Int64
	m := newMoody(nvmetest.Config{})
	inner := m.cfg.Command
	m.cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid == 0 && cmd.Opcode == nvme.AdminAbort {
			aborts.Add(1)
			most.Store(max(most.Load(), flying.Add(1)))
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return inner(qid, cmd)
	}
	o, log := withLog(quickOptions())
	o.Queues = 1
	o.Timeout = 4 * time.Second
	c := openInProc(t, m.cfg, o)
	ns := namespace(t, c, 1)
	m.hold.Store(true)
	const readers = 8
	done := make(chan error)
	for i := range readers {
		go func() {
			_, err := ns.ReadAt(make([]byte, 512), int64(i)*512)
			done <- err
		}()
	}
	for range readers {
		for ended := false; !ended; {
			select {
			case err := <-done:
				ended = true
				if !errors.Is(err, guestdrv.ErrTimeout) && !errors.Is(err, guestdrv.ErrReset) { // reset only if this machine is slow
					t.Error(err)
				}
			case <-time.After(2 * time.Millisecond):
				if flying.Load() > 0 { // answer the Abort that waits; it ends its command
					flying.Add(-1)
					c.dev.ReleaseAdmin()
				}
			}
		}
	}
	if most.Load() != 1 || aborts.Load() == 0 {
		t.Errorf("%d Aborts, %d at one time", aborts.Load(), most.Load())
	}
	mustMention(t, errors.New(log.String()), nil, "commands are late, aborting them")
}
