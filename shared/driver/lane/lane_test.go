package lane

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bench is a lane and its device, which answers in a goroutine of its own.
type bench struct {
	*Lane
	t      testing.TB
	sq     *ring.SQConsumer
	cq     *ring.CQProducer
	tail   *dbbuf.Poller
	head   *dbbuf.Poller
	fd     int // the device's end of the interrupt, -1: none
	quiet  bool
	mute   atomic.Bool // do not answer
	silent atomic.Bool // answer without interrupts
	kick   chan struct{}
	quit   chan struct{}
	ended  chan struct{}
	failed chan error
}

type setup struct {
	size    uint32
	noIRQ   bool
	quiet   bool
	timeout time.Duration
}

func newBench(t testing.TB, s setup) *bench {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{
		t: t, fd: -1, quiet: s.quiet, kick: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{}), failed: make(chan error, 1),
	}
	sqMem, cqMem, page := shm.NewHeap(int(s.size)*64), shm.NewHeap(int(s.size)*16), shm.NewHeap(8192)
	eiPage, err := page.View(4096, 4096)
	must(err)
	tailWord, headWord, err := dbbuf.Slots(page, 1, 0)
	must(err)
	tailEI, headEI, err := dbbuf.Slots(eiPage, 1, 0)
	must(err)
	bell := func(uint32) error {
		select {
		case b.kick <- struct{}{}:
		default:
		}
		return nil
	}
	head := dbbuf.NewShadow(headWord, headEI, bell)
	q, err := queue.New(queue.Config{
		QID: 1, Size: s.size, SQ: sqMem, CQ: cqMem, Tail: dbbuf.NewShadow(tailWord, tailEI, bell), Head: head, EventFD: -1,
	})
	must(err)
	driverFD := -1
	if !s.noIRQ {
		driverFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		must(err)
		b.fd, err = unix.FcntlInt(uintptr(driverFD), unix.F_DUPFD_CLOEXEC, 0)
		must(err)
	}
	b.Lane, err = New(Config{
		Queue: q, Head: head, QID: 1, EventFD: driverFD, Quiet: s.quiet, Timeout: s.timeout, Failed: func(err error) { b.failed <- err },
	})
	must(err)
	b.sq, err = ring.NewSQConsumer(sqMem, s.size)
	must(err)
	b.cq, err = ring.NewCQProducer(cqMem, s.size)
	must(err)
	b.tail, b.head = dbbuf.NewPoller(tailWord, tailEI, s.size), dbbuf.NewPoller(headWord, headEI, s.size)
	go b.device()
	t.Cleanup(func() {
		b.Lane.Close()
		close(b.quit)
		<-b.ended
		if b.fd >= 0 {
			unix.Close(b.fd)
		}
	})
	return b
}

// device polls for a while after each command, then arms and sleeps.
func (b *bench) device() {
	defer close(b.ended)
	for idle := 0; ; idle++ {
		if b.answer() {
			idle = 0
		}
		if idle < 50 {
			continue
		}
		if b.mute.Load() || b.tail.Arm(b.sq.Head()) {
			select {
			case <-b.kick:
			case <-b.quit:
				return
			}
		}
		idle = 0
	}
}

func (b *bench) answer() bool {
	if b.mute.Load() {
		return false
	}
	n, err := b.sq.Pending(b.tail.Load())
	if err != nil {
		b.t.Error(err)
	}
	if err := b.cq.Consumed(b.head.Load() &^ dbbuf.QuietBit); err != nil {
		b.t.Error(err)
	}
	for range n {
		var c nvme.Command
		b.sq.Fetch(&c)
		b.cq.Post([]ring.Entry{ring.MakeEntry(uint64(c.CDW10), b.sq.Head(), 1, c.CID, nvme.StatusSuccess)})
	}
	if n > 0 && b.fd >= 0 && !b.silent.Load() && !(b.quiet && b.head.Quiet()) {
		one := [8]byte{1}
		_, _ = unix.Write(b.fd, one[:])
	}
	return n > 0
}

// job is some commands of one goroutine.
type job struct {
	w      *Waiter
	id     uint32
	left   int
	flying int // guarded by the lane's lock
	err    error
}

