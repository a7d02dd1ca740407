package hostmed

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// A client in this process: no socket, no messages, no mapping. It has the same session as any other client, and what it asks for
// runs on the same goroutines; but its memory may be heap memory, so that the race detector sees both sides of each queue.

// functionTimeout is how long the session may take to answer.
const functionTimeout = 10 * time.Second

// Function is the PCI function of one controller, with MSI-X and bus mastering on and its pin disabled, for a client in this process.
// Its methods may be called from any goroutine. They do what vfio-user's messages of the same meaning do, and end within some
// seconds.
type Function struct {
	s *session
}

// Attach makes the caller the client of the controller behind socket, until Function.Close. A controller has one client at a time,
// whichever way it came. Mediator.Run need not be called for it.
func (m *Mediator) Attach(socket string) (*Function, error) {
	m.mu.Lock()
	p := m.port(socket)
	m.mu.Unlock()
	if p == nil {
		return nil, fmt.Errorf("no controller has the socket %s", socket)
	}
	s, err := p.attach()
	if err != nil {
		return nil, fmt.Errorf("controller %s: %w", socket, err)
	}
	f := &Function{s}
	if err := f.master(); err != nil {
		f.Close()
		return nil, fmt.Errorf("controller %s: %w", socket, err)
	}
	return f, nil
}

func (p *port) attach() (*session, error) {
	old, err := p.free()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return nil, errShutdown
	case p.session != old: // somebody came meanwhile
		return nil, errBusy
	}
	s, err := p.newSession(-1)
	if err == nil {
		p.session = s
	}
	return s, err
}

// call runs f on the session's goroutine. Doorbells that were rung before have been taken by then, as on a bus, where no access passes a
// posted write. What f writes is the caller's only if call returns nil.
func (f *Function) call(run func(*device) error) error {
	s := f.s
	result := make(chan error, 1)
	over := make(chan struct{})
	s.home.Post(func() {
		s.do(call{
			run:  func() { result <- run(&device{s}) },
			done: func() { close(over) },
		})
	})
	timer := time.NewTimer(functionTimeout)
	defer timer.Stop()
	select {
	case <-over:
	case <-s.done:
	case <-timer.C:
		return fmt.Errorf("the controller did not answer in %v", functionTimeout)
	}
	select {
	case err := <-result:
		return err
	default: // it has ended, or f has met memory that is gone, and it is about to
		return cmp.Or(f.Err(), errNotAttached)
	}
}

// master does what every client begins with.
func (f *Function) master() error {
	const command, bits = 0x04, 1<<1 | 1<<2 | 1<<10 // memory, bus master, no INTx
	return f.call(func(d *device) error {
		return d.RegionWrite(vfiouser.RegionConfig, command, binary.LittleEndian.AppendUint16(nil, bits))
	})
}

// BAR0Size is the size of BAR0 in bytes, doorbells included.
func (f *Function) BAR0Size() uint64 { return f.s.cfg.BARSize(pci.BARRegisters) }

// Vectors is how many MSI-X vectors there are.
func (f *Function) Vectors() int { return int(f.s.cfg.Vectors()) }

// Doorbells is the memory of the doorbell registers in mode Mmap, from nvme.DoorbellBase of BAR0 on; otherwise nil.
func (f *Function) Doorbells() (*shm.Region, error) {
	bar := f.s.data.Doorbells()
	if bar == nil {
		return nil, nil
	}
	return bar.View(nvme.DoorbellBase, bar.Len()-nvme.DoorbellBase)
}

// Read32 and Read64 read a register at byte offset off of BAR0, below the doorbells; Write32 and Write64 write one and return when
// that is done.
func (f *Function) Read32(off uint32) (uint32, error) {
	v, err := f.read(off, 4)
	return uint32(v), err
}

// Read64 is Read32 for 8 bytes.
func (f *Function) Read64(off uint32) (uint64, error) { return f.read(off, 8) }

func (f *Function) read(off uint32, size int) (uint64, error) {
	value := make(chan uint64, 1)
	err := f.call(func(d *device) error {
		var b [8]byte
		err := d.RegionRead(vfiouser.RegionBAR0, uint64(off), b[:size])
		value <- binary.LittleEndian.Uint64(b[:])
		return err
	})
	if err != nil {
		return 0, err
	}
	return <-value, nil
}

// Write32 writes a register of 4 bytes.
func (f *Function) Write32(off, v uint32) error {
	return f.write(off, binary.LittleEndian.AppendUint32(nil, v))
}

// Write64 writes a register of 8 bytes.
func (f *Function) Write64(off uint32, v uint64) error {
	return f.write(off, binary.LittleEndian.AppendUint64(nil, v))
}

func (f *Function) write(off uint32, b []byte) error {
	return f.call(func(d *device) error { return d.RegionWrite(vfiouser.RegionBAR0, uint64(off), b) })
}

// Ring writes the doorbell register at byte offset off of BAR0, as a posted write: it returns at once.
func (f *Function) Ring(off, v uint32) error {
	s := f.s
	if s.hungUp() {
		return f.Err()
	}
	s.home.Post(func() {
		if !s.asleep.Load() {
			s.data.Doorbell(s.home, uint64(off)-nvme.DoorbellBase, v)
		}
	})
	return nil
}

// Map lets the controller reach mem at iova. It stays the caller's, who keeps it until Unmap returns nil or Done is closed.
func (f *Function) Map(iova uint64, mem *shm.Region, writable bool) error {
	return f.call(func(d *device) error {
		if err := d.mem.MapRegion(iova, mem, writable); err != nil {
			return err
		}
		d.ctl.MemoryGained()
		d.data.Mapped()
		return nil
	})
}

// Unmap takes [iova, iova+size) back. When it returns nil the controller touches none of it any more.
func (f *Function) Unmap(iova, size uint64) error {
	return f.call(func(d *device) error { return d.DMAUnmap(iova, size, 0) })
}

// SetVectors gives the first vectors an eventfd each. The fds are the function's, whatever it returns.
func (f *Function) SetVectors(fds []int) error {
	r := vfiouser.SetIRQs{
		Flags: vfiouser.IRQSetDataEventFD | vfiouser.IRQSetTrigger, Index: vfiouser.IRQMSIX, Count: uint32(len(fds)),
	}
	if len(fds) > f.Vectors() {
		closeAll(fds)
		return fmt.Errorf("%d interrupt vectors, the function has %d: %w", len(fds), f.Vectors(), unix.EINVAL)
	}
	taken := make(chan struct{}, 1)
	err := f.call(func(d *device) error {
		taken <- struct{}{}
		return d.SetIRQs(r, fds)
	})
	if errors.Is(err, errNotAttached) && len(taken) == 0 {
		closeAll(fds)
	}
	return err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Reset resets the function, as an FLR does. Memory and eventfds stay.
func (f *Function) Reset() error {
	if err := f.call((*device).Reset); err != nil {
		return err
	}
	return f.master()
}

// errNotAttached is what calls end with after Done.
var errNotAttached = errors.New("the controller was detached")

// Done is closed when the function has ended, by Close or by the mediator. Nothing touches its memory any more.
func (f *Function) Done() <-chan struct{} { return f.s.done }

// Err says why the function has ended, or is about to; nil if it has not.
func (f *Function) Err() error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.s.over == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", errNotAttached, f.s.over)
}

// Close gives the controller back, as the end of a connection does, and returns when nothing touches the client's memory any more. It may be
// called more than once.
func (f *Function) Close() error {
	f.s.end(io.EOF)
	<-f.s.done
	return nil
}
