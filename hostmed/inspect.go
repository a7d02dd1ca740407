package hostmed

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// What somebody asks who only looks. Whatever a medium, a worker or a guest does, it is answered within a while, and disturbs nobody: a session's
// goroutine is kept from the client's messages for workerPatience at the most.
const (
	workerPatience  = time.Second
	sessionPatience = 2 * time.Second
)

// Inspect returns a snapshot of the controller that which names, by the path of its socket or its trace number; empty: of all that have a client. Nothing in it
// says where memory is to be found. A worker or a session that does not answer within seconds is named in it. The error says that no controller has the
// name, or that it has no client.
func (m *Mediator) Inspect(ctx context.Context, which string) (inspect.Snapshot, error) {
	return m.inspect(ctx, which, nil)
}

// InspectMemory is Inspect with the files that the snapshot's Memory.File count: rings and doorbell pages of the guest, open for reading only. There are
// inspect.MaxFiles of them at the most; what is in others has Size 0, and so has what is in memory of this process, or not in one piece. The caller closes them.
func (m *Mediator) InspectMemory(ctx context.Context, which string) (inspect.Snapshot, []*os.File, error) {
	h := &handover{index: map[gmem.File]int{}}
	s, err := m.inspect(ctx, which, h)
	files := h.seal()
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return inspect.Snapshot{}, nil, err
	}
	return s, files, nil
}

// clients returns the sessions of the controllers that which names.
func (m *Mediator) clients(which string) (list []*session, err error) {
	ports := m.registry.find(which)
	for _, p := range ports {
		if s := p.client(); s != nil {
			list = append(list, s)
		}
	}
	switch {
	case which == "" || len(list) > 0:
		return list, nil
	case len(ports) > 0:
		return nil, fmt.Errorf("the controller behind %s: %w", ports[0].path, inspect.ErrNoClient)
	}
	return nil, fmt.Errorf("%w: %s is no socket and no trace number of one", inspect.ErrNoController, which)
}

func (m *Mediator) inspect(ctx context.Context, which string, h *handover) (inspect.Snapshot, error) {
	list, err := m.clients(which)
	if err != nil {
		return inspect.Snapshot{}, err
	}
	s := inspect.Snapshot{Version: inspect.Version, Taken: inspect.Now(), Controllers: []inspect.Controller{}}
	for _, c := range fromEach(ctx, list, func(x *session, c *inspect.Controller) { x.inspect(c, h) }, (*session).unanswered) {
		s.Controllers = append(s.Controllers, *c)
	}
	if which != "" && len(s.Controllers) == 0 { // it ended meanwhile
		return inspect.Snapshot{}, fmt.Errorf("the controller behind %s: %w", list[0].p.path, inspect.ErrNoClient)
	}
	return s, nil
}

// fromEach has f fill in a T for each of list on its session's goroutine, all at the same time. One that does not answer in time has silent's. Those that end
// meanwhile are left out.
func fromEach[T any](ctx context.Context, list []*session, f func(*session, *T), silent func(*session) *T) []*T {
	ctx, cancel := context.WithTimeout(ctx, sessionPatience)
	defer cancel()
	answers := make([]*T, len(list))
	var all sync.WaitGroup
	for i, s := range list {
		all.Go(func() {
			got := make(chan *T, 1)
			select {
			case s.inspecting <- struct{}{}: // one at a time, also of those that nobody waits for any more
			case <-s.done:
				return
			case <-ctx.Done():
				answers[i] = silent(s)
				return
			}
			s.do(call{
				run: func() {
					if ctx.Err() == nil {
						x := new(T)
						f(s, x)
						got <- x
					}
				},
				done: func() { <-s.inspecting },
			})
			select {
			case answers[i] = <-got:
			case <-s.done:
			case <-ctx.Done():
				answers[i] = silent(s)
			}
		})
	}
	all.Wait()
	return slices.DeleteFunc(answers, func(x *T) bool { return x == nil })
}

func (s *session) unanswered() *inspect.Controller {
	c := &inspect.Controller{Silent: true}
	s.names(c)
	return c
}

func (s *session) names(c *inspect.Controller) {
	c.Socket, c.NQN, c.CNTLID, c.Trace = s.p.path, s.p.self.Subsystem().NQN(), s.p.self.ID, s.p.trace
	c.Queues = []inspect.Queue{}
}

