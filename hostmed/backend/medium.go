package backend

import (
	"math/bits"

	"github.com/shadowbell/shadowbell/shared/events"
)

// traced is a backend that says where its requests go.
type traced interface{ medium() events.Medium }

// MediumOf says where b's requests go, for those who follow them. ID is not set.
func MediumOf(b Backend) events.Medium {
	m := events.Medium{}
	if t, ok := Plain(b).(traced); ok {
		m = t.medium()
	}
	info := b.Info()
	m.Name = info.Name
	if m.Shift == 0 {
		m.Shift = info.LBAShift
	}
	return m
}

func (b *null) medium() events.Medium { return events.Medium{Kind: "null"} }
func (b *mem) medium() events.Medium  { return events.Medium{Kind: "mem"} }
func (b *file) medium() events.Medium { return events.Medium{Kind: "file"} }

func (b *block) medium() events.Medium {
	return events.Medium{Kind: "block", Disk: b.facts.disk, Base: b.facts.start, Shift: shiftOf(b.facts.logical)}
}

func (b *nvmeChar) medium() events.Medium {
	return events.Medium{Kind: "nvme", Disk: b.name, NSID: b.nsid, Base: b.first << b.shift, Shift: b.shift}
}

func (b *vfio) medium() events.Medium {
	return events.Medium{Kind: "vfio", PCI: b.dev.Address(), NSID: b.spec.NSID, Base: b.slice.First << b.slice.Shift, Shift: b.slice.Shift}
}

func shiftOf(size uint64) uint8 { return uint8(bits.TrailingZeros64(size)) }
