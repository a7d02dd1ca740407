package path

import (
	"cmp"
	"slices"
)

// result fills in c. All times are cut to what lies between those that must enclose them, so that Spans add up to Total.
func (v *virtual) result(c *Command) {
	*c = Command{
		Key: v.Key, CID: v.CID, Opcode: v.Opcode, NSID: v.NSID, SLBA: v.SLBA, Blocks: v.Blocks, Status: v.status,
		Match: v.match(), Guest: v.guest.of != 0, Began: v.Time, Steps: len(v.steps),
	}
	if len(v.steps) > 0 && v.steps[0].medium != nil {
		c.Medium = v.steps[0].medium.ID
	}
	at, post := v.Time, max(v.post, v.Time)
	for _, s := range v.steps {
		c.Real += s.real
		from := min(max(s.submit, at), post)
		to := min(max(s.complete, from), post)
		c.Spans[Hostmed] += from - at
		s.spans(c, from, to)
		at = to
	}
	if len(v.steps) == 0 {
		c.Spans[Hostmed] += post - at
	} else {
		c.Spans[Back] += post - at
	}
	if c.Guest {
		c.Began = min(v.publish, v.Time)
		c.Spans[GuestQueue] = v.Time - c.Began
		c.Spans[ToGuest] = max(v.reap-post, 0)
	}
	for _, x := range c.Spans {
		c.Total += x
	}
}

func (v *virtual) match() Match {
	if len(v.steps) == 0 {
		return Own
	}
	is := Unseen
	for _, s := range v.steps {
		if s.medium == nil || s.medium.disk == nil && s.medium.Kind != "vfio" {
			continue
		}
		if !s.matched() {
			return Unmatched
		}
		is = Matched
	}
	return is
}

// spans divides the time of s: what real commands cover together is Device, what is before one of them RealQueue, and what is behind all Back.
func (s *step) spans(c *Command, from, to int64) {
	if len(s.intervals) == 0 {
		c.Spans[Device] += to - from
		return
	}
	slices.SortFunc(s.intervals, func(a, b interval) int { return cmp.Compare(a.from, b.from) })
	at := from
	for _, x := range s.intervals {
		begin := min(max(x.from, at), to)
		end := min(max(x.to, begin), to)
		c.Spans[RealQueue] += begin - at
		c.Spans[Device] += end - begin
		at = end
	}
	c.Spans[Back] += to - at
}
