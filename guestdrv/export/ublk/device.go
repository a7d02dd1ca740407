package ublk

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export"
)

// The life of a device:
//
//	Add or Recover   queue pairs, /dev/ublkcN, threads, rings, descriptors, buffers; every tag waits for its first request
//	(the sandbox is shut)
//	Start            /dev/ublkbN serves, or goes on
//	Done             a queue has failed, or the device was stopped by another
//	Stop             caches written back, requests ended, the device deleted

// Config says what Add makes.
type Config struct {
	ID       int // -1: the kernel chooses
	Queues   int // fewer if the disk has fewer
	Depth    int // requests of one queue that are under way
	MaxIO    int // bytes of one request, a multiple of the page size
	Params   Params
	Identity uint64 // of what is behind it: only who has the same may Recover
	// Keep leaves the device as it is when a queue fails: its requests wait for the process that recovers it. Otherwise they end with EIO.
	Keep bool
}

// Device is a ublk device that this process serves.
type Device struct {
	ctl     *Control
	info    Info
	char    int // /dev/ublkcN
	again   bool
	keep    bool
	started bool

	queues   []*queue
	unqueued error
	running  sync.WaitGroup

	mu   sync.Mutex
	err  error
	done chan struct{}
	once sync.Once
}

// Errors of Recover.
var (
	// ErrIdentity is a device of another namespace.
	ErrIdentity = errors.New("the ublk device is another namespace's")
	// ErrNotQuiesced is a device that has a server, or never had one.
	ErrNotQuiesced = errors.New("the ublk device does not wait for a server")
)

// Add makes a device of disk. It serves nothing yet, and all that is opened or mapped for it is.
func Add(ctl *Control, disk export.Disk, c Config) (*Device, error) {
	if c.Queues < 1 || c.Queues > maxQueues || c.Depth < 1 || c.Depth > maxDepth {
		return nil, fmt.Errorf("ublk: %d queues of depth %d: 1 to %d of 1 to %d", c.Queues, c.Depth, maxQueues, maxDepth)
	}
	if b := c.Params.BlockSize; b < sectorSize || b > 4096 || b&(b-1) != 0 {
		return nil, fmt.Errorf("ublk: blocks of %d bytes: the block layer takes 512 to 4096", b)
	}
	features, err := ctl.Features()
	if err != nil {
		return nil, err
	}
	d := &Device{ctl: ctl, keep: c.Keep, char: -1, done: make(chan struct{})}
	if err := d.takeQueues(disk, 1, c.Queues, c.Depth); err != nil {
		return nil, errors.Join(err, d.release())
	}
	info := Info{
		Queues: len(d.queues), Depth: c.Depth, MaxIO: c.MaxIO, ID: anyID, Identity: c.Identity,
		Features: features & (FeatureUserRecovery | FeatureRecoveryReissue | FeatureIoctlEncode | FeatureUpdateSize),
	}
	if c.ID >= 0 {
		info.ID = uint32(c.ID)
	}
	var b [devInfoSize]byte
	add := func() error { info.put(b[:]); return ctl.command(cmdAddDev, info.ID, 0, b[:]) }
	if c.ID >= 0 && !deviceInUse(info.ID) {
		err = whileBusy(add) // a deleted device keeps its number until the kernel has let go of it
	} else {
		err = add()
	}
	if err != nil {
		return nil, errors.Join(addError(err, c), d.release())
	}
	d.info = parseInfo(b[:])
	var params [setSize]byte
	c.Params.put(params[:], d.info.MaxIO)
	err = ctl.command(cmdSetParams, d.info.ID, 0, params[:])
	if err == nil {
		err = d.open(c.Params.BlockSize)
	}
	if err != nil {
		return nil, errors.Join(err, d.Stop())
	}
	return d, nil
}

func deviceInUse(id uint32) bool {
	_, err := os.Stat(fmt.Sprintf("/dev/ublkc%d", id))
	return err == nil
}

func addError(err error, c Config) error {
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: there is a ublk device %d: choose another number, or none", err, c.ID)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: it takes CAP_SYS_ADMIN", err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: as many ublk devices as /sys/module/ublk_drv/parameters/ublks_max allows are there", err)
	}
	return err
}

