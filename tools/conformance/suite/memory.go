package suite

import (
	"bytes"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const (
	pageSize = 4096
	// chunkSize is what is taken from the device at a time: a huge page, within which memory is contiguous for any device.
	chunkSize = 2 << 20
	maxChunks = 12
)

// arena is the memory of one case: handed out page by page, taken back all at once.
type arena struct {
	dev    device.Device
	chunks []*device.DMARegion
	chunk  int    // the one being handed out
	used   uint64 // of it
	align  uint64 // CC.MPS in bytes
}

func (a *arena) reset() { a.chunk, a.used, a.align = 0, 0, pageSize }

func (a *arena) close() {
	for _, m := range a.chunks {
		_ = m.Free()
	}
	a.chunks = nil
}

// take returns n bytes, whole pages, zeroed and contiguous for the device.
func (a *arena) take(n uint64) (buf, error) {
	n = (n + a.align - 1) &^ (a.align - 1)
	a.used = (a.used + a.align - 1) &^ (a.align - 1)
	if n > chunkSize {
		return buf{}, fmt.Errorf("%d bytes of contiguous memory, there are at most %d", n, chunkSize)
	}
	if a.chunk < len(a.chunks) && a.used+n > chunkSize {
		a.chunk, a.used = a.chunk+1, 0
	}
	if a.chunk == len(a.chunks) {
		if a.chunk == maxChunks {
			return buf{}, fmt.Errorf("the case uses more than %d bytes of memory", maxChunks*chunkSize)
		}
		m, err := a.dev.AllocDMA(chunkSize)
		if err != nil {
			return buf{}, err
		}
		a.chunks = append(a.chunks, m)
	}
	m := a.chunks[a.chunk]
	v, err := m.View(a.used, n)
	if err != nil {
		return buf{}, err
	}
	b := buf{mem: v, iova: m.IOVAOf(a.used), n: n}
	a.used += n
	return b, v.Zero(0, n)
}

// buf is memory that the device can reach.
type buf struct {
	mem  *shm.Region
	iova uint64
	n    uint64
}

// alloc returns n bytes of zeroed memory that begin at a page.
func (c *ctl) alloc(n uint64) buf {
	b, err := c.mem.take(n)
	c.must(err)
	return b
}

// page returns one page.
func (c *ctl) page() buf { return c.alloc(pageSize) }

// The accessors panic on a range that is not there: a mistake of the case, not of the controller.

func (b buf) read(off, n uint64) []byte {
	p := make([]byte, n)
	if err := b.mem.Read(off, p); err != nil {
		panic(err)
	}
	return p
}

func (b buf) write(off uint64, p []byte) {
	if err := b.mem.Write(off, p); err != nil {
		panic(err)
	}
}

func (b buf) fill(v byte) buf {
	b.write(0, bytes.Repeat([]byte{v}, int(b.n)))
	return b
}

func (b buf) all() []byte { return b.read(0, b.n) }

// is reports whether the n bytes from off are all v.
func (b buf) is(off, n uint64, v byte) bool {
	return bytes.Count(b.read(off, n), []byte{v}) == int(n)
}
