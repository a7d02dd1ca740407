package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Limits and weights together. Where a driver has asked for weighted round robin (arbiter.go) the lanes of its SQs on one worker that wait for the same,
// that is for one namespace in one class of commands, have one place in the line between them, not one each: the commands of a controller that
// weighs do not get more of a limit by the number of its queues. Only one of the lanes, the one whose turn is next, has paid; the others are behind it. When
// its command has gone the classes' weights say whose turn is next.

// behind is a lane's index while another lane has the turn.
const behind = -2

// holder is the lane that has the turn for what waits for n in class; nil: nothing waits.
func (a *arbiter) holder(n *namespace, class qos.Class) *lane {
	for _, list := range a.sqs {
		for _, s := range list {
			if l := s.lane(n, class); l != nil && l.index != behind {
				return l
			}
		}
	}
	return nil
}

// next is the lane whose turn is next of those that share it with l, by the weights of their classes; nil: nothing waits in any.
func (l *lane) next() *lane {
	a := l.sq.g.arbiter
	if a == nil {
		if l.first == nil {
			return nil
		}
		return l
	}
	t := &a.turns
	v := nvme.Arbitration(a.ctl.arbitration.Load())
	if v != t.by {
		t.by, t.credit = v, [classCount]uint32{}
	}
	for fresh := false; ; fresh = true {
		for class, list := range a.sqs {
			if class != urgent && t.credit[class] == 0 {
				continue
			}
			for i := range list {
				at := (t.next[class] + i) % len(list)
				if x := list[at].lane(l.ns, l.class); x != nil && x.first != nil {
					t.next[class] = at + 1
					if class != urgent {
						t.credit[class]--
					}
					return x
				}
			}
		}
		if fresh {
			return nil
		}
		t.credit = [...]uint32{0, v.HPW().Count(), v.MPW().Count(), v.LPW().Count()}
	}
}
