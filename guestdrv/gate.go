package guestdrv

import "sync/atomic"

// gate counts who is inside, so that Close can shut it and wait until all have left.
type gate struct {
	state atomic.Int64  // who is inside, and gateShut
	empty chan struct{} // cap 1: shut, and nobody is inside
}

const gateShut = 1 << 62

func (g *gate) init() { g.empty = make(chan struct{}, 1) }

// enter returns false once the gate is shut.
func (g *gate) enter() bool {
	if g.state.Add(1) < gateShut {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.state.Add(-1) != gateShut {
		return
	}
	select {
	case g.empty <- struct{}{}:
	default: // who came too late and left again has said so before
	}
}

// shut lets nobody in any more, and returns when all have left. It is called once.
func (g *gate) shut() {
	if g.state.Add(gateShut) != gateShut {
		<-g.empty
	}
}
