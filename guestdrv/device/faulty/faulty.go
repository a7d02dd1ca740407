// Package faulty is a [device.Device] around another that goes wrong as a test tells it to: registers that read as all ones, a fatal status,
// a ready bit that never changes, doorbells and interrupts that are lost, commands that reach the controller with another identifier, a
// reset that fails or hangs, an end at any moment.
//
// It sees what passes between driver and device, and nothing else: what lies in memory that both share (doorbell pages, completions) is
// not touched, but for commands that a doorbell is about to be rung for. So a test that loses doorbells or alters commands opens the driver
// with guestdrv.DoorbellsMMIO.
//
// Everything may be changed at any time and from any goroutine. It is for tests; what medium errors a controller reports is not its business,
// since hostmed's fault media do that.
package faulty

import (
	"errors"
	"fmt"
	"sync"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Until says what ends a fault of the controller's status. Repair ends each.
type Until uint8

const (
	Disabled Until = iota + 1 // CC.EN is written as 0
	Reset                     // the function is reset
	Repaired
)

// Device is the wrapped device.
type Device struct {
	dev device.Device

	done     chan struct{}
	once     sync.Once
	err      error // written before done is closed
	closed   chan struct{}
	closing  sync.Once
	closeErr error
	running  sync.WaitGroup
	lines    lines

	mu     sync.Mutex // guards the rest; neither the device nor a hook is called with it held
	gone   bool
	fatal  Until
	frozen Until
	ready  bool // CSTS.RDY, while it is frozen
	hooks  Hooks
	queues queues
	memory []*device.DMARegion
}

// Hooks see what passes. Each may be nil. They may be called from several goroutines at once, and must not call the Device.
type Hooks struct {
	// Read sees what reading the register at off gives, and returns what the driver is to get.
	Read func(off uint32, v uint64) (uint64, error)
	// Write sees a register being written; if it returns false the device does not.
	Write func(off uint32, v uint64) bool
	// Ring sees a doorbell being rung; if it returns false the device does not.
	Ring func(off, v uint32) bool
	// Command sees each command of queue qid before its doorbell is rung, and may change it, its CID for example.
	Command func(qid uint16, cmd *nvme.Command)
	// Interrupt sees an interrupt of a vector; if it returns false the driver does not.
	Interrupt func(vector int) bool
	// Reset is called before the function is reset. It may wait. With an error, the function is not reset and the driver gets that.
	Reset func() error
}

var _ device.Device = (*Device)(nil)

// Wrap returns dev without any fault as yet. Close closes dev.
func Wrap(dev device.Device) *Device {
	d := &Device{dev: dev, done: make(chan struct{}), closed: make(chan struct{})}
	d.running.Go(func() {
		select {
		case <-dev.Done():
			d.mu.Lock()
			gone := d.gone
			d.mu.Unlock()
			if !gone { // an unplugged device says so by its registers alone
				d.end(dev.Err())
			}
		case <-d.closed:
		}
	})
	return d
}

// SetHooks replaces all hooks.
func (d *Device) SetHooks(h Hooks) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hooks = h
}

func (d *Device) hook() Hooks {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hooks
}

// Unplug takes the device out as from a slot: registers read as all ones, writes, doorbells and interrupts get lost, DMA stops. There is no
// way back, and Done stays open: nobody has told.
func (d *Device) Unplug() {
	d.mu.Lock()
	d.gone = true
	d.mu.Unlock()
	_ = d.dev.Close() // what it cannot do any more is nobody's concern
}

// End ends the device with err, as the death of a server or the notice of a removal: Done is closed, and everything fails.
func (d *Device) End(err error) {
	d.end(err)
	_ = d.dev.Close()
}

func (d *Device) end(err error) {
	d.once.Do(func() {
		if !errors.Is(err, device.ErrGone) {
			err = fmt.Errorf("%w: %w", device.ErrGone, err)
		}
		d.err = err
		close(d.done)
	})
}

// Fail makes CSTS.CFS read as set.
func (d *Device) Fail(until Until) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fatal = until
}

// FreezeReady makes CSTS.RDY read as it is now, whatever CC.EN says.
func (d *Device) FreezeReady(until Until) error {
	v, err := d.dev.Read32(nvme.RegCSTS)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.frozen, d.ready = until, nvme.CSTS(v).RDY()
	return nil
}

// Repair ends every fault, and takes the hooks out. What is unplugged stays so.
func (d *Device) Repair() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fatal, d.frozen, d.hooks = 0, 0, Hooks{}
}

