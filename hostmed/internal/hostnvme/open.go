package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/shared/device/sysfspci"
	"github.com/shadowbell/shadowbell/shared/device/vfiopci"
)

// devices are those that this process has open, by address. All that name one share it.
var devices = struct {
	mu     sync.Mutex
	change map[string]*sync.Mutex // of each address that there was: held while it is opened or closed, which takes long
	open   map[string]*Device
	going  map[string]*Device // those that have failed and that the kernel does not have back yet
}{change: map[string]*sync.Mutex{}, open: map[string]*Device{}, going: map[string]*Device{}}

// changing returns the mutex of an address. One device that does not come up must not keep others from that.
func changing(address string) *sync.Mutex {
	devices.mu.Lock()
	defer devices.mu.Unlock()
	if devices.change[address] == nil {
		devices.change[address] = &sync.Mutex{}
	}
	return devices.change[address]
}

// Hooks are what a function tells of itself.
type Hooks struct {
	Faulted func()      // PCI Express has seen an error
	Wanted  func()      // the kernel wants the function back
	Lost    func(error) // nothing would stop the function any more if this process were killed
}

// Machine is where functions come from. Tests have their own.
type Machine interface {
	// Lookup returns the address in its full form.
	Lookup(address string) (string, error)
	Open(address string, h Hooks) (Function, error)
}

// Open returns the controller at a PCI address, which vfio-pci has, or, without an IOMMU, no driver, enabled. If this process has it already it is the same one. A controller that an
// earlier process left enabled, with queues, is disabled first. ctx ends the attempt only.
func Open(ctx context.Context, address string, o Options) (*Device, error) {
	return OpenOn(ctx, host{unsafeNoIOMMU: o.UnsafeNoIOMMU}, address, o)
}

// OpenOn is Open on another machine.
func OpenOn(ctx context.Context, m Machine, address string, o Options) (*Device, error) {
	address, err := m.Lookup(address)
	if err != nil {
		return nil, err
	}
	if err := awaitGoing(ctx, address); err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	change := changing(address)
	change.Lock()
	defer change.Unlock()
	devices.mu.Lock()
	d := devices.open[address]
	if d != nil {
		if o.Timeout > 0 && o.Timeout != d.opts.Timeout {
			err = fmt.Errorf("%s: a timeout of %v, and the device is in use with one of %v: say the same for all of its namespaces", address, o.Timeout, d.opts.Timeout)
		} else {
			d.refs++
		}
	}
	devices.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if d != nil {
		return d, nil
	}
	if d, err = bringUp(ctx, m, address, o.withDefaults()); err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	devices.mu.Lock()
	defer devices.mu.Unlock()
	if d.Err() == nil { // otherwise it has been buried already
		devices.open[address] = d
	}
	return d, nil
}

// awaitGoing waits until the kernel has a function back that has failed, which it tries to reset: for one that does not answer that takes a minute.
func awaitGoing(ctx context.Context, address string) error {
	devices.mu.Lock()
	d := devices.going[address]
	devices.mu.Unlock()
	if d == nil {
		return nil
	}
	select {
	case <-d.buried:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: it has failed (%w), and the kernel has not let go of it yet: try again in a minute", ctx.Err(), d.Err())
	}
}

// bringUp opens the function and enables its controller.
func bringUp(ctx context.Context, m Machine, address string, o Options) (*Device, error) {
	d := &Device{
		address: address, opts: o, log: o.Logger.With("device", address), refs: 1,
		late: make(chan lateCommand, 64), slow: make(chan struct{}, 1), trouble: make(chan struct{}, 1), asked: make(chan chan error), asks: make(chan struct{}, maxAsks),
		changed: make(chan struct{}), severed: make(chan struct{}), buried: make(chan struct{}), watchers: map[*watcher]struct{}{}, taken: map[uint32]*Space{},
	}
	d.life, d.end = context.WithCancel(context.Background())
	var err error
	d.fn, err = m.Open(address, Hooks{
		Faulted: func() { d.report(errFaulted, d.now()) },
		Wanted: func() {
			d.fail(fmt.Errorf("%w: the kernel wants it back: it is being unplugged, or its driver changed", device.ErrGone))
		},
		Lost: func(err error) { d.log.Error("start hostmed again soon", "error", err) },
	})
	if err != nil {
		d.end()
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, o.ResetTimeout)
	defer cancel()
	// Register accesses have no context: what ends them early is the end of the function.
	stop := context.AfterFunc(ctx, func() { d.fn.Close() })
	err = d.setup(ctx)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil && !d.begin() {
		err = d.Err()
	}
	if err != nil {
		if ctxErr := ctx.Err(); ctxErr != nil && !errors.Is(err, ctxErr) {
			err = fmt.Errorf("%w: %w", ctxErr, err)
		}
		d.fail(err)
		d.abandon()
		return nil, err
	}
	d.log.Info("device opened", "model", d.Controller().Model(), "serial", d.Controller().Serial(), "queues", d.granted, "namespaces", len(d.Namespaces()), "shadow doorbells", d.Stats().Shadow)
	return d, nil
}

