package vmlab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
)

// qmp is QEMU's control connection: JSON objects, one a line, commands answered in order with their id.
type qmp struct {
	conn net.Conn

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan qmpMessage
	events  []Event
	changed chan struct{} // closed and replaced when events grows
	err     error         // once the connection has ended
}

// Event is something that QEMU told unasked.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

type qmpMessage struct {
	Event
	ID     uint64          `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

func newQMP(conn net.Conn) *qmp {
	q := &qmp{conn: conn, waiting: map[uint64]chan qmpMessage{}, changed: make(chan struct{})}
	go q.read()
	return q
}

func (q *qmp) read() {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var m qmpMessage
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			continue
		}
		q.mu.Lock()
		if m.Name != "" {
			q.events = append(q.events, m.Event)
			close(q.changed)
			q.changed = make(chan struct{})
		} else if c := q.waiting[m.ID]; c != nil {
			delete(q.waiting, m.ID)
			c <- m
		}
		q.mu.Unlock()
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.err = errors.Join(errors.New("QEMU has closed its QMP connection"), lines.Err())
	for id, c := range q.waiting {
		delete(q.waiting, id)
		close(c)
	}
	close(q.changed)
}

func (q *qmp) do(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	c := make(chan qmpMessage, 1)
	q.mu.Lock()
	if err := q.err; err != nil {
		q.mu.Unlock()
		return nil, err
	}
	q.next++
	id := q.next
	q.waiting[id] = c
	q.mu.Unlock()
	m := map[string]any{"execute": command, "id": id}
	if arguments != nil {
		m["arguments"] = arguments
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if _, err := q.conn.Write(append(b, '\n')); err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m, ok := <-c:
		if !ok {
			return nil, fmt.Errorf("QMP %s: the connection ended", command)
		}
		if m.Error != nil {
			return nil, fmt.Errorf("QMP %s: %s", command, m.Error.Desc)
		}
		return m.Return, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("QMP %s: no answer: %w", command, ctx.Err())
	}
}

func (q *qmp) eventsSoFar() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.events)
}

// event waits for the first event of that name at or behind index from, and returns the index behind it.
func (q *qmp) event(ctx context.Context, name string, from int) (Event, int, error) {
	for {
		q.mu.Lock()
		for i := from; i < len(q.events); i++ {
			if q.events[i].Name == name {
				q.mu.Unlock()
				return q.events[i], i + 1, nil
			}
		}
		from = max(from, len(q.events))
		changed, err := q.changed, q.err
		q.mu.Unlock()
		if err != nil {
			return Event{}, from, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Event{}, from, fmt.Errorf("no %s event: %w", name, ctx.Err())
		}
	}
}