func (j *job) Next(_ uint16, cmd *nvme.Command) (Sink, error) {
	if j.left == 0 {
		return nil, nil
	}
	j.left--
	j.flying++
	cmd.CDW10 = j.id
	return j, nil
}

func (j *job) String() string { return fmt.Sprintf("JOB %d", j.id) }

func (j *job) Complete(status nvme.Status, result uint32) {
	if result != j.id && status.OK() {
		j.err = fmt.Errorf("job %d got the result of %d", j.id, result)
	}
	if !status.OK() {
		j.err = status.Err()
	}
	j.flying--
	j.w.Signal()
}

func (j *job) Lost(err error) {
	j.err = err
	j.flying--
	j.w.Signal()
}

func (j *job) run(ctx context.Context, l *Lane) error {
	for {
		busy := 0
		if j.left > 0 {
			if _, err := l.Start(j, j.w); err != nil {
				return err
			}
		}
		l.With(func() { busy = j.flying })
		if busy == 0 && j.left == 0 {
			return j.err
		}
		if err := l.Wait(ctx, j.w); err != nil {
			return err
		}
	}
}

var setups = map[string]setup{
	"irq":       {size: 64},
	"quiet":     {size: 64, quiet: true},
	"no irq":    {size: 64, noIRQ: true},
	"size 2":    {size: 2},
	"size 3":    {size: 3, quiet: true},
	"size 4096": {size: 4096, quiet: true},
}

