package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	// adminMemory is the DMA memory of the admin queue, of the doorbell pages and of the data of admin commands, in bytes. Queue pairs have their own.
	adminMemory = 4 << 20
	// maxTransfer bounds the data of one command in bytes where the controller does not.
	maxTransfer = 1 << 20
)

// Defaults of Options.
const (
	DefaultQueues       = 64
	DefaultTimeout      = 10 * time.Second // guests give up after 30 s
	DefaultResetTimeout = 30 * time.Second
)

// Options are what Open can be told. Those of the first Open of an address count; another Timeout is then refused.
type Options struct {
	// Queues is how many I/O queue pairs the controller is asked for; 0: DefaultQueues.
	Queues int
	// Timeout is the deadline of each command; 0: DefaultTimeout. One that misses it is aborted, and if that does not end it the controller is reset.
	Timeout time.Duration
	// ResetTimeout bounds one reset, with all its attempts; 0: DefaultResetTimeout.
	ResetTimeout time.Duration
	// UnsafeNoIOMMU takes a function that no IOMMU keeps from all memory of the machine, too.
	UnsafeNoIOMMU bool
	Logger        hclog.Logger // nil: nobody is told
}

func (o Options) withDefaults() Options {
	if o.Queues <= 0 {
		o.Queues = DefaultQueues
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.ResetTimeout <= 0 {
		o.ResetTimeout = DefaultResetTimeout
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	return o
}

// grace is how long a command that was aborted has to end.
func (o *Options) grace() time.Duration {
	return min(max(o.Timeout/4, 20*time.Millisecond), 2*time.Second)
}

// ErrClosed says that the Device was closed.
var ErrClosed = errors.New("the device was closed")

// Function is the PCI function of a controller. It is an addresser too, or a pager.
type Function interface {
	device.Device
	// Sever is the first half of Close, which takes no time: the function reaches no memory any more.
	Sever()
}

// addresser is a Function behind an IOMMU, which has an address for each piece of memory.
type addresser interface {
	MapDMA(mem []byte) (iova uint64, err error)
	UnmapDMA(iova, size uint64) error
}

// pager is a Function that finds each page of memory at an address of its own.
type pager interface {
	MapPages(mem []byte) (addresses []uint64, err error)
	UnmapPages(mem []byte) error
}

// state is what a Device goes through. See reset.go.
type state uint8

const (
	opening state = iota
	live
	resetting
	failed
	closed
)

func (s state) String() string {
	return [...]string{"opening", "live", "resetting", "failed", "closed"}[s]
}

// Device is a controller that this process owns. It is safe for concurrent use.
type Device struct {
	address string
	opts    Options
	log     hclog.Logger
	fn      Function
	mem     *device.DMARegion
	pool    *dma.Pool
	adm     *admin.Admin

	fds     []int // of the interrupt vectors; the admin queue's is its own
	cap     nvme.CAP
	granted int  // I/O queue pairs
	shadow  bool // doorbell pages are in use

	life    context.Context // ends when the device fails or is closed
	end     context.CancelFunc
	running sync.WaitGroup
	severed chan struct{} // closed when the device reaches no memory any more, and no pair is in use
	buried  chan struct{} // closed when the function was given back

	late    chan lateCommand
	slow    chan struct{}
	trouble chan struct{} // there is a problem
	asked   chan chan error
	asks    chan struct{} // has an element for each command of Ask

	// using is held for reading by whoever uses the admin queue or DMA memory of the device, for writing by bury.
	using sync.RWMutex

	// mu guards what follows. Nothing is waited for under it.
	mu      sync.Mutex
	state   state
	changed chan struct{} // closed when state changes
	err     error         // why the device has ended
	epoch   uint64        // counts resets
	recent  history
	problem *problem
	pairs   []*Pair
	orphans []*Pair // the controller may still use their memory
	qids    []uint16
	vectors []int
	spaces  map[uint32]*nvme.IdentifyNamespace
	taken   map[uint32]*Space // those that somebody has asked for
	refs    int               // guarded by devices.mu

	// telling is held while a watcher is called.
	telling  sync.Mutex
	watchers map[*watcher]struct{} // guarded by mu

	made    atomic.Uint32 // queue pairs
	sharing sync.Once
	muxes   *Pairs // made by Pairs

	counts struct{ resets, timeouts, aborts atomic.Uint64 }
}

// Stats is what has happened to a Device.
type Stats struct {
	State    string
	Shadow   bool // queue doorbells are pages in memory that the controller polls
	Pairs    int  // queue pairs that there are
	MaxPairs int  // of those that the controller has
	Resets   uint64
	Timeouts uint64 // commands past their deadline
	Aborts   uint64
}

// Stats returns what has happened so far.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return Stats{
		State: d.state.String(), Shadow: d.shadow, Pairs: len(d.pairs), MaxPairs: d.granted,
		Resets: d.counts.resets.Load(), Timeouts: d.counts.timeouts.Load(), Aborts: d.counts.aborts.Load(),
	}
}

// Address returns the PCI address, in its full form.
func (d *Device) Address() string { return d.address }

// Controller returns Identify Controller, which is not to be changed.
func (d *Device) Controller() *nvme.IdentifyController { return d.adm.Identity() }

// Capabilities returns CAP.
func (d *Device) Capabilities() nvme.CAP { return d.cap }

// MaxTransfer returns how many bytes one command may move.
func (d *Device) MaxTransfer() uint32 {
	n := d.Controller().MaxTransfer(d.cap.MPSMIN())
	if n == 0 {
		n = maxTransfer
	}
	return uint32(min(n, maxTransfer))
}

// Namespaces returns the ids of the active namespaces, rising.
func (d *Device) Namespaces() []uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.spaces))
}

