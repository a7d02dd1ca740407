//go:build !race

package ring

//go:noescape
func storeReverse(dst, src *Entry, n int, phase uint64)

// store writes src, with the phase tag, to dst from the last entry to the first,
// each Lo before its Hi (R5).
func store(dst, src []Entry, phase uint64) {
	if len(src) == 0 {
		return
	}
	_ = dst[len(src)-1]
	storeReverse(&dst[0], &src[0], len(src), phase)
}
