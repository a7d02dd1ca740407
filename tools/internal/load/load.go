// Package load is a closed-loop load on a namespace: a number of jobs, each a locked thread with a queue pair of
// its own, each keeping the same number of commands under way for a given time. It measures
// rates, latencies and what they cost: MMIO writes, wake-ups, CPU time.
//
// The flow:
//
//	Open     check the configuration, make queue pairs and buffers         load.go
//	Run      fill (verify), measure, read back (verify); all jobs abreast  run.go
//	loop     reap, account, refill, publish: the hot path                  job.go
//	next     which blocks, read or write                                   pick.go
//	ledger   what each block must hold (verify)                            verify.go, pattern.go
//	Result   figures, as text and as JSON                                  result.go
//
// After Open nothing here opens a file or makes a descriptor, so a caller can lock itself into a
// sandbox before Run. Nothing is allocated for an I/O. The package draws nothing
// on a terminal: progress comes out of Run.Progress.
package load

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

// Kind is what the load does.
type Kind string

// The kinds. The mixed one reads and writes one half each.
const (
	RandRead  Kind = "randread"
	RandWrite Kind = "randwrite"
	RandRW    Kind = "randrw"
	SeqRead   Kind = "read"
	SeqWrite  Kind = "write"
)

// Kinds lists them all.
func Kinds() []Kind { return []Kind{RandRead, RandWrite, RandRW, SeqRead, SeqWrite} }

// Random reports whether addresses are drawn, rather than rising.
func (k Kind) Random() bool { return k != SeqRead && k != SeqWrite }

func (k Kind) reads() bool  { return k != RandWrite && k != SeqWrite }
func (k Kind) writes() bool { return k != RandRead && k != SeqRead }

const (
	maxBatch    = 16 // most commands per Reap, Submit and Publish, so that both sides work at the same time
	maxDepth    = guestdrv.MaxQueueDepth
	maxJobs     = 1024      // far beyond what any controller has queues for
	defaultSpan = 256 << 20 // bytes that verify uses by default
	maxBuffers  = 4 << 30   // bytes of DMA memory
	ringRoom    = 255       // commands that a ring has room for at least, where the device allows it
	driverShare = 16 << 20  // bytes of DMA memory for what the driver itself needs, at most
)

// Config is a load. The zero value of a field is its default, where one is named.
type Config struct {
	NSID    uint32        // default 1
	Kind    Kind          // default randread
	Sizes   size.List     // bytes of each transfer, drawn evenly if there are several; default 4 KiB
	Depth   int           // commands under way in each job; default 32
	Jobs    int           // default 1
	Runtime time.Duration // default 10 s
	CPUs    []int         // job i is pinned to the CPU i modulo the length; empty: not pinned
	Span    size.Bytes    // bytes of the namespace to use, from its start; default all, with Verify at most 256 MiB
	Fill    bool          // write all of the span once before measuring, so that no read meets a hole
	Batch   int           // most commands for one doorbell; default 16
	Rate    uint32        // most commands that each job starts in a second, evenly spaced; 0: as many as it can
	Verify  bool          // write patterns and check every read; destroys what the span holds
	Poll    bool          // no interrupts: poll for ever
	NoSpin  bool          // sleep at once instead of polling first

	Priorities []guestdrv.Priority // of the job i's queue: the one at i modulo the length; empty: none. The controller was opened with Options.Arbitration
}

// priority is that of job i's queue.
func (c Config) priority(i int) guestdrv.Priority {
	if len(c.Priorities) == 0 {
		return guestdrv.PriorityDefault
	}
	return c.Priorities[i%len(c.Priorities)]
}

// Defaults returns c with the defaults filled in.
func (c Config) Defaults() Config {
	if c.NSID == 0 {
		c.NSID = 1
	}
	if c.Kind == "" {
		c.Kind = RandRead
	}
	if len(c.Sizes) == 0 {
		c.Sizes = size.List{4096}
	}
	if c.Depth == 0 {
		c.Depth = 32
	}
	if c.Jobs == 0 {
		c.Jobs = 1
	}
	if c.Runtime == 0 {
		c.Runtime = 10 * time.Second
	}
	if c.Batch == 0 {
		c.Batch = maxBatch
	}
	return c
}

