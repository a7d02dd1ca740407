//go:build amd64 && !race

package events

// store writes one word that readers load. Here stores are seen in the order in which they are made, whole; an atomic one would be an
// exchange, which costs more than the rest of a record.
func store(p *uint64, v uint64) { *p = v }
