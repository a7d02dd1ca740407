package physical

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/uring"
)

// How memory is pinned:
//
//  1. It is mapped a second time, where nobody touches it (another).
//  2. io_uring takes that as registered buffers: the kernel pins the pages for long (FOLL_LONGTERM), moves them out of zones that are to stay movable before,
//     and makes pages where the file had holes. mlock would not do: what is locked may still be moved.
//  3. pagemap says where the pages of the second mapping are. It goes; the pins stay.
//
// The second mapping is why an address is that of a page that is pinned. Whoever shares the file may punch a hole into it at any time (FALLOC_FL_PUNCH_HOLE). In a mapping that
// is in use another page comes in its place with the next access, which pagemap would tell and nobody has pinned: soon it is somebody else's, and the function writes to it. In one
// that nobody touches only the pin itself has brought pages in, and there the place is empty afterwards, which is an error.
//
// After that a hole hurts nobody but its maker: the page that is pinned is no longer the file's, and is given back when the pin is. The same is true of a file that is cut off.

const (
	places = 1 << 14 // of a ring's table: the kernel's limit
	piece  = 1 << 30 // bytes of one: the kernel's limit
)

// table is what Pins needs of a uring.Ring.
type table interface {
	RegisterSparseBuffers(n int) error
	UpdateBuffers(at int, bufs [][]byte) error
	FD() int
	Close() error
}

// Pins is memory that stays where it is. It is safe for concurrent use.
type Pins struct {
	mu   sync.Mutex
	ring table // nil: closed
	next int   // first place that was never used
	free []int
	held map[held][]int // places
}

// held is memory by its address in this process.
type held struct {
	at   uintptr
	size int
}

// NewPins returns Pins with nothing in it.
func NewPins() (*Pins, error) {
	r, err := uring.New(uring.Config{Entries: 1})
	if err != nil {
		return nil, fmt.Errorf("to pin memory takes an io_uring: %w", err)
	}
	p, err := newPins(r)
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return p, nil
}

func newPins(r table) (*Pins, error) {
	if err := r.RegisterSparseBuffers(places); err != nil {
		return nil, fmt.Errorf("to pin memory: %w", err)
	}
	return &Pins{ring: r, held: map[held][]int{}}, nil
}

// Pin keeps mem where it is until Unpin, and returns where each of its pages of 4 KiB is. It is all of one mapping of a file in memory, such as a memfd, or a part
// of it, that this process may write to.
func (p *Pins) Pin(mem []byte) (addresses []uint64, err error) {
	if len(mem) == 0 || (addressOf(mem)|uintptr(len(mem)))%shm.PageSize != 0 {
		return nil, fmt.Errorf("%d bytes at %#x are not pages", len(mem), addressOf(mem))
	}
	view, err := another(mem)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, view.unmap()) }()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ring == nil {
		return nil, errClosed
	}
	key := held{addressOf(mem), len(mem)}
	if p.held[key] != nil {
		return nil, errors.New("the memory is pinned already")
	}
	taken, err := p.take(view.mem)
	if err != nil {
		return nil, err
	}
	if addresses, err = Addresses(view.mem, shm.PageSize); err != nil {
		return nil, errors.Join(fmt.Errorf("physical addresses: %w", err), p.release(taken))
	}
	p.held[key] = taken
	return addresses, nil
}

var errClosed = errors.New("memory is not pinned any more")

// take pins b. mu is held.
func (p *Pins) take(b []byte) (taken []int, err error) {
	for ; len(b) > 0; b = b[min(piece, len(b)):] {
		var at int
		switch n := len(p.free) - 1; {
		case n >= 0:
			at, p.free = p.free[n], p.free[:n]
		case p.next < places:
			at = p.next
			p.next++
		default:
			return nil, errors.Join(fmt.Errorf("an io_uring pins %d pieces of memory, and all are in use", places), p.release(taken))
		}
		if err := p.ring.UpdateBuffers(at, [][]byte{b[:min(piece, len(b))]}); err != nil {
			p.free = append(p.free, at)
			return nil, errors.Join(err, p.release(taken))
		}
		taken = append(taken, at)
	}
	return taken, nil
}

// release unpins what is at places. One that cannot be emptied is not used again. mu is held.
func (p *Pins) release(taken []int) (err error) {
	for _, at := range taken {
		if e := p.ring.UpdateBuffers(at, [][]byte{nil}); e != nil {
			err = errors.Join(err, e)
			continue
		}
		p.free = append(p.free, at)
	}
	return err
}

// Unpin takes back a Pin. No function reaches mem any more.
func (p *Pins) Unpin(mem []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := held{addressOf(mem), len(mem)}
	taken := p.held[key]
	delete(p.held, key)
	if p.ring == nil {
		return nil
	}
	return p.release(taken)
}

// File returns a file that holds all memory that is pinned now and later, also after the end of this process, until it is closed. It is of no other use.
func (p *Pins) File() (*os.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ring == nil {
		return nil, errClosed
	}
	fd, err := unix.FcntlInt(uintptr(p.ring.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pinned memory"), nil
}

// Close lets go of everything, unless a File is open.
func (p *Pins) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ring == nil {
		return nil
	}
	r := p.ring
	p.ring = nil
	clear(p.held)
	return r.Close()
}
