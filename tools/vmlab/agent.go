package vmlab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab/internal/wire"
)

var (
	errEnded     = errors.New("QEMU has ended")
	errRestarted = errors.New("the guest has restarted")
)

// answer is a reply, or why there is none.
type answer struct {
	wire.Reply
	err error
}

// client talks to the agent in a guest.
type client struct {
	conn net.Conn

	write   sync.Mutex // one line at a time; taken alone
	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan answer
	starts  int           // greetings of agents so far
	changed chan struct{} // closed and replaced when starts or err changes
	err     error         // once the connection has ended
}

func newClient(conn net.Conn) *client {
	c := &client{conn: conn, waiting: map[uint64]chan answer{}, changed: make(chan struct{})}
	go c.read()
	return c
}

func (c *client) read() {
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(make([]byte, 64<<10), wire.MaxLine)
	for lines.Scan() {
		var r wire.Reply
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			continue // cut short by a restart
		}
		c.mu.Lock()
		if r.ID == 0 {
			// A new agent knows nothing of what the one before was asked.
			c.failAll(errRestarted)
			c.starts++
			c.change()
		} else if w := c.waiting[r.ID]; w != nil {
			delete(c.waiting, r.ID)
			w <- answer{Reply: r}
		}
		c.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errEnded
	if err := lines.Err(); err != nil {
		c.err = fmt.Errorf("%w: %w", errEnded, err)
	}
	c.failAll(c.err)
	c.change()
}

// failAll answers all requests with an error; the lock is held.
func (c *client) failAll(why error) {
	for id, w := range c.waiting {
		delete(c.waiting, id)
		w <- answer{err: why}
	}
}

func (c *client) change() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// started waits for the nth greeting.
func (c *client) started(ctx context.Context, n int) error {
	for {
		c.mu.Lock()
		have, changed, err := c.starts, c.changed, c.err
		c.mu.Unlock()
		switch {
		case have >= n:
			return nil
		case err != nil:
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *client) startsSoFar() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.starts
}

// grace is what the agent has beyond a request's own limit.
const grace = 10 * time.Second

func (c *client) do(ctx context.Context, q wire.Request) (wire.Reply, error) {
	w := make(chan answer, 1)
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		return wire.Reply{}, err
	}
	c.next++
	q.ID = c.next
	c.waiting[q.ID] = w
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, q.ID)
		c.mu.Unlock()
	}()
	b, err := json.Marshal(q)
	if err != nil {
		return wire.Reply{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, q.Limit+grace)
	defer cancel()
	sent := make(chan error, 1)
	go func() { // a guest that hangs takes nothing
		c.write.Lock()
		defer c.write.Unlock()
		_, err := c.conn.Write(append(b, '\n'))
		sent <- err
	}()
	for {
		select {
		case a := <-w:
			if a.err == nil && a.Error != "" {
				a.err = errors.New(a.Error)
			}
			return a.Reply, a.err
		case err := <-sent:
			if err != nil {
				return wire.Reply{}, err
			}
			sent = nil
		case <-ctx.Done():
			return wire.Reply{}, fmt.Errorf("the guest does not answer: %w", ctx.Err())
		}
	}
}
