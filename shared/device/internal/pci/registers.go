package pci

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Area is a mapped part of BAR0.
type Area struct {
	Off uint64
	Mem *shm.Region
}

// Access reaches what is not mapped, each access as one of its own.
type Access interface {
	ReadBAR(p []byte, off uint64) error
	WriteBAR(p []byte, off uint64) error
}

// Registers are BAR0. Its exported fields are set before the first use.
type Registers struct {
	Size  uint64
	Areas []Area
	Slow  Access // nil: what no area covers cannot be reached
	Gone  *Ending
	// Answers reads configuration space, for which the kernel has one wait while it resets the function. An error says that the function is not there.
	Answers func() error
}

// Ending says once that a function can no longer be reached, and why.
type Ending struct {
	once sync.Once
	done chan struct{}
	err  error
}

// NewEnding returns one that has not happened.
func NewEnding() *Ending { return &Ending{done: make(chan struct{})} }

// End makes it happen; only the first call counts.
func (e *Ending) End(err error) {
	e.once.Do(func() {
		e.err = err
		close(e.done)
	})
}

// Done is closed when it has happened.
func (e *Ending) Done() <-chan struct{} { return e.done }

// Err returns why, nil if it has not.
func (e *Ending) Err() error {
	select {
	case <-e.done:
		return e.err
	default:
		return nil
	}
}

// find returns the mapped part that holds n bytes at off, and off in it; nil if there is none.
func (r *Registers) find(off, n uint64) (*shm.Region, uint64) {
	for _, a := range r.Areas {
		if off >= a.Off && off+n <= a.Off+a.Mem.Len() {
			return a.Mem, off - a.Off
		}
	}
	return nil, 0
}

func accessError(off uint32, err error) error {
	return fmt.Errorf("register %s: %w", nvme.RegisterName(off), err)
}

func (r *Registers) word32(off uint32) (*atomic.Uint32, error) {
	if mem, at := r.find(uint64(off), 4); mem != nil {
		return mem.Word32(at)
	}
	return nil, r.slow(off, 4)
}

func (r *Registers) word64(off uint32) (*atomic.Uint64, error) {
	if mem, at := r.find(uint64(off), 8); mem != nil {
		return mem.Word64(at)
	}
	return nil, r.slow(off, 8)
}

// slow reports whether n bytes at off can be reached without a mapping.
func (r *Registers) slow(off, n uint32) error {
	if uint64(off)+uint64(n) > r.Size || r.Slow == nil {
		return fmt.Errorf("BAR0 has %#x bytes: %w", r.Size, shm.ErrRange)
	}
	if off%n != 0 {
		return fmt.Errorf("offset %#x: %w", off, shm.ErrAlign)
	}
	return nil
}

// ReadCommand reads the command register by read, which is of configuration space. The error wraps [device.ErrGone] if the function is not there.
func ReadCommand(read func(p []byte, off int64) error) (uint16, error) {
	var b [2]byte
	if err := read(b[:], RegCommand); err != nil {
		return 0, fmt.Errorf("PCI command register: %w", err)
	}
	v := binary.LittleEndian.Uint16(b[:])
	if v == 0xffff {
		return 0, fmt.Errorf("PCI command register: %w: it reads as all ones", device.ErrGone)
	}
	return v, nil
}

// Read32 reads a register. All ones may be no value: see present.
func (r *Registers) Read32(off uint32) (uint32, error) {
	v, err := r.load32(off)
	if err == nil && v == ^uint32(0) {
		if err = r.present(); err == nil {
			v, err = r.load32(off)
		}
	}
	if err != nil {
		return 0, accessError(off, err)
	}
	return v, nil
}

// Read64 is Read32 for 64 bits. No controller has a CAP of zero either.
func (r *Registers) Read64(off uint32) (uint64, error) {
	v, err := r.load64(off)
	if err == nil && (v == ^uint64(0) || v == 0 && off == nvme.RegCAP) {
		if err = r.present(); err == nil {
			v, err = r.load64(off)
		}
	}
	if err != nil {
		return 0, accessError(off, err)
	}
	return v, nil
}

// present returns an error if the function has gone. Of one that is not there the bus reads all ones, and some virtual machines zeroes; so it does while
// somebody else resets the function, whose memory space is off then. Its configuration space tells the one from the other.
func (r *Registers) present() error {
	what, err := r.nothing()
	if what == "" || err != nil {
		return err
	}
	if r.Answers() == nil {
		if what, err = r.nothing(); what == "" || err != nil {
			return err
		}
	}
	r.Gone.End(fmt.Errorf("%w: its registers read as %s: it was pulled out, or its link is down", device.ErrGone, what))
	return r.Gone.Err()
}

// nothing says what registers read as where no controller is, and "" where one is. No controller has a VS of zero, nor of all ones.
func (r *Registers) nothing() (string, error) {
	switch v, err := r.load32(nvme.RegVS); {
	case err != nil:
		return "", err
	case v == 0:
		return "zeroes", nil
	case v == ^uint32(0):
		return "all ones", nil
	}
	return "", nil
}

func (r *Registers) load32(off uint32) (uint32, error) {
	w, err := r.word32(off)
	if err != nil {
		return 0, err
	}
	if w != nil {
		return w.Load(), nil
	}
	var b [4]byte
	err = r.Slow.ReadBAR(b[:], uint64(off))
	return binary.LittleEndian.Uint32(b[:]), err
}

func (r *Registers) load64(off uint32) (uint64, error) {
	w, err := r.word64(off)
	if err != nil {
		return 0, err
	}
	if w != nil {
		return w.Load(), nil
	}
	var b [8]byte
	err = r.Slow.ReadBAR(b[:], uint64(off))
	return binary.LittleEndian.Uint64(b[:]), err
}

// Write32 writes a register.
func (r *Registers) Write32(off uint32, v uint32) error {
	w, err := r.word32(off)
	if err == nil {
		if w != nil {
			store32(w, v)
			return nil
		}
		err = r.Slow.WriteBAR(binary.LittleEndian.AppendUint32(nil, v), uint64(off))
	}
	if err != nil {
		return accessError(off, err)
	}
	return nil
}

// Write64 writes a register.
func (r *Registers) Write64(off uint32, v uint64) error {
	w, err := r.word64(off)
	if err == nil {
		if w != nil {
			store64(w, v)
			return nil
		}
		err = r.Slow.WriteBAR(binary.LittleEndian.AppendUint64(nil, v), uint64(off))
	}
	if err != nil {
		return accessError(off, err)
	}
	return nil
}

// RegisterSpace returns the size of BAR0.
func (r *Registers) RegisterSpace() uint64 { return r.Size }

// Doorbell returns a doorbell register. It is no memory: each value has to be written.
func (r *Registers) Doorbell(off uint32) device.Doorbell {
	w, err := r.word32(off)
	switch {
	case err != nil:
		return device.Doorbell{Ring: func(uint32) error { return fmt.Errorf("doorbell at %#x: %w", off, err) }}
	case w != nil:
		return device.Doorbell{Ring: func(v uint32) error {
			store32(w, v)
			return nil
		}}
	}
	var b [4]byte // one caller at a time: the queue that owns the doorbell
	return device.Doorbell{Ring: func(v uint32) error {
		binary.LittleEndian.PutUint32(b[:], v)
		return r.Slow.WriteBAR(b[:], uint64(off))
	}}
}

// Unmap takes the mapped parts away. It is the last call.
func (r *Registers) Unmap() error {
	var err error
	for _, a := range r.Areas {
		if e := a.Mem.Close(); err == nil {
			err = e
		}
	}
	return err
}
