// Package dbbuf is the shared doorbell page: Doorbell Buffer Config of NVMe Base 2.0c 5.8 and B.5,
// and Google's vendor command of 2014, which has the same layout. It has both
// halves of the handshake:
//
//	driver: entries; shadow.Store(new); ei.Load(); ring iff ei in [old, new)    Publish
//	device: ei.Store(consumed); tail.Load(); sleep iff the tail stood still     Arm
//
// Either the driver sees the event index and rings, or the device sees the new
// tail and stays awake: both sides store, then load, and sync/atomic makes both
// sequentially consistent (R1, R2). model/ checks it with SPIN. The stores are Swaps: the same XCHG on x86-64, but
// the race detector makes of a Store a mere release, and a lost wake-up after some thousand sleeps.
//
// The same two types serve the other doorbells: registers that are written by MMIO, and a
// doorbell page that is mapped into the driver. The package neither rings nor
// sleeps by itself, and owns no memory.
package dbbuf

import (
	"fmt"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// QuietBit in a CQ head doorbell says: the driver polls this CQ, send no interrupt. It is a vendor
// extension (nvme.FeatureQuiet), and nobody sees it who did not turn it on.
const QuietBit = nvme.QuietBit

// Slots returns the words of queue qid in a doorbell or event-index page: SQ tail at
// 2*qid*stride, CQ head one stride on, stride = 4 << CAP.DSTRD bytes. A queue whose slots lie outside
// the page is an error (R29).
func Slots(page *shm.Region, qid uint16, dstrd uint8) (sq, cq *atomic.Uint32, err error) {
	stride := uint64(4) << (dstrd & 0xf)
	if sq, err = page.Word32(2 * uint64(qid) * stride); err == nil {
		cq, err = page.Word32((2*uint64(qid) + 1) * stride)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("doorbell slots of queue %d, stride %d: %w", qid, stride, err)
	}
	return sq, cq, nil
}

// NeedEvent reports whether ei lies in [old, new) of the ring, as in the patch of 2014. It is exact
// for every ring size as long as all three are indices of the ring.
func NeedEvent(ei, new, old uint32) bool {
	return uint16(new-ei-1) < uint16(new-old)
}
