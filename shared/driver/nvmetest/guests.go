package nvmetest

import (
	"errors"
	"sync"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Guests is a Device as the process finds it that drives it for guests, whose memory it reaches piece by piece as by VFIO. It is all on the heap.
type Guests struct {
	device.Device
	model *Device
	gone  func()

	mu      sync.Mutex
	regions map[*byte]*shm.Region // by their first byte
}

// ForGuests opens d for one driver at a time.
func (d *Device) ForGuests() *Guests {
	in := d.InProc()
	return &Guests{Device: in, model: d, gone: in.Gone, regions: map[*byte]*shm.Region{}}
}

// Memory returns n bytes, whole pages, of a guest's.
func (g *Guests) Memory(n int) []byte {
	r := shm.NewHeap(n)
	b, _ := r.Bytes(0, uint64(n)) // it is as long as that
	g.mu.Lock()
	defer g.mu.Unlock()
	g.regions[&b[0]] = r
	return b
}

// MapDMA lets the Device reach memory that Memory gave, as a whole.
func (g *Guests) MapDMA(mem []byte) (iova uint64, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.regions[&mem[0]]
	if r == nil || r.Len() != uint64(len(mem)) {
		return 0, errors.New("no memory of a guest")
	}
	return g.model.Reach(r), nil
}

// UnmapDMA takes it back.
func (g *Guests) UnmapDMA(iova, _ uint64) error {
	if !g.model.Forget(iova) {
		return errors.New("not mapped")
	}
	return nil
}

// Gone pulls the function out.
func (g *Guests) Gone() { g.gone() }

// Sever ends the connection, as Close does.
func (g *Guests) Sever() { _ = g.Close() }

// Scattered are Guests whose memory the Device finds in several places, as without an IOMMU.
type Scattered struct {
	*Guests
	run    int
	pieces map[*byte][]uint64 // their IOVAs, by the mapping's first byte
}

// Scattered finds run pages in each place.
func (g *Guests) Scattered(run int) *Scattered {
	return &Scattered{Guests: g, run: run, pieces: map[*byte][]uint64{}}
}

// MapPages lets the Device reach memory that Memory gave, and returns where each page is.
func (g *Scattered) MapPages(mem []byte) (addresses []uint64, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.regions[&mem[0]]
	if r == nil || r.Len() != uint64(len(mem)) {
		return nil, errors.New("no memory of a guest")
	}
	size := uint64(g.run) * shm.PageSize
	for at := uint64(0); at < r.Len(); at += size {
		piece, err := r.View(at, min(size, r.Len()-at))
		if err != nil {
			return nil, err
		}
		iova := g.model.Reach(piece)
		g.pieces[&mem[0]] = append(g.pieces[&mem[0]], iova)
		for off := uint64(0); off < piece.Len(); off += shm.PageSize {
			addresses = append(addresses, iova+off)
		}
	}
	return addresses, nil
}

// UnmapPages takes it back.
func (g *Scattered) UnmapPages(mem []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, iova := range g.pieces[&mem[0]] {
		if !g.model.Forget(iova) {
			return errors.New("not mapped")
		}
	}
	delete(g.pieces, &mem[0])
	return nil
}
