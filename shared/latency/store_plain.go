//go:build amd64 && !race

package latency

// store writes one word that others load. A plain store is one access, which a load sees whole or not at all (The Go Memory Model:
// words are not torn); the atomic one would be an exchange, which costs some 20 cycles and orders what need not be ordered.
func store(p *uint64, v uint64) { *p = v }