// ended ends the faults that last until what has happened.
func (d *Device) ended(what Until) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fatal != 0 && d.fatal <= what {
		d.fatal = 0
	}
	if d.frozen != 0 && d.frozen <= what {
		d.frozen = 0
	}
}

func (d *Device) unplugged() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.gone
}

// dead returns why the device has ended, or nil.
func (d *Device) dead() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// meanwhile returns what the driver gets for err, by which the device ended something: this Device may have been ended or unplugged since it began.
func (d *Device) meanwhile(err error) error {
	if err == nil || d.unplugged() {
		return nil
	}
	if end := d.dead(); end != nil {
		return end
	}
	return err
}

// Read32 reads a register of 4 bytes.
func (d *Device) Read32(off uint32) (uint32, error) {
	v, err := d.read(off, 1<<32-1, func() (uint64, error) {
		v, err := d.dev.Read32(off)
		return uint64(v), err
	})
	return uint32(v), err
}

// Read64 reads a register of 8 bytes.
func (d *Device) Read64(off uint32) (uint64, error) {
	return d.read(off, 1<<64-1, func() (uint64, error) { return d.dev.Read64(off) })
}

func (d *Device) read(off uint32, ones uint64, get func() (uint64, error)) (uint64, error) {
	if err := d.dead(); err != nil {
		return 0, err
	}
	if d.unplugged() {
		return ones, nil
	}
	v, err := get()
	if err != nil {
		if err = d.meanwhile(err); err == nil {
			return ones, nil
		}
		return 0, err
	}
	if off == nvme.RegCSTS {
		v = uint64(d.status(nvme.CSTS(v)))
	}
	if h := d.hook().Read; h != nil {
		return h(off, v)
	}
	return v, nil
}

func (d *Device) status(v nvme.CSTS) nvme.CSTS {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fatal != 0 {
		v = v.WithCFS(true)
	}
	if d.frozen != 0 {
		v = v.WithRDY(d.ready)
	}
	return v
}

// Write32 writes a register of 4 bytes.
func (d *Device) Write32(off uint32, v uint32) error {
	return d.write(off, uint64(v), func() error { return d.dev.Write32(off, v) })
}

// Write64 writes a register of 8 bytes.
func (d *Device) Write64(off uint32, v uint64) error {
	return d.write(off, v, func() error { return d.dev.Write64(off, v) })
}

func (d *Device) write(off uint32, v uint64, put func() error) error {
	if err := d.dead(); err != nil {
		return err
	}
	if d.unplugged() {
		return nil
	}
	if h := d.hook().Write; h != nil && !h(off, v) {
		return nil
	}
	if off == nvme.RegCC && !nvme.CC(v).EN() {
		d.ended(Disabled)
	}
	d.mu.Lock()
	d.queues.register(off, v)
	d.mu.Unlock()
	return d.meanwhile(put())
}

// RegisterSpace is the device's.
func (d *Device) RegisterSpace() uint64 { return d.dev.RegisterSpace() }

// AllocDMA is the device's. The wrapper remembers the memory, to find queues in it.
func (d *Device) AllocDMA(size uint64) (*device.DMARegion, error) {
	r, err := d.dev.AllocDMA(size)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.memory = append(d.memory, r)
	return r, nil
}

// MaxInterrupts is the device's.
func (d *Device) MaxInterrupts() int { return d.dev.MaxInterrupts() }

// Reset resets the function, unless a hook says otherwise.
func (d *Device) Reset() error {
	if err := d.dead(); err != nil {
		return err
	}
	if h := d.hook().Reset; h != nil {
		if err := h(); err != nil {
			return err
		}
	}
	if d.unplugged() {
		return nil
	}
	if err := d.meanwhile(d.dev.Reset()); err != nil {
		return err
	}
	d.mu.Lock()
	d.queues = queues{}
	d.mu.Unlock()
	d.ended(Reset)
	return nil
}

// Done is closed when the device has ended; Err says why.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why Done is closed.
func (d *Device) Err() error { return d.dead() }

// PeerPID is the device's.
func (d *Device) PeerPID() int { return d.dev.PeerPID() }

// Close closes the device.
func (d *Device) Close() error {
	d.closing.Do(func() {
		d.closeErr = d.dev.Close()
		close(d.closed)
		d.end(errors.New("closed"))
		d.lines.stop()
		d.running.Wait()
		d.lines.close()
	})
	return d.closeErr
}

// Unmap is the device's.
func (d *Device) Unmap() error { return d.dev.Unmap() }
