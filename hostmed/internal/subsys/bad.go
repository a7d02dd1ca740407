package subsys

import "slices"

// MaxBad is how many ranges Gate.Bad may have: each write to a namespace with marked blocks looks them through, and each change
// copies them.
const MaxBad = 4096

// Mark adds n blocks from first, of which the last is one of the namespace, to what Write Uncorrectable has marked. It returns false, and
// marks nothing, if that would be more than MaxBad ranges.
func (n *Namespace) Mark(first, count uint64) (ok bool) {
	n.SetBad(func(old []Range) []Range {
		is := withRange(old, Range{first, first + (count - 1)})
		if ok = len(is) <= MaxBad; !ok {
			return old
		}
		return is
	})
	return ok
}

// Unmark takes blocks that were written away from it. That can take MaxBad by one range, which is as well.
func (n *Namespace) Unmark(first, count uint64) {
	n.SetBad(func(old []Range) []Range { return withoutRange(old, Range{first, first + (count - 1)}) })
}

// withRange returns a new slice that has x too.
func withRange(old []Range, x Range) []Range {
	// Those that end before x, apart from it, stay; those that it touches become part of it.
	i := slices.IndexFunc(old, func(r Range) bool { return r.Last >= x.First || r.Last+1 == x.First })
	if i < 0 {
		i = len(old)
	}
	is := append(make([]Range, 0, len(old)+1), old[:i]...)
	for ; i < len(old) && (old[i].First <= x.Last || old[i].First == x.Last+1); i++ {
		x = Range{min(x.First, old[i].First), max(x.Last, old[i].Last)}
	}
	return append(append(is, x), old[i:]...)
}

// withoutRange returns a new slice that has nothing of x.
func withoutRange(old []Range, x Range) []Range {
	is := make([]Range, 0, len(old)+1)
	for _, r := range old {
		if r.Last < x.First || r.First > x.Last {
			is = append(is, r)
			continue
		}
		if r.First < x.First {
			is = append(is, Range{r.First, x.First - 1})
		}
		if r.Last > x.Last {
			is = append(is, Range{x.Last + 1, r.Last})
		}
	}
	return is
}