// abandon gives everything back after an Open that failed.
func (d *Device) abandon() {
	if d.adm == nil {
		err := errors.Join(d.fn.Close(), d.fn.Unmap())
		if d.mem != nil {
			err = errors.Join(err, d.mem.Free())
		}
		if err != nil {
			d.log.Warn("giving the function back", "error", err)
		}
		close(d.severed)
	}
	<-d.severed
	if err := d.release(); err != nil {
		d.log.Warn("giving the function back", "error", err)
	}
}

// Close drops one use of the device. The last one shuts the controller down and gives the function back; no Pair is left then. The error is
// that of the shutdown.
func (d *Device) Close() error {
	change := changing(d.address)
	change.Lock()
	defer change.Unlock()
	devices.mu.Lock()
	d.refs--
	last := d.refs == 0
	devices.mu.Unlock()
	if !last {
		return nil
	}
	d.fail(ErrClosed)
	<-d.severed
	err := d.release()
	if d.Err() != ErrClosed {
		return err // the kernel may take its time: see bury
	}
	<-d.buried
	d.running.Wait()
	return err
}

// forget makes the address free for another Open, once the function was given back.
func (d *Device) forget() {
	devices.mu.Lock()
	defer devices.mu.Unlock()
	if devices.open[d.address] == d {
		delete(devices.open, d.address)
	}
	devices.going[d.address] = d
}

// forgotten is the end of that.
func (d *Device) forgotten() {
	devices.mu.Lock()
	defer devices.mu.Unlock()
	if devices.going[d.address] == d {
		delete(devices.going, d.address)
	}
}

// host is this machine.
type host struct{ unsafeNoIOMMU bool }

func (host) Lookup(address string) (string, error) {
	f, err := pcifn.Lookup(address)
	if err != nil {
		return "", err
	}
	return f.Address, nil
}

func (m host) Open(address string, h Hooks) (Function, error) {
	f, err := pcifn.Lookup(address)
	if err != nil {
		return nil, err
	}
	w, err := m.choose(f)
	if err != nil {
		return nil, err
	}
	var fn Function
	if w == sysfs {
		fn, err = sysfspci.Open(f.Address)
	} else {
		fn, err = vfiopci.Open(f.Address, vfiopci.Options{NoIOMMU: w == vfioNoIOMMU, Faulted: h.Faulted, Wanted: h.Wanted})
	}
	if err != nil {
		return nil, err // fn is no nil interface
	}
	if w == vfio {
		return fn, nil
	}
	e, err := expose(f.Address, fn, h.Lost)
	if err != nil {
		return nil, err
	}
	return e, nil
}

// way is how a function is driven.
type way uint8

const (
	vfio way = iota // behind an IOMMU
	vfioNoIOMMU
	sysfs
)

// choose returns the way to a function as it is now.
func (m host) choose(f *pcifn.Function) (way, error) {
	switch {
	case f.Group != "" && !f.NoIOMMU:
		return vfio, nil
	case !m.unsafeNoIOMMU:
		return 0, fmt.Errorf("no IOMMU stands between it and all memory of the machine, so that its firmware, and a mistake in one of its commands, reach everything: "+
			"enable it (in the firmware's set-up, and intel_iommu=on or amd_iommu=on for the kernel), or give the guests nvme: or block: on the kernel's driver, or insist with --unsafe-no-iommu: %w", unix.EPERM)
	case f.VFIO():
		return vfioNoIOMMU, nil
	case f.Driver != "":
		return 0, fmt.Errorf("the kernel's driver %s has it: take it away first, and its disks with it: guestdrv bind %s: %w", f.Driver, f.Address, unix.EBUSY)
	}
	return sysfs, nil
}
