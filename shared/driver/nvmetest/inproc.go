package nvmetest

import (
	"errors"
	"sync"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// inProc is the driver's end of a Device in the same process.
type inProc struct {
	d    *Device
	once sync.Once
	done chan struct{}
	err  error
}

// InProc returns the Device as the driver sees it, with DMA memory on the heap. Gone, on what it returns, ends it as the death of
// a server would.
func (d *Device) InProc() interface {
	device.Device
	Gone()
} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cfg.Mapped && d.page == nil {
		d.page = shm.NewHeap(4096)
	}
	return &inProc{d: d, done: make(chan struct{})}
}

func (p *inProc) end(err error) {
	p.once.Do(func() {
		p.err = err
		close(p.done)
	})
}

// Gone ends the connection.
func (p *inProc) Gone() { p.end(device.ErrGone) }

func (p *inProc) check() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

func (p *inProc) Read32(off uint32) (uint32, error) {
	if err := p.check(); err != nil {
		return 0, err
	}
	return uint32(p.d.read(off, 4)), nil
}

func (p *inProc) Read64(off uint32) (uint64, error) {
	if err := p.check(); err != nil {
		return 0, err
	}
	return p.d.read(off, 8), nil
}

func (p *inProc) Write32(off uint32, v uint32) error {
	if err := p.check(); err != nil {
		return err
	}
	p.d.write(off, uint64(v))
	return nil
}

func (p *inProc) Write64(off uint32, v uint64) error {
	if err := p.check(); err != nil {
		return err
	}
	p.d.write(off, v)
	return nil
}

func (p *inProc) RegisterSpace() uint64 { return 0x2000 }

func (p *inProc) Doorbell(off uint32) device.Doorbell {
	if p.d.page != nil {
		if w, err := p.d.page.Word32(uint64(off - nvme.DoorbellBase)); err == nil {
			return device.Doorbell{Mapped: w, Ring: func(v uint32) error { w.Store(v); return nil }}
		}
	}
	return device.Doorbell{Ring: func(v uint32) error {
		if err := p.check(); err != nil {
			return err
		}
		p.d.ring(off, v)
		return nil
	}}
}

func (p *inProc) AllocDMA(size uint64) (*device.DMARegion, error) {
	mem := shm.NewHeap(int(size))
	iova := p.d.Reach(mem)
	return device.NewDMARegion(mem, iova, func() error { p.d.Forget(iova); return nil }), nil
}

func (p *inProc) MaxInterrupts() int { return len(p.d.vectors) }

func (p *inProc) Interrupts(n int) ([]int, error) {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	return device.EventFDs(n, len(p.d.vectors), func(fds []int) error {
		own, err := device.Duplicates(fds)
		if err != nil {
			return err
		}
		copy(p.d.vectors, own)
		p.d.ownFDs = true
		return nil
	})
}

func (p *inProc) Reset() error          { return p.d.resetFunction() }
func (p *inProc) Done() <-chan struct{} { return p.done }
func (p *inProc) Err() error            { return p.check() }
func (p *inProc) PeerPID() int          { return 0 }
func (p *inProc) Unmap() error          { return nil }

func (p *inProc) Close() error {
	p.end(errors.New("closed"))
	// As when a connection ends: the device forgets the driver.
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.d.cc = 0
	p.d.reset()
	p.d.dropVectors()
	return nil
}
