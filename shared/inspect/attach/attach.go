// Package attach is the client of hostmed's control socket: it asks for snapshots, counters and kicks, and is handed the doorbell pages and rings of
// guests for reading. docs/control.md describes the socket. The messages of its upgraded connection are here for both sides (wire.go).
package attach

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// Client asks hostmed over its control socket. Its methods may be called from any goroutine.
type Client struct {
	path string
	http *http.Client
}

// New returns a client of the socket path. Nothing is sent before it is used.
func New(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, path) }
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true, MaxIdleConns: 1, IdleConnTimeout: 10 * time.Second}}}
}

// Close gives connections back. The client can still be used.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func dial(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		return conn, nil
	}
	remedy := ""
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		remedy = fmt.Sprintf(": nobody serves it; start hostmed with --control %s", path)
	case errors.Is(err, fs.ErrPermission):
		remedy = fmt.Sprintf(": user %d may not connect; be the user that hostmed runs as, or root", os.Geteuid())
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	return nil, fmt.Errorf("control socket %s: %w%s", path, err, remedy)
}

// Controllers lists what is served.
func (c *Client) Controllers(ctx context.Context) (list []inspect.Listed, err error) {
	err = c.ask(ctx, http.MethodGet, "/v1/controllers", &list)
	return list, err
}

// Inspect returns a snapshot of the controller that which names, by its socket's path or its trace number; empty: of all that have a client. The error may be
// inspect.ErrNoController or ErrNoClient.
func (c *Client) Inspect(ctx context.Context, which string) (s inspect.Snapshot, err error) {
	if err = c.ask(ctx, http.MethodGet, "/v1/inspect"+query(which), &s); err == nil {
		err = checkVersion(&s)
	}
	return s, err
}

// Counters returns what controllers and namespaces have done; which is as in Inspect.
func (c *Client) Counters(ctx context.Context, which string) (n inspect.Counters, err error) {
	err = c.ask(ctx, http.MethodGet, "/v1/stats"+query(which), &n)
	return n, err
}

// Kick has queue qid of the controller that which names looked at. The error may be inspect.ErrNoController, ErrNoClient, ErrNoQueue or ErrBusy.
func (c *Client) Kick(ctx context.Context, which string, qid uint16) (k inspect.Kick, err error) {
	err = c.ask(ctx, http.MethodPost, "/v1/controllers/"+url.PathEscape(which)+"/queues/"+strconv.Itoa(int(qid))+"/kick", &k)
	return k, err
}

func query(which string) string {
	if which == "" {
		return ""
	}
	return "?controller=" + url.QueryEscape(which)
}

func checkVersion(s *inspect.Snapshot) error {
	if s.Version != inspect.Version {
		return fmt.Errorf("hostmed's snapshots have version %d, this program knows %d: use the nvmetrace of hostmed's version", s.Version, inspect.Version)
	}
	return nil
}

// ask does one request.
func (c *Client) ask(ctx context.Context, method, path string, v any) error {
	q, err := http.NewRequestWithContext(ctx, method, "http://hostmed"+path, nil)
	if err != nil {
		return err
	}
	r, err := c.http.Do(q)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return err
	}
	defer r.Body.Close()
	return answer(r, v)
}

// answer decodes r's body, which is an error unless the status says otherwise.
func answer(r *http.Response, v any) error {
	body := io.LimitReader(r.Body, MaxReply)
	if r.StatusCode != http.StatusOK {
		var e struct {
			Error *Error `json:"error"`
		}
		if err := json.NewDecoder(body).Decode(&e); err != nil || e.Error == nil {
			return fmt.Errorf("hostmed answers %s", r.Status)
		}
		return e.Error
	}
	if err := json.NewDecoder(body).Decode(v); err != nil {
		return fmt.Errorf("hostmed's answer: %w", err)
	}
	return nil
}

// Conn is an upgraded connection. Its methods may be called from any goroutine, and take turns.
type Conn struct {
	mu   sync.Mutex // guards the rest; held for a request and its reply
	conn *net.UnixConn
	id   uint64
	err  error // what broke it
}

