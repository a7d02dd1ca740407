// Package volatile is a file on a disk that loses power. The disk has a write cache, and at any moment Cut says what would be on it if
// that moment were the last: everything that was synced, and of the rest whatever chance had written out.
//
// A process that is killed loses nothing that it gave to the kernel, so killing proves little about flushes. This does: the file is in a file system
// of its own (FUSE), served by the caller, which sees every write, fsync and O_DSYNC.
package volatile

import (
	"math/rand/v2"
	"sync"
)

// sector is what a disk writes as a whole.
const sector = 512

// Disk is the medium. It is safe for concurrent use.
type Disk struct {
	// Lying makes the disk say that it has synced and do nothing: what a check that works must find out. It is set before Mount.
	Lying bool

	mu    sync.Mutex // guards all below
	now   []byte     // as readers see it
	safe  []byte     // as it would be after a cut, at the least
	dirty map[int64]struct{}
	stats Stats
}

// Stats count what came.
type Stats struct {
	Writes  int // plain ones
	Durable int // writes with O_DSYNC, or RWF_DSYNC
	Syncs   int // fsync and fdatasync
}

// New returns a disk of size bytes, all zero.
func New(size int64) *Disk {
	return &Disk{now: make([]byte, size), safe: make([]byte, size), dirty: map[int64]struct{}{}}
}

// Stats returns what has come so far.
func (d *Disk) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// Cut returns what would be on the disk if the power failed now. Each sector that is not synced is new with the probability p and
// old otherwise, so that what was written can be torn, and later writes can be there without earlier ones.
func (d *Disk) Cut(r *rand.Rand, p float64) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	image := append([]byte(nil), d.safe...)
	for s := range d.dirty {
		if r.Float64() < p {
			copy(image[s*sector:(s+1)*sector], d.now[s*sector:])
		}
	}
	return image
}

func (d *Disk) size() int64 { return int64(len(d.now)) }

func (d *Disk) read(p []byte, off int64) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off < 0 || off > d.size() {
		return 0
	}
	return copy(p, d.now[off:])
}

// write takes p, or n zeroes if p is nil.
func (d *Disk) write(p []byte, off, n int64, durable bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off < 0 || n < 0 || off > d.size() || n > d.size()-off {
		return false
	}
	if durable {
		d.stats.Durable++
	} else {
		d.stats.Writes++
	}
	if p == nil {
		clear(d.now[off : off+n])
	} else {
		copy(d.now[off:], p)
	}
	for s := off / sector; s*sector < off+n; s++ {
		d.dirty[s] = struct{}{}
		if durable {
			d.settle(s)
		}
	}
	return true
}

func (d *Disk) sync() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Syncs++
	for s := range d.dirty {
		d.settle(s)
	}
}

// settle writes a sector out; the lock is held.
func (d *Disk) settle(s int64) {
	if d.Lying {
		return
	}
	copy(d.safe[s*sector:(s+1)*sector], d.now[s*sector:])
	delete(d.dirty, s)
}
