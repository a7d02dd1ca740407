package prp

import (
	"encoding/binary"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// sparse is memory for lists, by qword. What is not in it cannot be read.
type sparse struct {
	qwords map[uint64]uint64
	reads  int
}

func (s *sparse) ReadIOVA(iova uint64, dst []byte) bool {
	s.reads++
	for i := 0; i < len(dst); i += EntrySize {
		v, ok := s.qwords[iova+uint64(i)]
		if !ok {
			return false
		}
		binary.LittleEndian.PutUint64(dst[i:], v)
	}
	return true
}

// at returns memory that has entries at iova.
func at(iova uint64, entries ...uint64) *sparse {
	s := &sparse{qwords: map[uint64]uint64{}}
	s.put(iova, entries...)
	return s
}

func (s *sparse) put(iova uint64, entries ...uint64) *sparse {
	for i, e := range entries {
		s.qwords[iova+uint64(i)*EntrySize] = e
	}
	return s
}

// noMemory fails the test's expectations if anything is read.
type noMemory struct{ reads int }

func (m *noMemory) ReadIOVA(uint64, []byte) bool {
	m.reads++
	return false
}

// modelWalk is the definition of the specification, one PRP at a time and with nothing clever.
func modelWalk(prp1, prp2 uint64, length, pageSize uint32, mem Reader) ([]Extent, nvme.Status) {
	ps := uint64(pageSize)
	if length == 0 {
		return nil, nvme.StatusSuccess
	}
	if prp1%4 != 0 {
		return nil, nvme.StatusPRPOffsetInvalid
	}
	n := min(uint64(length), ps-prp1%ps)
	pages := []Extent{{prp1, uint32(n)}}
	rest := uint64(length) - n
	take := func(page uint64) bool {
		if page%ps != 0 {
			return false
		}
		n := min(rest, ps)
		pages = append(pages, Extent{page, uint32(n)})
		rest -= n
		return true
	}
	switch {
	case rest == 0:
	case rest <= ps:
		if !take(prp2) {
			return nil, nvme.StatusPRPOffsetInvalid
		}
	default:
		if prp2%8 != 0 {
			return nil, nvme.StatusPRPOffsetInvalid
		}
		for slot := prp2; rest > 0; {
			var b [8]byte
			if !mem.ReadIOVA(slot, b[:]) {
				return nil, nvme.StatusDataTransferError
			}
			entry := binary.LittleEndian.Uint64(b[:])
			if (slot+8)%ps == 0 && rest > ps {
				if entry%ps != 0 {
					return nil, nvme.StatusPRPOffsetInvalid
				}
				slot = entry
				continue
			}
			if !take(entry) {
				return nil, nvme.StatusPRPOffsetInvalid
			}
			slot += 8
		}
	}
	out := pages[:1]
	for _, p := range pages[1:] {
		last := &out[len(out)-1]
		if p.IOVA != 0 && last.IOVA+uint64(last.Len) == p.IOVA {
			last.Len += p.Len
		} else {
			out = append(out, p)
		}
	}
	return out, nvme.StatusSuccess
}