// Attach opens a connection that files are handed over on.
func (c *Client) Attach(ctx context.Context) (_ *Conn, err error) {
	conn, err := dial(ctx, c.path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(Patience))
	q, err := http.NewRequest(http.MethodGet, "http://hostmed"+Path, nil)
	if err != nil {
		return nil, err
	}
	q.Header.Set("Connection", "Upgrade")
	q.Header.Set("Upgrade", Protocol)
	if err := q.Write(conn); err != nil {
		return nil, err
	}
	// One byte at a time: what is read beyond the answer would lose its descriptors. The server sends nothing before it is asked, but a read
	// that is too long is not worth the risk.
	in := bufio.NewReaderSize(oneByte{conn}, 4096)
	r, err := http.ReadResponse(in, q)
	if err != nil {
		return nil, fmt.Errorf("hostmed's answer: %w", err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusSwitchingProtocols || r.Header.Get("Upgrade") != Protocol {
		if err := answer(r, new(struct{})); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("hostmed does not speak %s", Protocol)
	}
	if !stop() {
		return nil, ctx.Err()
	}
	return &Conn{conn: conn.(*net.UnixConn)}, nil
}

// oneByte reads one byte at a time.
type oneByte struct{ io.Reader }

func (o oneByte) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return o.Reader.Read(p[:1])
}

// Inspect is Client.Inspect with the files that the snapshot's Memory.File count. They can be read and mapped for reading, and the caller closes them.
func (c *Conn) Inspect(ctx context.Context, which string) (inspect.Snapshot, []*os.File, error) {
	r, files, err := c.ask(ctx, Request{Inspect: &Inspect{Controller: which}})
	if err != nil {
		return inspect.Snapshot{}, nil, err
	}
	if r.Snapshot == nil {
		err = fmt.Errorf("%w: no snapshot in the answer", ErrProtocol)
	} else if err = checkVersion(r.Snapshot); err == nil {
		err = checkFiles(r.Snapshot, len(files))
	}
	if err != nil {
		closeAll(files)
		return inspect.Snapshot{}, nil, err
	}
	return *r.Snapshot, files, nil
}

// Listen makes hostmed's workers record what becomes of commands until the connection ends, and returns their rings, for events.Map; the caller closes the
// files. records is how many each ring holds, if nobody listens yet: at most MaxRecords, or 0 for events.DefaultRecords. Numbers of media met later are
// Media's to tell. A connection listens once.
func (c *Conn) Listen(ctx context.Context, records uint32) (rings []*os.File, media []events.Medium, err error) {
	r, files, err := c.ask(ctx, Request{Listen: &Listen{Records: records}})
	if err != nil {
		return nil, nil, err
	}
	if len(files) == 0 || r.Rings != len(files) {
		closeAll(files)
		return nil, nil, fmt.Errorf("%w: %d rings in %d files", ErrProtocol, r.Rings, len(files))
	}
	return files, r.Media, nil
}

// Media returns the media that commands have gone to since somebody listens, by the numbers in Record.Medium. The connection must listen.
func (c *Conn) Media(ctx context.Context) ([]events.Medium, error) {
	r, files, err := c.ask(ctx, Request{Media: &Media{}})
	closeAll(files)
	return r.Media, err
}

// checkFiles finds Memory that names a file that did not come.
func checkFiles(s *inspect.Snapshot, n int) error {
	for i := range s.Controllers {
		for k := range s.Controllers[i].Queues {
			q := &s.Controllers[i].Queues[k]
			for _, m := range [...]inspect.Memory{q.SQMemory, q.CQMemory, q.SQ.Slot, q.SQ.EventSlot, q.CQ.Slot, q.CQ.EventSlot} {
				if m.Size != 0 && (m.File < 0 || m.File >= n) {
					return fmt.Errorf("%w: memory in file %d of %d", ErrProtocol, m.File, n)
				}
			}
		}
	}
	return nil
}

// ask sends q and returns the reply to it. A connection that broke, or whose request was given up, stays broken.
func (c *Conn) ask(ctx context.Context, q Request) (r Reply, files []*os.File, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return r, nil, c.err
	}
	defer func() {
		if err != nil && r.Error == nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			c.err = fmt.Errorf("the connection to hostmed broke: %w", err)
			c.conn.Close()
		}
	}()
	c.id++
	q.ID = c.id
	if err := Send(c.conn, q, nil); err != nil {
		return r, nil, err
	}
	_ = c.conn.SetReadDeadline(time.Now().Add(Patience))
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if r, files, err = receiveReply(c.conn); err != nil {
		r.Error = nil
		return r, nil, err
	}
	switch {
	case r.ID != c.id:
		closeAll(files)
		r.Error = nil
		return r, nil, fmt.Errorf("%w: reply %d to request %d", ErrProtocol, r.ID, c.id)
	case r.Error != nil:
		closeAll(files)
		return r, nil, r.Error
	}
	return r, files, nil
}

// Close ends the connection, and with it whatever was asked for on it. Files that were handed over stay open.
func (c *Conn) Close() error {
	err := c.conn.Close() // also under a request that waits
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
