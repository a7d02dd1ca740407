//go:build !amd64 || race

package ring

import "sync/atomic"

// store writes src, with the phase tag, to dst from the last entry to the first,
// each Lo before its Hi (R5).
func store(dst, src []Entry, phase uint64) {
	for i := len(src) - 1; i >= 0; i-- {
		dst[i].Lo = src[i].Lo
		atomic.StoreUint64(&dst[i].Hi, src[i].Hi|phase)
	}
}
