//go:build !amd64

package pci

import "sync/atomic"

// A store with release order: what was written to memory is there before the doorbell is.
func store32(w *atomic.Uint32, v uint32) { w.Store(v) }
func store64(w *atomic.Uint64, v uint64) { w.Store(v) }
