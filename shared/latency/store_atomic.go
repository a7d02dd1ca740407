//go:build !amd64 || race

package latency

import "sync/atomic"

// store writes one word that others load.
func store(p *uint64, v uint64) { atomic.StoreUint64(p, v) }
