package backend

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// The kernel's events about devices (uevents, netlink), for backends that have one. All of a process share a socket, which is there as
// long as anybody listens.

// uevent is an event of a device. The zero value says that events were lost: whoever waits for one must look himself.
type uevent struct {
	action    string // add, change, remove, ...
	subsystem string
	name      string // DEVNAME: nvme0n1, ng0n1
}

// parseUevent reads a message of the kernel's: "ACTION@PATH" and then KEY=VALUE, each ended by a zero.
func parseUevent(msg []byte) (e uevent, ok bool) {
	head, rest, _ := bytes.Cut(msg, []byte{0})
	if !bytes.Contains(head, []byte{'@'}) {
		return e, false // udevd's begin otherwise
	}
	for len(rest) > 0 {
		var field []byte
		field, rest, _ = bytes.Cut(rest, []byte{0})
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "ACTION":
			e.action = value
		case "SUBSYSTEM":
			e.subsystem = value
		case "DEVNAME":
			e.name = strings.TrimPrefix(value, "/dev/")
		}
	}
	return e, e.action != "" && e.subsystem != ""
}

// ueventSource is where messages come from.
type ueventSource interface {
	// receive waits for a message. errLost: some did not come. Another error is the end.
	receive(p []byte) (n int, err error)
	Close() error
}

var errLost = errors.New("events were lost")

// ueventHub gives events to those who listen.
type ueventHub struct {
	open func() (ueventSource, error)

	mu     sync.Mutex
	subs   map[int]func(uevent)
	next   int
	source ueventSource
	done   chan struct{} // closed when source is not read any more

	calling sync.Mutex // held while subscribers are called
}

var uevents = ueventHub{open: openUevents}

// listen has f called with every event, one at a time, until the returned function has returned. f must not call listen or cancel.
func (h *ueventHub) listen(f func(uevent)) (cancel func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.source == nil {
		s, err := h.open()
		if err != nil {
			return nil, err
		}
		h.source, h.done, h.subs = s, make(chan struct{}), map[int]func(uevent){}
		go h.serve(s, h.done)
	}
	id := h.next
	h.next++
	h.subs[id] = f
	return sync.OnceFunc(func() { h.cancel(id) }), nil
}

func (h *ueventHub) cancel(id int) {
	h.mu.Lock()
	delete(h.subs, id)
	var s ueventSource
	var done chan struct{}
	if len(h.subs) == 0 {
		s, done, h.source = h.source, h.done, nil
	}
	h.mu.Unlock()
	if s != nil {
		s.Close()
		<-done
	}
	h.calling.Lock() // f has returned
	//lint:ignore SA2001 it is waited for, and nothing else
	h.calling.Unlock()
}

func (h *ueventHub) serve(s ueventSource, done chan struct{}) {
	defer close(done)
	buf := make([]byte, 16<<10)
	for {
		n, err := s.receive(buf)
		e, ok := uevent{}, true
		switch {
		case errors.Is(err, errLost):
		case err != nil:
			return
		default:
			e, ok = parseUevent(buf[:n])
		}
		if ok {
			h.tell(e)
		}
	}
}

func (h *ueventHub) tell(e uevent) {
	h.calling.Lock()
	defer h.calling.Unlock()
	h.mu.Lock()
	fs := make([]func(uevent), 0, len(h.subs))
	for _, f := range h.subs {
		fs = append(fs, f)
	}
	h.mu.Unlock()
	for _, f := range fs {
		f(e)
	}
}

// netlink is the kernel's socket for uevents.
type netlink struct{ f *os.File }

func openUevents() (ueventSource, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("the kernel's device events: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("the kernel's device events: %w", err)
	}
	return &netlink{os.NewFile(uintptr(fd), "uevents")}, nil
}

func (l *netlink) Close() error { return l.f.Close() }

func (l *netlink) receive(p []byte) (n int, err error) {
	conn, err := l.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var from unix.Sockaddr
	waited := conn.Read(func(fd uintptr) bool {
		for {
			n, from, err = unix.Recvfrom(int(fd), p, 0)
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	if waited != nil {
		return 0, waited
	}
	if err == unix.ENOBUFS {
		return 0, errLost
	}
	if err != nil {
		return 0, err
	}
	if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
		return 0, nil // from a process, not from the kernel
	}
	return n, nil
}
