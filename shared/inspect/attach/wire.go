package attach

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// The connection after the answer 101: messages, each of a header and a body in JSON.
//
//	bytes 0 to 3  length of the body, little-endian
//	bytes 4 to 7  how many descriptors come with the message (SCM_RIGHTS), with its first byte
//
// The client sends a Request, the server answers each with one Reply, in order. Only replies have descriptors.

const (
	// Protocol is the token of the Upgrade header.
	Protocol = "shadowbell-inspect"
	// Path is where a connection is upgraded.
	Path = "/v1/attach"

	headerSize = 8
	// MaxRequest and MaxReply are the longest bodies.
	MaxRequest = 4 << 10
	MaxReply   = 64 << 20
	// Patience is how long a message may take, from its first byte to its last.
	Patience = 10 * time.Second
)

// Request is what the client wants: one of the pointers is set.
type Request struct {
	ID      uint64   `json:"id"` // the reply has it
	Inspect *Inspect `json:"inspect,omitempty"`
	Listen  *Listen  `json:"listen,omitempty"`
	Media   *Media   `json:"media,omitempty"`
}

// Inspect asks for a snapshot with the files that it names.
type Inspect struct {
	Controller string `json:"controller,omitempty"` // a socket's path or a trace number; empty: all
}

// Listen asks for the rings of event records, which are written until the connection ends. A connection listens once.
type Listen struct {
	Records uint32 `json:"records,omitempty"` // that each ring is to hold, if nobody listens yet; 0: events.DefaultRecords; MaxRecords at the most
}

// MaxRecords is how many records a ring can be asked to hold: 32 MiB.
const MaxRecords = 1 << 20

// Media asks for the media that records have numbers of by now.
type Media struct{}

// Reply answers a Request: Error is set, or what was asked for.
type Reply struct {
	ID       uint64            `json:"id"`
	Error    *Error            `json:"error,omitempty"`
	Snapshot *inspect.Snapshot `json:"snapshot,omitempty"`
	Rings    int               `json:"rings,omitempty"` // descriptors that are rings: one of each worker, in order
	Media    []events.Medium   `json:"media,omitempty"` // to Listen and Media
}

// Error is what a client is told that did not get what it wanted. The errors of package inspect are in it, by Code.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// codes of errors that a client can do something about.
var codes = map[string]error{
	"no-controller": inspect.ErrNoController, "no-client": inspect.ErrNoClient, "no-queue": inspect.ErrNoQueue, "busy": inspect.ErrBusy,
}

// Is makes errors.Is find the errors of package inspect.
func (e *Error) Is(target error) bool { return codes[e.Code] != nil && codes[e.Code] == target }

// ErrorOf returns err as it is sent.
func ErrorOf(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	for code, of := range codes {
		if errors.Is(err, of) {
			return &Error{code, err.Error()}
		}
	}
	return &Error{"failed", err.Error()}
}

// ErrProtocol is a message that cannot be. ErrTooLong is one that was not sent.
var (
	ErrProtocol = errors.New("invalid message")
	ErrTooLong  = errors.New("message too long")
)

// Send sends v with files, which stay the caller's. It takes Patience at the most.
func Send(c *net.UnixConn, v any, files []*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(body) > MaxReply {
		return fmt.Errorf("%w: %d bytes, %d are allowed", ErrTooLong, len(body), MaxReply)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	b := make([]byte, headerSize, headerSize+len(body))
	binary.LittleEndian.PutUint32(b, uint32(len(body)))
	binary.LittleEndian.PutUint32(b[4:], uint32(len(files)))
	b = append(b, body...)
	if err := c.SetWriteDeadline(time.Now().Add(Patience)); err != nil {
		return err
	}
	n, _, err := c.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = c.Write(b[n:])
	}
	return err
}

// ReceiveRequest waits for a request, and then Patience for all of it. Descriptors that come with it are dropped by the kernel.
func ReceiveRequest(c *net.UnixConn) (q Request, err error) {
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		return q, err
	}
	var h [headerSize]byte
	if _, err := c.Read(h[:1]); err != nil {
		return q, err
	}
	if err := c.SetReadDeadline(time.Now().Add(Patience)); err != nil {
		return q, err
	}
	if _, err := io.ReadFull(c, h[1:]); err != nil {
		return q, unexpected(err)
	}
	n, files := binary.LittleEndian.Uint32(h[:]), binary.LittleEndian.Uint32(h[4:])
	if n > MaxRequest || files != 0 {
		return q, fmt.Errorf("%w: a request of %d bytes with %d descriptors; %d bytes and none are allowed", ErrProtocol, n, files, MaxRequest)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(c, body); err != nil {
		return q, unexpected(err)
	}
	if err := json.Unmarshal(body, &q); err != nil {
		return q, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return q, nil
}

// unexpected is err where a message has begun.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// receiveReply reads a reply with its files, which are the caller's.
func receiveReply(c *net.UnixConn) (r Reply, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var h [headerSize]byte
	oob := make([]byte, unix.CmsgSpace(4*inspect.MaxFiles))
	n, oobn, flags, _, err := c.ReadMsgUnix(h[:], oob) // close-on-exec
	if err != nil {
		return r, nil, unexpected(err) // a reply is owed
	}
	if files, err = rights(oob[:oobn]); err != nil {
		return r, files, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return r, files, fmt.Errorf("%w: descriptors were lost; is the limit of open files reached?", ErrProtocol)
	}
	if _, err := io.ReadFull(c, h[n:]); err != nil {
		return r, files, unexpected(err)
	}
	size, count := binary.LittleEndian.Uint32(h[:]), binary.LittleEndian.Uint32(h[4:])
	if size > MaxReply || int64(count) != int64(len(files)) {
		return r, files, fmt.Errorf("%w: %d bytes with %d descriptors, of which %d came", ErrProtocol, size, count, len(files))
	}
	body, err := io.ReadAll(io.LimitReader(c, int64(size))) // grows with what comes, whatever was announced
	if err != nil {
		return r, files, err
	}
	if len(body) < int(size) {
		return r, files, io.ErrUnexpectedEOF
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, files, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return r, files, nil
}

// rights returns the descriptors in control messages.
func rights(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "memory"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