// Namespace returns what Identify says of a namespace, which is not to be changed.
func (d *Device) Namespace(nsid uint32) (*nvme.IdentifyNamespace, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	if id := d.spaces[nsid]; id != nil {
		return id, nil
	}
	return nil, fmt.Errorf("%s: no active namespace %d; there are %d", d.address, nsid, slices.Sorted(maps.Keys(d.spaces)))
}

// Exec executes an admin command; see [admin.Admin.Exec]. While the controller is reset it waits.
func (d *Device) Exec(ctx context.Context, cmd nvme.Command, data []byte) (nvme.Status, uint32, error) {
	d.using.RLock()
	defer d.using.RUnlock()
	if err := d.Err(); err != nil {
		return 0, 0, err
	}
	return d.adm.Exec(ctx, cmd, data)
}

// Map lets the device reach mem, whole pages of this process, until Unmap, and returns where. The kernel pins it.
func (d *Device) Map(mem []byte) (at Place, err error) {
	switch fn := d.fn.(type) {
	case pager:
		if at.Pages, err = fn.MapPages(mem); err == nil {
			joinPages(at.Pages)
		}
	case addresser:
		at.IOVA, err = fn.MapDMA(mem)
	default:
		err = errors.ErrUnsupported
	}
	if err != nil {
		return Place{}, fmt.Errorf("%s: %w", d.address, err)
	}
	return at, nil
}

// Unmap takes back what Map gave. No command that names it is outstanding.
func (d *Device) Unmap(mem []byte, at Place) error {
	if fn, is := d.fn.(pager); is {
		return fn.UnmapPages(mem)
	}
	return d.fn.(addresser).UnmapDMA(at.IOVA, uint64(len(mem)))
}

// Exposed says that no IOMMU stands between the device and all memory of the machine.
func (d *Device) Exposed() bool {
	_, is := d.fn.(*exposed)
	return is
}

// Polled says that the device has no interrupts: its queues are polled.
func (d *Device) Polled() bool { return d.fn.MaxInterrupts() == 0 }

// Err returns why the device has failed for good, or ErrClosed, or nil.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// setup makes the controller ready, in the order in which each step needs the one before.
func (d *Device) setup(ctx context.Context) (err error) {
	if d.mem, err = d.fn.AllocDMA(adminMemory); err != nil {
		return err
	}
	if d.pool, err = dma.NewPool(d.mem, "try again when other admin commands have ended"); err != nil {
		return err
	}
	fd := -1
	if n := min(d.fn.MaxInterrupts(), 1+d.opts.Queues); n > 0 {
		if d.fds, err = d.fn.Interrupts(n); err != nil {
			return fmt.Errorf("interrupts: %w", err)
		}
		fd, d.fds[0] = d.fds[0], -1
		for v := 1; v < n; v++ {
			d.vectors = append(d.vectors, v)
		}
	}
	d.adm, err = admin.Open(ctx, admin.Config{
		Device: d.fn, Pool: d.pool, EventFD: fd, Timeout: d.opts.Timeout, Logger: d.log, Health: true,
		Failed: func(err error) { d.fail(err) },
		Refused: func(cmd nvme.Command, status nvme.Status) error {
			return fmt.Errorf("%s: %w", cmd.Describe(true), &nvme.StatusError{Status: status})
		},
	})
	if err != nil {
		return err
	}
	d.cap = d.adm.Capabilities()
	d.running.Add(1)
	go d.watch()
	if err := d.adm.Identify(ctx); err != nil {
		return err
	}
	if err := d.configure(ctx); err != nil {
		return err
	}
	for qid := 1; qid <= d.granted; qid++ {
		d.qids = append(d.qids, uint16(qid))
	}
	if d.spaces, err = d.identifyNamespaces(ctx); err != nil {
		return err
	}
	d.adm.WatchEvents(admin.Watcher{Namespaces: d.namespacesChanged, Health: d.healthChanged})
	d.adm.RequestEvents(ctx)
	return nil
}

// configure is the part of each enable between Identify and the creation of queues: doorbell pages and the number of queues.
func (d *Device) configure(ctx context.Context) error {
	shadow := false
	if d.adm.DoorbellsOffered() && !d.adm.Mapped() {
		err := d.adm.ShareDoorbells(ctx, false)
		var refused *nvme.StatusError
		switch {
		case err == nil:
			shadow = true
		case errors.As(err, &refused): // queues are as they would be without (R26)
			d.log.Info("no shared doorbell pages", "reason", err)
		default:
			return fmt.Errorf("shared doorbell pages: %w", err)
		}
	}
	granted, err := d.adm.QueueCount(ctx, d.opts.Queues)
	if err != nil {
		return err
	}
	granted = min(granted, int(d.adm.MaxQID()))
	if granted < 1 {
		return fmt.Errorf("the controller has no I/O queue whose doorbells can be reached: %v, BAR0 of %#x bytes", d.cap, d.fn.RegisterSpace())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.granted != 0 && granted < d.granted {
		return fmt.Errorf("%w: %d I/O queue pairs, and before %d", admin.ErrChanged, granted, d.granted)
	}
	if d.granted == 0 {
		d.granted = granted
	}
	d.shadow = shadow
	return nil
}

// release gives back what outlives the function: the interrupts that sleepers may still look at. No pair is left.
func (d *Device) release() (err error) {
	for i, fd := range d.fds {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
			d.fds[i] = -1
		}
	}
	return err
}

// lateCommand is a command of a pair that is past its deadline. old: it is still there although it was told before.
type lateCommand struct {
	queue.Late
	old   bool
	epoch uint64
}

// problem is what calls for a reset, unless there has been one since.
type problem struct {
	err   error
	epoch uint64
}