// inspect fills in c. It runs on the session's goroutine.
func (s *session) inspect(c *inspect.Controller, h *handover) {
	s.names(c)
	c.Errors, c.Coalesced, c.Stalled = slices.Clone(s.errors), s.data.Coalesced(), s.stalled.Load()
	at := h.locate(s.mem)
	q, ok := s.ctl.Snapshot(c)
	pages := ioq.DoorbellPages{Shadow: c.Shadow, EventIndex: c.EventIndex}
	if ok {
		q.SQMemory, q.CQMemory = at(q.SQMemory.IOVA, q.SQMemory.Size), at(q.CQMemory.IOVA, q.CQMemory.Size)
		s.data.PlaceBells(&q, pages, at)
		s.data.VectorState(&q)
		s.data.AdminRung(&q)
		c.Queues = append(c.Queues, q)
	}
	s.data.Snapshot(c, pages, at, workerPatience)
}

// failed takes note of e for snapshots. It runs on the session's goroutine.
func (s *session) failed(e ioq.QueueError) {
	if len(s.errors) == inspect.MaxErrors {
		s.errors = slices.Delete(s.errors, 0, 1)
	}
	text := ""
	if e.Err != nil {
		text = e.Err.Error()
	}
	s.errors = append(s.errors, inspect.QueueError{QID: e.QID, Kind: e.Kind.Word(), Text: text, At: e.At})
}

// handover is the files that go with a snapshot.
type handover struct {
	mu     sync.Mutex // guards the rest
	files  []*os.File
	index  map[gmem.File]int // in files; -1: it cannot be handed over
	sealed bool
}

// locate returns what finds memory of mem in the files; a nil h has none.
func (h *handover) locate(mem *gmem.Memory) ioq.Locate {
	return func(iova, n uint64) inspect.Memory {
		at := inspect.Memory{IOVA: iova}
		if h == nil {
			return at
		}
		if f, off, ok := mem.Locate(iova, n); ok {
			if i := h.add(mem, f); i >= 0 {
				at.File, at.Offset, at.Size = i, off, n
			}
		}
		return at
	}
}

func (h *handover) add(mem *gmem.Memory, f gmem.File) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sealed {
		return -1
	}
	i, ok := h.index[f]
	if !ok {
		i = -1
		if len(h.files) < inspect.MaxFiles {
			if open, err := mem.Open(f); err == nil {
				i = len(h.files)
				h.files = append(h.files, open)
			}
		}
		h.index[f] = i
	}
	return i
}

// seal returns the files; a session that is late adds none.
func (h *handover) seal() []*os.File {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sealed = true
	return h.files
}

// Kick has the queue qid of the controller that which names looked at, as its doorbell would have it, and says what was found. It harms nothing, and mends a
// queue whose driver has not rung. The error says that there is no such controller or queue, or that nobody answers for it.
func (m *Mediator) Kick(ctx context.Context, which string, qid uint16) (inspect.Kick, error) {
	if which == "" {
		return inspect.Kick{}, inspect.ErrNoController
	}
	list, err := m.clients(which)
	if err != nil {
		return inspect.Kick{}, err
	}
	s := list[0]
	if qid != 0 {
		k, err := s.data.Kick(qid, workerPatience)
		if err != nil {
			err = fmt.Errorf("queue %d of %s: %w", qid, s.p.path, err)
		}
		return k, err
	}
	var silent inspect.Kick
	got := fromEach(ctx, list, func(s *session, k *inspect.Kick) {
		var more bool
		if *k, more = s.ctl.Probe(); more {
			s.kickAdmin()
		}
	}, func(*session) *inspect.Kick { return &silent })
	switch {
	case len(got) == 0: // it ended meanwhile
		return inspect.Kick{}, fmt.Errorf("the controller behind %s: %w", s.p.path, inspect.ErrNoClient)
	case got[0] == &silent:
		return inspect.Kick{}, fmt.Errorf("queue 0 of %s: %w", s.p.path, inspect.ErrBusy)
	}
	return *got[0], nil
}

// List returns the controllers that there are, those without a client too.
func (m *Mediator) List() []inspect.Listed {
	list := []inspect.Listed{}
	for _, p := range m.registry.find("") {
		list = append(list, inspect.Listed{
			Socket: p.path, NQN: p.self.Subsystem().NQN(), CNTLID: p.self.ID, Trace: p.trace, Mode: p.cfg.Doorbells.String(), Client: p.client() != nil,
		})
	}
	return list
}
