package vfiouser

import (
	"bytes"
	"errors"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dieAfter is a server that reads n messages, answers none of them, and closes.
func dieAfter(fd, n int) {
	defer unix.Close(fd)
	r := NewReceiver(fd, 0)
	defer r.Close()
	for n > 0 {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != nil && err != unix.EINTR {
			return
		}
		if eof, err := r.Fill(); eof || (err != nil && err != unix.EAGAIN) {
			return
		}
		for {
			m, ok, _ := r.Next()
			if !ok {
				break
			}
			closeAll(m.FDs)
			n--
		}
	}
}

func TestClientPeerDeath(t *testing.T) {
	file := memFDs(t, 1)[0]
	// Each phase is cut off when the server has read its message; the timeout is far off.
	for name, call := range map[string]func(c *Client) error{
		"version":     func(c *Client) error { _, err := c.Negotiate(bg); return err },
		"info":        func(c *Client) error { _, err := c.DeviceInfo(bg); return err },
		"region info": func(c *Client) error { _, err := c.RegionInfo(bg, 0); return err },
		"irq info":    func(c *Client) error { _, err := c.IRQInfo(bg, 0); return err },
		"irqs":        func(c *Client) error { return c.SetIRQs(bg, 0, 0, 0x24, []int{file}) },
		"map":         func(c *Client) error { return c.DMAMap(bg, 0, 4096, 0, file, 3) },
		"unmap":       func(c *Client) error { return c.DMAUnmap(bg, 0, 4096) },
		"read":        func(c *Client) error { return c.RegionRead(bg, 0, 0, make([]byte, 4)) },
		"write":       func(c *Client) error { return c.RegionWrite(bg, 0, 0, make([]byte, 4)) },
		"reset":       func(c *Client) error { return c.Reset(bg) },
		"posted": func(c *Client) error {
			for {
				if err := c.RegionWritePosted(bg, 0, 0x1000, make([]byte, 4)); err != nil {
					return err
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkFDs(t)
			a, b := socketPair(t)
			c := newTestClient(t, a, ClientConfig{Timeout: time.Hour})
			go dieAfter(b, 1)
			if err := call(c); !errors.Is(err, ErrPeerGone) {
				t.Fatalf("%v: want ErrPeerGone", err)
			}
			<-c.Done()
			if err := c.Reset(bg); !errors.Is(err, ErrPeerGone) || !errors.Is(c.Err(), ErrPeerGone) {
				t.Fatalf("after: %v, %v", err, c.Err())
			}
			if err := c.RegionWritePosted(bg, 0, 0, []byte{1}); !errors.Is(err, ErrPeerGone) {
				t.Fatalf("posted after: %v", err)
			}
		})
	}
	t.Run("idle", func(t *testing.T) {
		a, b := socketPair(t)
		c := newTestClient(t, a, ClientConfig{})
		closeFD(t, b)
		<-c.Done()
		if !errors.Is(c.Err(), ErrPeerGone) {
			t.Fatal(c.Err())
		}
	})
	t.Run("in the middle of a reply", func(t *testing.T) {
		a, b := socketPair(t)
		c := newTestClient(t, a, ClientConfig{Timeout: time.Hour})
		push(t, b, message(64, CmdDeviceReset, FlagReply, nil)[:9])
		closeFD(t, b)
		if err := c.Reset(bg); !errors.Is(err, ErrPeerGone) {
			t.Fatal(err)
		}
	})
}

func TestClientClose(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, b)
	c := newTestClient(t, a, ClientConfig{Timeout: time.Hour})
	result := make(chan error)
	go func() { result <- c.Reset(bg) }()
	for { // until the call is under way
		var buf [64]byte
		if n, _ := unix.Read(b, buf[:]); n > 0 {
			break
		}
		runtime.Gosched()
	}
	c.Close()
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	c.Close()
	if err := c.Reset(bg); !errors.Is(err, ErrClosed) || c.Err() != ErrClosed {
		t.Fatal(err, c.Err())
	}
}

// A server that lies ends its own connection, and leaks nothing.
func TestClientLyingServer(t *testing.T) {
	const firstID = 1 << slotBits // slot 0, generation 1
	info := RegionInfo{Flags: 7, Size: 0x4000, Areas: []MmapArea{{0x1000, 0x1000}}}
	full, _ := info.AppendReply(nil, 64)
	short, _ := info.AppendReply(nil, 32)
	cut := bytes.Clone(full[:32]) // says CAPS, has none
	wrong := bytes.Clone(full)
	wrong[8] = 3
	for name, c := range map[string]struct {
		id      uint16
		cmd     Command
		flags   uint32
		payload []byte
		fds     int
		dead    bool // the connection
	}{
		"unasked":               {firstID + 1, CmdDeviceGetRegionInfo, FlagReply, full, 1, true},
		"other generation":      {firstID * 2, CmdDeviceGetRegionInfo, FlagReply, full, 1, true},
		"answer to posted":      {postedID, CmdRegionWrite, FlagReply, nil, 1, true},
		"other command":         {firstID, CmdDeviceReset, FlagReply, nil, 1, true},
		"unknown type":          {firstID, CmdDeviceGetRegionInfo, 5, full, 1, true},
		"too many descriptors":  {firstID, CmdDeviceGetRegionInfo, FlagReply, full, MaxFDs + 1, true},
		"oversize":              {firstID, CmdDeviceGetRegionInfo, FlagReply, nil, 1, true},
		"short":                 {firstID, CmdDeviceGetRegionInfo, FlagReply, full[:31], 1, false},
		"empty":                 {firstID, CmdDeviceGetRegionInfo, FlagReply, nil, 2, false},
		"other region":          {firstID, CmdDeviceGetRegionInfo, FlagReply, wrong, 1, false},
		"cut":                   {firstID, CmdDeviceGetRegionInfo, FlagReply, cut, 1, false},
		"needs less than asked": {firstID, CmdDeviceGetRegionInfo, FlagReply, short[:32], 1, false},
		"error":                 {firstID, CmdDeviceGetRegionInfo, FlagReply | FlagError, full, 3, false},
	} {
		t.Run(name, func(t *testing.T) {
			checkFDs(t)
			a, b := socketPair(t)
			defer closeFD(t, b)
			client := newTestClient(t, a, ClientConfig{Timeout: time.Hour})
			result := make(chan error)
			go func() {
				info, err := client.RegionInfo(bg, 0)
				if info.FD >= 0 {
					unix.Close(info.FD)
				}
				result <- err
			}()
			rc := &rawClient{t: t, fd: b, r: NewReceiver(b, 0)}
			if m := rc.next(CmdDeviceGetRegionInfo); m.ID != firstID {
				t.Fatal(m.Header)
			}
			msg := message(c.id, c.cmd, c.flags, c.payload)
			if name == "oversize" {
				le.PutUint32(msg[4:], 1<<30)
			}
			push(t, b, msg, memFDs(t, c.fds)...)
			err := <-result
			if err == nil || (client.Err() != nil) != c.dead {
				t.Fatalf("call: %v, connection: %v", err, client.Err())
			}
			if c.dead && !errors.Is(err, ErrProtocol) {
				t.Fatalf("%v: want ErrProtocol", err)
			}
		})
	}
}
