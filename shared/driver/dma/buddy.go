package dma

import "math/bits"

// buddy hands out runs of pages. Blocks of 2^order pages lie at multiples of their size; a run of any other length is cut from
// the next larger block and the rest given back at once, so nothing is lost to rounding. Every operation is O(log n), except that
// a run for which there is no one block is looked for across neighbouring blocks, page by page.
//
// The pages may be divided by boundaries that no run crosses: at every multiple of 2^top pages.
type buddy struct {
	pages uint32
	top   int    // order of the largest blocks
	free  uint32 // pages
	heads [maxOrder + 1]uint32
	// next and prev link the free blocks of one order; order[p] is 1 + the order of the free block that begins at page p, or 0.
	next, prev []uint32
	order      []uint8
}

const (
	maxOrder = 31
	none     = ^uint32(0)
)

func newBuddy(pages uint32, top int) *buddy {
	b := &buddy{pages: pages, top: top, next: make([]uint32, pages), prev: make([]uint32, pages), order: make([]uint8, pages)}
	for i := range b.heads {
		b.heads[i] = none
	}
	b.give(0, pages)
	return b
}

func (b *buddy) push(page uint32, order int) {
	head := b.heads[order]
	b.next[page], b.prev[page] = head, none
	if head != none {
		b.prev[head] = page
	}
	b.heads[order] = page
	b.order[page] = uint8(order + 1)
}

func (b *buddy) remove(page uint32, order int) {
	next, prev := b.next[page], b.prev[page]
	if prev == none {
		b.heads[order] = next
	} else {
		b.next[prev] = next
	}
	if next != none {
		b.prev[next] = prev
	}
	b.order[page] = 0
}

// take returns the first of n contiguous pages, n > 0.
func (b *buddy) take(n uint32) (uint32, bool) {
	if n > b.free {
		return 0, false
	}
	want := bits.Len32(n - 1)
	order := want
	for order <= b.top && b.heads[order] == none {
		order++
	}
	if order > b.top {
		return b.takeRun(n)
	}
	page := b.heads[order]
	b.remove(page, order)
	// The whole block is taken, then what is too much of it given back.
	b.free -= 1 << order
	b.give(page+n, 1<<order-n)
	return page, true
}

// takeRun is take for a run that no single block holds.
func (b *buddy) takeRun(n uint32) (uint32, bool) {
	first, have := b.run(n)
	if have < n {
		return 0, false
	}
	for page := first; page < first+have; {
		order := int(b.order[page]) - 1
		b.remove(page, order)
		page += 1 << order
	}
	b.free -= have
	b.give(first+n, have-n)
	return first, true
}

// run returns the first sequence of free blocks of at least want pages together, or else the longest.
func (b *buddy) run(want uint32) (first, have uint32) {
	begin := uint32(0)
	for page := uint32(0); page < b.pages; {
		if b.order[page] == 0 {
			page++
			begin = page
			continue
		}
		if page&(1<<b.top-1) == 0 {
			begin = page
		}
		page += 1 << (b.order[page] - 1)
		if page-begin > have {
			first, have = begin, page-begin
		}
		if have >= want {
			break
		}
	}
	return first, have
}

// give returns n pages from page on, as the largest blocks that are aligned.
func (b *buddy) give(page, n uint32) {
	b.free += n
	for n > 0 {
		order := min(bits.Len32(n)-1, b.top)
		if page != 0 {
			order = min(order, bits.TrailingZeros32(page))
		}
		b.merge(page, order)
		page += 1 << order
		n -= 1 << order
	}
}

// merge frees one block, together with its neighbours.
func (b *buddy) merge(page uint32, order int) {
	for order < b.top {
		other := page ^ 1<<order
		if other >= b.pages || b.order[other] != uint8(order+1) {
			break
		}
		b.remove(other, order)
		page = min(page, other)
		order++
	}
	b.push(page, order)
}
