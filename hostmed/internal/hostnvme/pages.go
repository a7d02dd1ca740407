package hostnvme

import "github.com/shadowbell/shadowbell/shared/shm"

// A page, where memory is not in one piece for the device, is its address there, and how many pages behind it in this process follow it there too: in
// the bits that addresses of pages do not need. So what lies in one piece costs one look, and what does not costs one for each page, as PRPs do.

// followers are these bits, and the most that they can say: 16 MiB less a page.
const followers = shm.PageSize - 1

// joinPages makes pages of the addresses of pages, in their place.
func joinPages(addresses []uint64) []uint64 {
	follow := uint64(0)
	next := ^uint64(0) // no page is there
	for i := len(addresses) - 1; i >= 0; i-- {
		if addresses[i]+shm.PageSize == next {
			follow = min(follow+1, followers)
		} else {
			follow = 0
		}
		next = addresses[i]
		addresses[i] |= follow
	}
	return addresses
}

// around returns what is in one piece from the page of addr on, which s has.
func (s *span) around(addr uint64) stretch {
	i := (addr - s.base) / shm.PageSize
	p, begin := s.pages[i], s.base+i*shm.PageSize
	return stretch{base: begin, size: (p&followers + 1) * shm.PageSize, delta: p&^followers - begin}
}
