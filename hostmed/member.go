package hostmed

// member is a session as its subsystem sees it.
type member struct{ *session }

// Changed makes the session show the namespaces that its controller has now.
func (m member) Changed(done func()) {
	m.do(call{run: m.updateNamespaces, done: done})
}

// Reset is an NVM subsystem reset.
func (m member) Reset() { m.do(call{run: m.ctl.SubsystemReset}) }

// Notice is what has become of the host's reservation.
func (m member) Notice(nsid uint32, kind uint8) {
	m.do(call{run: func() { m.ctl.ReservationNotice(nsid, kind) }})
}

// Warned has the controller ask its devices for their health.
func (m member) Warned() { m.do(call{run: m.ctl.AskHealth}) }

// call is something that another goroutine wants done on the session's.
type call struct {
	run  func()
	done func() // after run, or in place of it if the session ends first; nil: nobody waits
}

func (c *call) finish() {
	if c.done != nil {
		c.done()
	}
}

// do has c run on the session's goroutine.
func (s *session) do(c call) {
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.calls = append(s.calls, c)
	}
	s.mu.Unlock()
	if closed {
		c.finish()
		return
	}
	s.wake()
}

func (s *session) nextCall() (c call, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.calls) == 0 {
		return call{}, false
	}
	c = s.calls[0]
	s.calls = s.calls[1:]
	return c, true
}

// runCalls does what do was given. A fault on guest memory ends the session, and with it the calls that are left (dropCalls).
func (s *session) runCalls() {
	for c, ok := s.nextCall(); ok; c, ok = s.nextCall() {
		func() {
			defer c.finish()
			c.run()
		}()
	}
}

// dropCalls tells those who wait that nothing comes any more.
func (s *session) dropCalls() {
	s.mu.Lock()
	calls := s.calls
	s.calls, s.closed = nil, true
	s.mu.Unlock()
	for _, c := range calls {
		c.finish()
	}
}

func (s *session) updateNamespaces() {
	ns := namespaces(s.p.self)
	if err := s.data.SetNamespaces(ns); err != nil {
		s.log.Error("a namespace cannot be attached", "error", err)
	}
	s.ctl.UpdateNamespaces(ns)
}