// Recover is Add for device id, whose server has died. The requests that it had under way are served first. c's Queues, Depth, MaxIO and Params are the
// device's own, as they were; the size and the block size are checked. After an error the device waits for its next server when this process has ended.
func Recover(ctl *Control, id uint32, disk export.Disk, c Config) (*Device, error) {
	info, err := ctl.Info(id)
	if err != nil {
		return nil, err
	}
	if info.Identity != c.Identity {
		return nil, fmt.Errorf("ublk device %d: %w (identity %#x, want %#x): choose another number", id, ErrIdentity, info.Identity, c.Identity)
	}
	params, err := ctl.Params(id)
	if err != nil {
		return nil, err
	}
	if params.BlockSize != c.Params.BlockSize || params.ReadOnly != c.Params.ReadOnly {
		return nil, fmt.Errorf("ublk device %d: %w: it has blocks of %d bytes, read-only %v; the namespace %d, %v",
			id, ErrIdentity, params.BlockSize, params.ReadOnly, c.Params.BlockSize, c.Params.ReadOnly)
	}
	if params.Size > c.Params.Size {
		return nil, fmt.Errorf("ublk device %d has %d bytes, and the namespace has shrunk to %d", id, params.Size, c.Params.Size)
	}
	// The kernel goes on cleaning up after the process for a while.
	err = whileBusy(func() error { return ctl.command(cmdStartRecovery, id, 0, nil) })
	if errors.Is(err, unix.EINVAL) && info.State == Quiesced {
		// Who began to recover it died before a queue was ready. To the kernel it is as if the recovery had just been started (up to Linux 6.14).
		err = nil
	}
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("ublk device %d: %w: %w; it is %v, served by process %d", id, ErrNotQuiesced, err, info.State, info.PID)
	} else if err != nil {
		return nil, err
	}
	d := &Device{ctl: ctl, info: info, again: true, keep: c.Keep, char: -1, done: make(chan struct{})}
	if err := d.takeQueues(disk, info.Queues, info.Queues, info.Depth); err != nil {
		return nil, errors.Join(err, d.release())
	}
	if err := d.open(params.BlockSize); err != nil {
		return nil, err
	}
	return d, nil
}

// takeQueues makes queue pairs of the disk for most queues, or as many as it has. If these are fewer than least its methods serve.
func (d *Device) takeQueues(disk export.Disk, least, most, depth int) error {
	if q, ok := disk.(export.Queued); ok {
		err := d.makeQueues(q, most, depth)
		if len(d.queues) >= least {
			return nil
		}
		d.unqueued = fmt.Errorf("%d queue pairs of %d: %w", len(d.queues), least, err)
		if err := d.release(); err != nil {
			return err
		}
	} else {
		d.unqueued = errors.New("the disk has no queue pairs")
	}
	return d.makeQueues(methods{disk}, most, depth)
}

func (d *Device) makeQueues(disk export.Queued, n, depth int) error {
	for id := range n {
		nvme, err := disk.NewQueue(depth)
		if err != nil {
			return err
		}
		d.queues = append(d.queues, &queue{id: id, disk: disk, nvme: nvme, failed: d.fail, keep: d.keep})
	}
	return nil
}

// Unqueued returns why requests go through the disk's methods, with a goroutine for each of them; nil: they go through its queue pairs.
func (d *Device) Unqueued() error { return d.unqueued }

