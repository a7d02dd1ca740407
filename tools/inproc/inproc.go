// Package inproc lets guestdrv drive a controller of hostmed in the same process: no socket, no mapping, all shared memory on the heap.
// So the race detector sees both sides of every queue, doorbell and buffer, which it cannot in mapped memory.
//
// That it does was tried: with the driver's tail, the completion's phase word or the event index stored plainly, each alone, the tests of this
// package end in reports of races that name a goroutine of either side.
//
// It is where the two meet, since neither imports the other. Registers and doorbells are calls, shared doorbell pages are heap
// memory that a worker of hostmed polls, interrupts are eventfds.
package inproc

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// dmaBase is where DMA memory begins in IOVA space, as package vfiouser has it.
const dmaBase = 1 << 32

// Device is a [device.Device] over a controller of hostmed.
type Device struct {
	f        *hostmed.Function
	bells    *shm.Region // mode Mmap; nil: calls
	nextIOVA atomic.Uint64

	done chan struct{}
	once sync.Once
	err  error // written before done is closed
}

var _ device.Device = (*Device)(nil)

// Open attaches to the controller of m behind socket, which need not exist as a file: see hostmed.Config.NoSockets.
func Open(m *hostmed.Mediator, socket string) (*Device, error) {
	f, err := m.Attach(socket)
	if err != nil {
		return nil, err
	}
	d := &Device{f: f, done: make(chan struct{})}
	d.nextIOVA.Store(dmaBase)
	if d.bells, err = f.Doorbells(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	go func() {
		<-f.Done()
		d.end(f.Err())
	}()
	return d, nil
}

func (d *Device) end(why error) {
	d.once.Do(func() {
		d.err = fmt.Errorf("%w: %w", device.ErrGone, why)
		close(d.done)
	})
}

// gone says so if err is that the controller has ended.
func (d *Device) gone(err error) error {
	if err != nil && d.f.Err() != nil {
		return fmt.Errorf("%w: %w", device.ErrGone, err)
	}
	return err
}

func failed(what string, off uint32, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", what, nvme.RegisterName(off), err)
}

// Read32, Read64, Write32 and Write64 are calls of the controller's goroutine.
func (d *Device) Read32(off uint32) (uint32, error) {
	v, err := d.f.Read32(off)
	return v, failed("reading", off, d.gone(err))
}

// Read64 reads a register of 8 bytes.
func (d *Device) Read64(off uint32) (uint64, error) {
	v, err := d.f.Read64(off)
	return v, failed("reading", off, d.gone(err))
}

// Write32 writes a register of 4 bytes.
func (d *Device) Write32(off uint32, v uint32) error {
	return failed("writing", off, d.gone(d.f.Write32(off, v)))
}

// Write64 writes a register of 8 bytes.
func (d *Device) Write64(off uint32, v uint64) error {
	return failed("writing", off, d.gone(d.f.Write64(off, v)))
}

// RegisterSpace returns the size of BAR0 in bytes.
func (d *Device) RegisterSpace() uint64 { return d.f.BAR0Size() }

// Doorbell returns the doorbell at off. To ring it is a call, or a store where the worker polls it.
func (d *Device) Doorbell(off uint32) device.Doorbell {
	if d.bells != nil && off >= nvme.DoorbellBase {
		if w, err := d.bells.Word32(uint64(off - nvme.DoorbellBase)); err == nil {
			return device.Doorbell{Mapped: w, Ring: func(v uint32) error {
				w.Store(v)
				return nil
			}}
		}
	}
	return device.Doorbell{Ring: func(v uint32) error { return d.gone(d.f.Ring(off, v)) }}
}

// AllocDMA returns heap memory that the controller has been told of.
func (d *Device) AllocDMA(size uint64) (*device.DMARegion, error) {
	size = (size + shm.PageSize - 1) &^ (shm.PageSize - 1)
	mem := shm.NewHeap(int(size))
	iova := d.nextIOVA.Add(size) - size
	if err := d.f.Map(iova, mem, true); err != nil {
		return nil, fmt.Errorf("%d bytes of DMA memory: %w", size, d.gone(err))
	}
	return device.NewDMARegion(mem, iova, func() error {
		select {
		case <-d.f.Done(): // it has let go of all memory
			return nil
		default:
			return d.f.Unmap(iova, size)
		}
	}), nil
}

// MaxInterrupts returns the number of MSI-X vectors.
func (d *Device) MaxInterrupts() int { return d.f.Vectors() }

// Interrupts makes n eventfds and gives the controller descriptors of its own for them, as a socket would.
func (d *Device) Interrupts(n int) ([]int, error) {
	return device.EventFDs(n, d.f.Vectors(), func(fds []int) error {
		theirs, err := device.Duplicates(fds)
		if err != nil {
			return err
		}
		return d.gone(d.f.SetVectors(theirs))
	})
}

// Reset resets the function.
func (d *Device) Reset() error { return d.gone(d.f.Reset()) }

// Done is closed when the controller has ended; Err says why.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why Done is closed.
func (d *Device) Err() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// PeerPID returns 0: there is no other process.
func (d *Device) PeerPID() int { return 0 }

// Isolated says that the controller can reach no memory but what AllocDMA gave.
func (d *Device) Isolated() bool { return true }

// Close gives the controller back. When it returns, the controller touches no memory.
func (d *Device) Close() error {
	err := d.f.Close()
	<-d.done
	return err
}

// Unmap does nothing: nothing is mapped.
func (d *Device) Unmap() error { return nil }
