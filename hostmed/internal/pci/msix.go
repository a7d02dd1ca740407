package pci

// tableEntry is the size of an MSI-X table entry in bytes: address, data, vector control.
const tableEntry = 16

// MSIX is the memory behind the MSI-X BARs. A vfio-user client keeps the real table itself, so what is
// written here is only given back, except for the mask bits of a client that writes them here after all: those
// are told to Mask, beginning with the first that changes something. It is not safe for concurrent use.
type MSIX struct {
	// Pending, if set, says whether a vector's interrupt waits, which its pending bit shows.
	Pending func(vector int) bool
	// Mask, if set, is told of each vector whose mask bit was written.
	Mask func(vector int, on bool)

	table []byte
	size  uint64 // of the table's BAR
}

// NewMSIX returns the table of c's vectors, all masked.
func NewMSIX(c *ConfigSpace) *MSIX {
	n := int(c.Vectors())
	m := &MSIX{
		table: make([]byte, n*tableEntry),
		size:  c.BARSize(BARTable),
	}
	m.Reset()
	return m
}

// Reset masks every vector, as far as the table says.
func (m *MSIX) Reset() {
	clear(m.table)
	for at := tableEntry - 4; at < len(m.table); at += tableEntry {
		m.table[at] = 1
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
		if at%tableEntry == 12 && m.Mask != nil {
			m.Mask(int(at/tableEntry), v != 0)
		}
	}
	return nil
}

// ReadPBA copies len(p) bytes of the pending bits' BAR from off. A driver cannot write it.
func (m *MSIX) ReadPBA(off uint64, p []byte) error {
	if err := checkSpan(off, len(p), minBAR); err != nil {
		return err
	}
	for i := range p {
		p[i] = 0
		for bit := range 8 {
			v := int(off)*8 + i*8 + bit
			if v < len(m.table)/tableEntry && m.Pending != nil && m.Pending(v) {
				p[i] |= 1 << bit
			}
		}
	}
	return nil
}