func (d *Device) openChar() error {
	name := fmt.Sprintf("/dev/ublkc%d", d.info.ID)
	err := whileBusy(func() (err error) {
		d.char, err = unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w; /dev must be a devtmpfs, or have what udev makes", name, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// ID returns N of /dev/ublkbN.
func (d *Device) ID() uint32 { return d.info.ID }

// Path returns the block device's name.
func (d *Device) Path() string { return fmt.Sprintf("/dev/ublkb%d", d.info.ID) }

// Info returns queues, depth and request size as the kernel granted them, or as the device has had them.
func (d *Device) Info() Info { return d.info }

// Recovered tells whether the device was there before.
func (d *Device) Recovered() bool { return d.again }

// open makes the device ready to serve.
func (d *Device) open(blockSize int) error {
	if err := d.openChar(); err != nil {
		return err
	}
	for _, q := range d.queues[d.info.Queues:] { // the kernel has no more queues than CPUs
		if err := q.nvme.Close(); err != nil {
			return err
		}
	}
	d.queues = d.queues[:d.info.Queues]
	for _, q := range d.queues {
		q.shift = uint8(bits.TrailingZeros(uint(blockSize / sectorSize)))
		for range d.info.Depth {
			mem, free, err := q.disk.DMAMemory(d.info.MaxIO)
			if err != nil {
				return fmt.Errorf("buffers of queue %d of %d: %d of %d bytes: %w", q.id, d.info.Queues, d.info.Depth, d.info.MaxIO, err)
			}
			q.bufs = append(q.bufs, buffer{mem: mem, addr: addressOf(mem), free: free})
		}
	}
	var interrupts []int
	for _, q := range d.queues {
		if fd := q.nvme.EventFD(); fd >= 0 {
			interrupts = append(interrupts, fd)
		}
	}
	for _, q := range d.queues {
		// A queue that is made again may get another's interrupt, so each ring knows all of them.
		if err := d.launch(q, interrupts); err != nil {
			return err
		}
	}
	return nil
}

// launch starts the queue's thread and returns when the kernel has its tags.
func (d *Device) launch(q *queue, interrupts []int) error {
	opened := make(chan error, 1)
	d.running.Add(1)
	thread(func() {
		defer d.running.Done()
		err := d.serve(q, interrupts, opened)
		if err != nil {
			d.fail(err)
		}
	})
	return <-opened
}

func (d *Device) serve(q *queue, interrupts []int, opened chan<- error) (err error) {
	begun := false
	defer func() {
		if !begun {
			opened <- err
			err = nil
		}
	}()
	// Each queue's descriptors have room for the deepest queue (UBLKSRV_CMD_BUF_OFFSET).
	page := os.Getpagesize()
	size := (d.info.Depth*ioDescSize + page - 1) &^ (page - 1)
	room := (maxDepth*ioDescSize + page - 1) &^ (page - 1)
	q.desc, err = unix.Mmap(d.char, int64(q.id*room), size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("ublk queue %d: mapping its descriptors: %w", q.id, err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(q.desc)) }()
	p, err := openRing(uint16(q.id), d.info.Depth, d.char, interrupts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	q.port = p
	if err := q.begin(); err != nil {
		return err
	}
	begun = true
	opened <- nil
	err = q.run()
	runtime.KeepAlive(q.bufs)
	return err
}

// RingFDs returns the descriptors that io_uring_enter is called with from now on, for a sandbox.
func (d *Device) RingFDs() []int {
	fds := []int{d.ctl.FD()}
	for _, q := range d.queues {
		if p, ok := q.port.(*ringPort); ok {
			fds = append(fds, p.ring.FD())
		}
	}
	return fds
}

// Start makes the block device serve. The kernel reads its partition table meanwhile.
func (d *Device) Start() error {
	op := uint32(cmdStartDev)
	if d.again {
		op = cmdEndRecovery
	}
	if err := d.ctl.command(op, d.info.ID, uint64(os.Getpid()), nil); err != nil {
		if why := d.Err(); why != nil {
			err = fmt.Errorf("%w: %w", err, why)
		}
		return err
	}
	d.started = true
	return nil
}

// Started tells whether the block device has begun, or gone on, to serve.
func (d *Device) Started() bool { return d.started }

// Resize gives the block device another size in bytes. The error is errors.ErrUnsupported before Linux 6.16.
func (d *Device) Resize(size int64) error {
	if d.info.Features&FeatureUpdateSize == 0 {
		return fmt.Errorf("the size of a ublk device can be changed from Linux 6.16 on: %w", errors.ErrUnsupported)
	}
	return d.ctl.command(cmdUpdateSize, d.info.ID, uint64(size/sectorSize), nil)
}

// fail records the first error and closes Done.
func (d *Device) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.err = err
	}
	d.once.Do(func() { close(d.done) })
}

// Done is closed when a queue has failed.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why, or nil.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// stopWithin is how long queues may take to end once the kernel has stopped the device.
const stopWithin = 30 * time.Second

// syncWithin bounds the sync of Stop: another file system of the machine may never end it.
const syncWithin = 20 * time.Second

// Stop ends the device: what is dirty in caches is written, by sync(2) since the kernel does not do it for a device that goes; requests end, and
// the device is deleted. A file system that is still mounted on it loses it. Buffers and queue pairs are given back.
func (d *Device) Stop() error {
	if d.started && d.Err() == nil {
		synced := make(chan struct{})
		go func() { unix.Sync(); close(synced) }()
		select {
		case <-synced:
		case <-time.After(syncWithin):
		}
	}
	err := d.ctl.stop(d.info.ID)
	if err == nil {
		err = d.wait()
	}
	if err != nil {
		return err // threads may still use what would be given back
	}
	return errors.Join(d.release(), d.ctl.delete(d.info.ID))
}

func (d *Device) wait() error {
	ended := make(chan struct{})
	go func() { d.running.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-time.After(stopWithin):
		return fmt.Errorf("ublk device %d: its queues have not ended %v after it was stopped", d.info.ID, stopWithin)
	}
}

// release gives back what was taken. No thread runs.
func (d *Device) release() (err error) {
	for _, q := range d.queues {
		err = errors.Join(err, q.nvme.Close())
		for _, b := range q.bufs {
			b.free()
		}
	}
	d.queues = nil
	if d.char >= 0 {
		err = errors.Join(err, unix.Close(d.char))
		d.char = -1
	}
	return err
}

// Stats are sums over the queues.
type Stats struct {
	Requests uint64 // of the block layer
	Errors   uint64 // of them, ended with an error
	Sleeps   uint64 // of a queue's thread
	Enters   uint64 // system calls
	Remade   uint64 // queue pairs made again after a reset of the controller
}

// Stats returns what the queues have done so far.
func (d *Device) Stats() (s Stats) {
	for _, q := range d.queues {
		c := &q.counts
		s.Requests += c.Requests.Load()
		s.Errors += c.Errors.Load()
		s.Sleeps += c.Sleeps.Load()
		s.Enters += c.Enters.Load()
		s.Remade += c.Remade.Load()
	}
	return s
}
