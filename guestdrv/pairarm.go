package guestdrv

// EventFD returns the descriptor that is readable after the pair's interrupt, or -1 if it has none. It is the controller's: it may be polled, not read.
// It is for callers that wait for more than this pair; what only waits for the pair calls Wait.
func (p *QueuePair) EventFD() int {
	if p.io.vector == noVector {
		return -1
	}
	return p.io.c.eventFDs[p.io.vector]
}

// Arm is what comes before a sleep on EventFD. It returns true if there is nothing to reap and what comes later makes EventFD readable; false if
// Reap has something. A caller with commands outstanding calls it every 50 ms or so all the same, since it is Arm that looks at their deadlines.
func (p *QueuePair) Arm() (bool, error) {
	if err := p.q.Check(); err != nil {
		return false, p.failed(err)
	}
	armed, err := p.q.Arm()
	if err != nil {
		return false, p.failed(err)
	}
	return armed, nil
}
