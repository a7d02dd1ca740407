package lane

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// again is a job that can be sent once more.
type again struct {
	job
	sent   int
	unwant bool
}

func (j *again) Next(slot uint16, cmd *nvme.Command) (Sink, error) {
	if sink, err := j.job.Next(slot, cmd); sink == nil {
		return nil, err
	}
	return j, nil
}

func (j *again) Again(_ uint16, cmd *nvme.Command) (bool, error) {
	j.sent++
	cmd.CDW10 = j.id
	return !j.unwant, nil
}

// renew gives a paused lane an empty queue that nobody serves.
func renew(t *testing.T, b *bench) {
	t.Helper()
	quiet := func(uint32) error { return nil }
	if err := b.Renew(dbbuf.NewMMIO(quiet), dbbuf.NewMMIO(quiet)); err != nil {
		t.Fatal(err)
	}
}

func TestPausedLaneDoesNothing(t *testing.T) {
	b := newBench(t, setup{size: 64, timeout: time.Millisecond})
	b.Pause()
	w := NewWaiter()
	if n, err := b.Start(&job{w: w, left: 1}, w); n != 0 || err != nil {
		t.Errorf("Start: %d, %v", n, err)
	}
	if n, err := b.StartPrivate(&job{w: w, left: 1}, nil); n != 0 || err != nil {
		t.Errorf("StartPrivate: %d, %v", n, err)
	}
	short, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
	defer cancel()
	if err := b.Wait(short, w); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
	if b.Rescue() || len(b.Late()) != 0 || b.Overdue() != nil {
		t.Error("busy, or late")
	}
	b.Private()
	if n, err := b.Start(&job{w: w, left: 1}, w); n != 0 || err != nil {
		t.Errorf("Start: %d, %v", n, err)
	}
	j := &job{w: NewWaiter(), left: 1}
	if n, err := b.StartPrivate(j, j.w); n != 1 || err != nil {
		t.Errorf("StartPrivate: %d, %v", n, err)
	}
	if err := j.run(context.Background(), b.Lane); err != nil {
		t.Error(err)
	}
	b.Resume()
	if err := b.Wait(context.Background(), w); err != nil { // for the room that it was promised
		t.Error(err)
	}
}

func TestLostCommandsEndOnlyWhenTheyAreLost(t *testing.T) {
	b := newBench(t, setup{size: 64, timeout: 5 * time.Millisecond})
	b.mute.Store(true)
	late, fresh, event := &job{w: NewWaiter(), id: 1, left: 1}, &job{w: NewWaiter(), id: 2, left: 1}, &job{w: NewWaiter(), id: 3, left: 1}
	if n, err := b.Start(late, late.w); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := b.StartForever(event); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	time.Sleep(10 * time.Millisecond)
	if len(b.Late()) != 1 {
		t.Fatal("not late")
	}
	if n, err := b.Start(fresh, fresh.w); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	b.Pause()
	if late.flying != 1 || fresh.flying != 1 {
		t.Fatal("Pause ended commands whose memory the device can write")
	}
	cause := errors.New("the cause")
	b.Lose(cause, true) // none of them can be sent again
	for _, j := range []*job{late, fresh, event} {
		if j.flying != 0 || !errors.Is(j.err, queue.ErrReset) || !errors.Is(j.err, cause) || errors.Is(j.err, queue.ErrTimeout) != (j == late) {
			t.Errorf("job %d: %d left, %v", j.id, j.flying, j.err)
		}
	}
	renew(t, b)
	b.Resume()
	if b.Rescue() {
		t.Error("still busy")
	}
}

func TestReplayedCommandIsSentOnce(t *testing.T) {
	b := newBench(t, setup{size: 64})
	b.mute.Store(true)
	wanted := &again{job: job{w: NewWaiter(), id: 1, left: 1}}
	unwanted := &again{job: job{w: NewWaiter(), id: 2, left: 1}, unwant: true}
	for _, j := range []*again{wanted, unwanted} {
		if n, err := b.Start(j, j.w); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	reset := func() {
		b.Pause()
		b.Lose(errors.New("the cause"), true)
		b.Lose(errors.New("another attempt"), true)
		renew(t, b)
		b.Resume()
	}
	reset()
	if wanted.flying != 1 || wanted.sent != 1 || unwanted.flying != 0 || unwanted.err == nil {
		t.Fatalf("%d left, sent %d times; %d left of the other, %v", wanted.flying, wanted.sent, unwanted.flying, unwanted.err)
	}
	reset()
	if wanted.flying != 0 || wanted.sent != 1 || !errors.Is(wanted.err, queue.ErrReset) {
		t.Fatalf("%d left, sent %d times, %v", wanted.flying, wanted.sent, wanted.err)
	}
}

// TestClosedBeforeReplay keeps a command for a Resume that never comes.
func TestClosedBeforeReplay(t *testing.T) {
	b := newBench(t, setup{size: 64})
	b.mute.Store(true)
	j := &again{job: job{w: NewWaiter(), id: 1, left: 1}}
	if n, err := b.Start(j, j.w); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	b.Pause()
	b.Lose(errors.New("the cause"), true)
	b.Close()
	b.Resume()
	if j.flying != 1 || j.sent != 0 {
		t.Fatalf("%d left, sent %d times", j.flying, j.sent)
	}
	b.Drop()
	if j.flying != 0 || !errors.Is(j.err, ErrClosed) {
		t.Fatalf("%d left, %v", j.flying, j.err)
	}
}
