//go:build !amd64 || race

package events

import "sync/atomic"

// store writes one word that readers load, after all that was stored before.
func store(p *uint64, v uint64) { atomic.StoreUint64(p, v) }