// TestManyGoroutines has more goroutines than slots. A wake-up or a free slot that is lost shows as a test that never ends.
func TestManyGoroutines(t *testing.T) {
	for name, s := range setups {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, s)
			var wg sync.WaitGroup
			for g := range 16 {
				wg.Go(func() {
					w := NewWaiter()
					for i := range 60 {
						j := &job{w: w, id: uint32(g), left: 1 + (g+i)%5}
						if err := j.run(context.Background(), b.Lane); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			within(t, patience, "the goroutines end", wg.Wait)
			if st := b.Stats(); st.Commands < 16*60 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// patience is longer than anything takes that works, on a busy machine.
const patience = time.Minute

func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(d):
		panic(what + ": not in time") // with all stacks
	}
}

// TestSlotsPassOn cancels those who wait for a slot at random moments: the slot that one of them was told of goes to the next.
func TestSlotsPassOn(t *testing.T) {
	b := newBench(t, setup{size: 2})
	var wg sync.WaitGroup
	for g := range 12 {
		wg.Go(func() {
			for i := range 100 {
				ctx, cancel := context.Background(), context.CancelFunc(func() {})
				if g%2 == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(i%20)*10*time.Microsecond)
				}
				j := &job{w: NewWaiter(), id: uint32(g), left: 1}
				if err := j.run(ctx, b.Lane); err != nil && !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	within(t, patience, "the goroutines end", wg.Wait)
}

func TestFailWakesEverybody(t *testing.T) {
	for name, s := range setups {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, s)
			b.mute.Store(true)
			done := make(chan error)
			for g := range 8 {
				go func() { done <- (&job{w: NewWaiter(), id: uint32(g), left: 2}).run(context.Background(), b.Lane) }()
			}
			time.Sleep(5 * time.Millisecond)
			because := errors.New("because")
			b.Fail(because)
			for range 8 {
				if err := <-done; err != because {
					t.Errorf("got %v", err)
				}
			}
			if _, err := b.Start(&job{w: NewWaiter(), left: 1}, nil); err != because {
				t.Errorf("start: %v", err)
			}
			if b.Err() != because {
				t.Errorf("Err: %v", b.Err())
			}
			select {
			case err := <-b.failed:
				t.Errorf("Failed was told of a failure that came from outside: %v", err)
			default:
			}
		})
	}
}

func TestDropEndsWhatIsLeft(t *testing.T) {
	b := newBench(t, setup{size: 64})
	b.mute.Store(true)
	j := &job{w: NewWaiter(), left: 5}
	if n, err := b.Start(j, j.w); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	b.Close()
	if j.flying != 5 {
		t.Fatalf("Close ended commands that the device still has: %d left", j.flying)
	}
	b.Drop()
	if j.flying != 0 || !errors.Is(j.err, ErrClosed) {
		t.Fatalf("%d left, %v", j.flying, j.err)
	}
}

func TestDeviceErrorIsReportedOnce(t *testing.T) {
	b := newBench(t, setup{size: 64})
	b.mute.Store(true)
	done := make(chan error)
	go func() { done <- (&job{w: NewWaiter(), left: 1}).run(context.Background(), b.Lane) }()
	time.Sleep(2 * time.Millisecond)
	b.cq.Post([]ring.Entry{ring.MakeEntry(0, 0, 1, 0x3E, 0)})
	one := [8]byte{1}
	if _, err := unix.Write(b.fd, one[:]); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, queue.ErrProtocol) {
		t.Errorf("got %v", err)
	}
	if err := <-b.failed; !errors.Is(err, queue.ErrProtocol) {
		t.Errorf("Failed was told %v", err)
	}
}

func TestOverdueCommandsAreFound(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	b := newBench(t, setup{size: 64, timeout: timeout})
	nothing := func(why string) {
		t.Helper()
		if late, err := b.Late(), b.Overdue(); len(late) != 0 || err != nil {
			t.Fatalf("%s: %v, %v", why, late, err)
		}
	}
	nothing("idle")
	b.mute.Store(true)
	if n, err := b.StartForever(&job{w: NewWaiter(), id: 1, left: 1}); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	time.Sleep(timeout + timeout/10)
	nothing("a command without a deadline")
	if b.Rescue() {
		t.Fatal("busy with a command without a deadline")
	}
	if n, err := b.Start(&job{w: NewWaiter(), id: 2, left: 1}, nil); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	nothing("a fresh command")
	time.Sleep(timeout + timeout/10)
	if !b.Rescue() {
		t.Fatal("not busy")
	}
	late := b.Late()
	if len(late) != 1 || late[0].QID != 1 || !errors.Is(late[0].Err, queue.ErrTimeout) || late[0].Err.Error()[:5] != "JOB 2" {
		t.Fatalf("got %v", late)
	}
	if err := b.Overdue(); !errors.Is(err, queue.ErrTimeout) {
		t.Fatalf("got %v", err)
	}
	if late := b.Late(); len(late) != 0 {
		t.Fatalf("told twice: %v", late)
	}
}

// TestLostInterrupt is a device that forgets to interrupt: Rescue finds the completion.
func TestLostInterrupt(t *testing.T) {
	b := newBench(t, setup{size: 64, timeout: time.Minute})
	b.silent.Store(true)
	done := make(chan error)
	go func() {
		for range 20 { // some end while they are polled for
			if err := (&job{w: NewWaiter(), left: 1}).run(context.Background(), b.Lane); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		b.Rescue()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
	t.Fatal("stuck")
}

// TestRule34_NeverReadsEventFD makes the descriptors blocking and empties them all the time, so that interrupts are stolen: nobody hangs
// in a read, and Rescue finds what the interrupts should have told.
func TestRule34_NeverReadsEventFD(t *testing.T) {
	b := newBench(t, setup{size: 64})
	if err := unix.SetNonblock(b.fd, false); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	thief := make(chan struct{})
	go func() {
		defer close(thief)
		for !stop.Load() {
			pfd := []unix.PollFd{{Fd: int32(b.fd), Events: unix.POLLIN}}
			if n, _ := unix.Poll(pfd, 1); n > 0 {
				var buf [8]byte
				_, _ = unix.Read(b.fd, buf[:])
			}
			b.Rescue()
		}
	}()
	for i := range 200 {
		within(t, patience, "a command", func() {
			if err := (&job{w: NewWaiter(), id: uint32(i), left: 1}).run(context.Background(), b.Lane); err != nil {
				t.Error(err)
			}
		})
	}
	stop.Store(true)
	<-thief
	within(t, patience, "Close", b.Lane.Close)
}

// BenchmarkOne is one goroutine with one command at a time.
func BenchmarkOne(b *testing.B) {
	bn := newBench(b, setup{size: 64, quiet: true})
	j := &job{w: NewWaiter()}
	b.ReportAllocs()
	for b.Loop() {
		j.left = 1
		if err := j.run(context.Background(), bn.Lane); err != nil {
			b.Fatal(err)
		}
	}
}
