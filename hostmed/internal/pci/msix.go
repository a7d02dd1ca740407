package pci

import "sync/atomic"

// tableEntry is the size of an MSI-X table entry in bytes: address, data, vector control.
const tableEntry = 16

// MSIX is the memory behind the MSI-X BARs. A vfio-user client keeps the real table itself, so what is
// written here is only given back; the pending bits are what the server sets. The
// table belongs to one goroutine, SetPending may be called from any.
type MSIX struct {
	table   []byte
	pending []atomic.Uint64
	size    uint64 // of the table's BAR
}

// NewMSIX returns the table of c's vectors, all masked.
func NewMSIX(c *ConfigSpace) *MSIX {
	n := int(c.Vectors())
	m := &MSIX{
		table:   make([]byte, n*tableEntry),
		pending: make([]atomic.Uint64, (n+63)/64),
		size:    c.BARSize(BARTable),
	}
	m.Reset()
	return m
}

// Reset masks every vector and clears what is pending.
func (m *MSIX) Reset() {
	clear(m.table)
	for at := tableEntry - 4; at < len(m.table); at += tableEntry {
		m.table[at] = 1
	}
	for i := range m.pending {
		m.pending[i].Store(0)
	}
}

// ReadTable copies len(p) bytes of the table's BAR from off.
func (m *MSIX) ReadTable(off uint64, p []byte) error {
	if err := checkSpan(off, len(p), m.size); err != nil {
		return err
	}
	n := 0
	if off < uint64(len(m.table)) {
		n = copy(p, m.table[off:])
	}
	clear(p[n:])
	return nil
}

// WriteTable writes p to the table's BAR at off. Reserved bits of the vector control stay zero.
func (m *MSIX) WriteTable(off uint64, p []byte) error {
	if err := checkSpan(off, len(p), m.size); err != nil {
		return err
	}
	for i, v := range p {
		at := off + uint64(i)
		if at >= uint64(len(m.table)) {
			break
		}
		switch at % tableEntry {
		case 12:
			v &= 1
		case 13, 14, 15:
			v = 0
		}
		m.table[at] = v
	}
	return nil
}

// SetPending sets or clears vector's pending bit; a vector that is not there is ignored.
func (m *MSIX) SetPending(vector uint16, on bool) {
	word := int(vector / 64)
	if word >= len(m.pending) || int(vector) >= len(m.table)/tableEntry {
		return
	}
	if bit := uint64(1) << (vector % 64); on {
		m.pending[word].Or(bit)
	} else {
		m.pending[word].And(^bit)
	}
}

// ReadPBA copies len(p) bytes of the pending bits' BAR from off. A driver cannot write it.
func (m *MSIX) ReadPBA(off uint64, p []byte) error {
	if err := checkSpan(off, len(p), minBAR); err != nil {
		return err
	}
	for i := range p {
		at := off + uint64(i)
		p[i] = 0
		if word := at / 8; word < uint64(len(m.pending)) {
			p[i] = byte(m.pending[word].Load() >> (at % 8 * 8))
		}
	}
	return nil
}