// Check finds what is wrong with c whatever the device. The error is one line with the remedy.
func (c Config) Check() error {
	switch {
	case !slices.Contains(Kinds(), c.Kind):
		return fmt.Errorf("rw %q: it must be one of %v", c.Kind, Kinds())
	case c.Depth < 1 || c.Depth > maxDepth:
		return fmt.Errorf("queue depth %d: it must be 1 to %d", c.Depth, maxDepth)
	case c.Jobs < 1 || c.Jobs > maxJobs:
		return fmt.Errorf("%d jobs: it must be 1 to %d", c.Jobs, maxJobs)
	case c.Batch < 1 || c.Batch > maxBatch:
		return fmt.Errorf("batch of %d: it must be 1 to %d", c.Batch, maxBatch)
	case c.Runtime < 0:
		return fmt.Errorf("runtime %v: it must not be negative", c.Runtime)
	case uint64(c.Sizes.Max()) > maxBuffers:
		return fmt.Errorf("block size %v: at most %v", c.Sizes.Max(), size.Bytes(maxBuffers))
	case c.bufferBytes() > maxBuffers:
		return fmt.Errorf("%d jobs of depth %d with blocks of %v need %s of buffers, at most %v: use less of one",
			c.Jobs, c.Depth, c.Sizes.Max(), c.bufferBytes().Human(), size.Bytes(maxBuffers))
	case c.Poll && c.NoSpin:
		return errors.New("to poll for ever and not to poll exclude each other: use one")
	}
	return nil
}

func (c Config) bufferBytes() size.Bytes {
	page := (c.Sizes.Max() + 4095) &^ 4095
	return size.Bytes(c.Jobs*c.Depth) * page
}

// Options fills in what the load needs of a controller: DMA memory and queue pairs.
func (c Config) Options(o guestdrv.Options) guestdrv.Options {
	c = c.Defaults()
	// Blocks of DMA memory are powers of two: one for the buffers and one for the rings of each job, and one more of each
	// because the first begins where the driver's own memory ends.
	buffers := ceilPow2(uint64(c.Depth) * uint64((c.Sizes.Max()+4095)&^4095))
	entries := uint64(max(2*c.Depth, ringRoom) + 1)
	rings := ceilPow2(entries*64+4096) + ceilPow2(entries*16+4096) + entries*4096 // and a PRP list for each command
	o.DMASize = ceilPow2(uint64(c.Jobs+1)*(buffers+2*rings) + driverShare)
	o.Queues, o.MaxQueuePairs = 1, c.Jobs
	return o
}

func ceilPow2(n uint64) uint64 { return 1 << bits.Len64(n-1) }

// Load is a load that is ready to run, once.
type Load struct {
	cfg    Config
	ctrl   *guestdrv.Controller // nil in tests
	jobs   []*job
	closer []func() error
}

// Open prepares the load on ctrl. The error of what the device cannot do says what to change.
func Open(ctrl *guestdrv.Controller, c Config) (*Load, error) {
	c = c.Defaults()
	if err := c.Check(); err != nil {
		return nil, err
	}
	ns, err := ctrl.Namespace(c.NSID)
	if err != nil {
		return nil, err
	}
	plan, err := makePlan(c, geometry{
		blockSize: uint64(ns.BlockSize()), size: uint64(ns.Size()), maxTransfer: uint64(ctrl.MaxTransfer()), maxEntries: uint64(ctrl.Capabilities().MQES().Count()),
	})
	if err != nil {
		return nil, err
	}
	l := &Load{cfg: c, ctrl: ctrl}
	for i := range c.Jobs {
		if err := l.addJob(plan, i); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

func (l *Load) addJob(p *plan, i int) error {
	// One for each command: memory need not be contiguous for longer than that.
	slots := make([]slot, l.cfg.Depth)
	for s := range slots {
		buf, err := l.ctrl.Alloc(p.slotSize)
		if err != nil {
			return fmt.Errorf("buffers of job %d: %w", i, err)
		}
		l.closer = append(l.closer, func() error { buf.Free(); return nil })
		slots[s].mem, slots[s].iova = buf.Bytes(), buf.IOVA()
	}
	qp, err := l.ctrl.NewQueuePair(guestdrv.QueuePairOptions{Depth: p.ringDepth, Poll: l.cfg.Poll, NoSpin: l.cfg.NoSpin, Priority: l.cfg.priority(i)})
	if err != nil {
		return fmt.Errorf("queue pair of job %d: %w", i, err)
	}
	l.closer = append(l.closer, qp.Close)
	l.jobs = append(l.jobs, newJob(p, i, qp, slots))
	return nil
}

// Close gives the queue pairs and buffers back, the last first.
func (l *Load) Close() error {
	var errs []error
	for _, f := range slices.Backward(l.closer) {
		errs = append(errs, f())
	}
	l.closer = nil
	return errors.Join(errs...)
}

// Queue is what a job drives; *guestdrv.QueuePair is one.
type Queue interface {
	Submit([]guestdrv.IO) (int, error)
	Publish() error
	Reap([]guestdrv.Result) (int, error)
	Wait(context.Context) error
	Stats() guestdrv.QueueStats
	Ops() []guestdrv.OpStats
}
