package path

import (
	"cmp"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/shared/latency"
)

// Summary counts where the time of commands went. The zero value is empty. It belongs to one goroutine.
type Summary struct {
	groups map[groupKey]*Group
}

type groupKey struct {
	medium uint16
	own    bool
	guest  bool
}

// Group is the commands of one medium, or those that hostmed answered by itself; and those whose guest is known apart from those whose guest is not.
type Group struct {
	Medium uint16 // 0: one that Matcher.Media has not said anything of
	Own    bool
	Guest  bool
	Total  latency.Histogram
	Spans  [Spans]latency.Histogram

	// Unmatched is the commands of which no real command is known, or not all: their time is here and nowhere else.
	Unmatched latency.Histogram
}

func (s *Summary) group(k groupKey) *Group {
	g := s.groups[k]
	if g == nil {
		if s.groups == nil {
			s.groups = map[groupKey]*Group{}
		}
		g = &Group{Medium: k.medium, Own: k.own, Guest: k.guest}
		s.groups[k] = g
	}
	return g
}

// Add counts c.
func (s *Summary) Add(c *Command) {
	g := s.group(groupKey{c.Medium, c.Match == Own, c.Guest})
	if c.Match == Unmatched {
		g.Unmatched.Record(time.Duration(c.Total), 1)
		return
	}
	g.Total.Record(time.Duration(c.Total), 1)
	for i, ns := range c.Spans {
		g.Spans[i].Record(time.Duration(ns), 1)
	}
}

// Groups returns what was counted, by medium.
func (s *Summary) Groups() []*Group {
	list := make([]*Group, 0, len(s.groups))
	for _, g := range s.groups {
		list = append(list, g)
	}
	slices.SortFunc(list, func(a, b *Group) int {
		return cmp.Or(order(a.Own, b.Own), cmp.Compare(a.Medium, b.Medium), order(b.Guest, a.Guest))
	})
	return list
}

// order puts false before true.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// Merge adds what other has.
func (s *Summary) Merge(other *Summary) {
	for k, o := range other.groups {
		g := s.group(k)
		g.Total.Merge(&o.Total)
		g.Unmatched.Merge(&o.Unmatched)
		for i := range g.Spans {
			g.Spans[i].Merge(&o.Spans[i])
		}
	}
}

// Share is the part of a span in all of the group's time, 0 to 1. The shares add up to 1, if there are commands.
func (g *Group) Share(s Span) float64 {
	if g.Total.Sum() == 0 {
		return 0
	}
	return float64(g.Spans[s].Sum()) / float64(g.Total.Sum())
}
