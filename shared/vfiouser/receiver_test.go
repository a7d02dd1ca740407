package vfiouser

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// message returns the bytes of a message.
func message(id uint16, cmd Command, flags uint32, payload []byte) []byte {
	h := Header{ID: id, Cmd: cmd, Size: HeaderSize + uint32(len(payload)), Flags: flags}
	return append(h.Append(nil), payload...)
}

// push sends b, in one sendmsg, with fds.
func push(t testing.TB, fd int, b []byte, fds ...int) {
	t.Helper()
	var oob []byte
	if len(fds) != 0 {
		oob = unix.UnixRights(fds...)
	}
	if n, errno := sendmsg(fd, b, nil, oob); errno != 0 || n != len(b) {
		t.Fatalf("sendmsg: %d of %d bytes, %v", n, len(b), errno)
	}
}

// pull takes every message that is there.
func pull(t testing.TB, r *Receiver) (got []Message) {
	t.Helper()
	for {
		eof, err := r.Fill()
		if err == unix.EAGAIN {
			return got
		}
		if eof || err != nil {
			t.Fatalf("Fill: eof %v, %v", eof, err)
		}
		got = append(got, drain(t, r)...)
	}
}

// drain takes the messages in the buffer, and copies their payloads.
func drain(t testing.TB, r *Receiver) (got []Message) {
	t.Helper()
	for {
		m, ok, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return got
		}
		m.Payload = bytes.Clone(m.Payload)
		got = append(got, m)
	}
}

func same(t testing.TB, got []Message, want ...[]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d messages, want %d", len(got), len(want))
	}
	for i, m := range got {
		if b := append(m.Header.Append(nil), m.Payload...); !bytes.Equal(b, want[i]) {
			t.Fatalf("message %d: %x, want %x", i, b, want[i])
		}
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

func TestReceiverEverySplit(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 2)
	msgs := [][]byte{message(1, CmdVersion, 0, pattern(9)), message(2, CmdDMAMap, 0, pattern(32)), message(3, CmdDeviceReset, 0, nil)}
	stream := bytes.Join(msgs, nil)
	for cut := 1; cut < len(stream); cut++ {
		a, b := socketPair(t)
		r := NewReceiver(b, 0)
		var got []Message
		from := 0
		for i, m := range msgs { // a sendmsg for each, and one more at the cut
			to := from + len(m)
			var fds []int
			if i == 1 {
				fds = files
			}
			if cut > from && cut < to {
				push(t, a, stream[from:cut], fds...)
				got = append(got, pull(t, r)...)
				from, fds = cut, nil
			}
			push(t, a, stream[from:to], fds...)
			if cut%2 == 0 {
				got = append(got, pull(t, r)...)
			}
			from = to
		}
		got = append(got, pull(t, r)...)
		same(t, got, msgs...)
		sameFiles(t, got[1].FDs, files)
		if len(got[0].FDs)+len(got[2].FDs) != 0 {
			t.Fatalf("cut %d: descriptors with the wrong message", cut)
		}
		closeAll(got[1].FDs)
		r.Close()
		closeFD(t, a)
		closeFD(t, b)
	}
}

func TestReceiverByteByByte(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 3)
	msgs := [][]byte{message(1, CmdRegionWrite, FlagNoReply, pattern(20)), message(2, CmdDeviceSetIRQs, 0, pattern(20)), message(3, CmdDeviceReset, 0, nil), message(4, CmdDMAMap, 0, pattern(32))}
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	var got []Message
	for i, m := range msgs {
		for j := range m {
			var fds []int
			if j == 0 && i == 1 {
				fds = files[:2]
			} else if j == 0 && i == 3 {
				fds = files[2:]
			}
			push(t, a, m[j:j+1], fds...)
			got = append(got, pull(t, r)...)
		}
	}
	same(t, got, msgs...)
	sameFiles(t, got[1].FDs, files[:2])
	sameFiles(t, got[3].FDs, files[2:])
	closeAll(got[1].FDs)
	closeAll(got[3].FDs)
}

// Descriptors sent late, with bytes in the middle of a message, are that message's.
func TestReceiverFDsInTheMiddle(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 3)
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	m := message(1, CmdDeviceSetIRQs, 0, pattern(20))
	push(t, a, m[:16], files[0])
	push(t, a, m[16:20], files[1])
	push(t, a, m[20:], files[2])
	got := pull(t, r)
	same(t, got, m)
	sameFiles(t, got[0].FDs, files)
	closeAll(got[0].FDs)
}

// One message behind another in the same read, each with its own descriptors.
func TestReceiverFDsOfNeighbours(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 4)
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	var want [][]byte
	for i := range 8 {
		m := message(uint16(i), CmdDMAMap, 0, pattern(32+i))
		want = append(want, m)
		if i%2 == 1 {
			push(t, a, m, files[i/2])
		} else {
			push(t, a, m)
		}
	}
	got := pull(t, r)
	same(t, got, want...)
	for i, m := range got {
		if i%2 == 1 {
			sameFiles(t, m.FDs, files[i/2:i/2+1])
		} else if len(m.FDs) != 0 {
			t.Fatalf("message %d has descriptors", i)
		}
		closeAll(m.FDs)
	}
}

func TestReceiverManyInOne(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	var stream []byte
	var want [][]byte
	for i := range 500 {
		m := message(uint16(i), CmdRegionWrite, FlagNoReply, pattern(i%50))
		want = append(want, m)
		stream = append(stream, m...)
	}
	push(t, a, stream)
	same(t, pull(t, r), want...)
}

// Random messages of all sizes, sent in random pieces.
func TestReceiverRandomStream(t *testing.T) {
	checkFDs(t)
	rng := rand.New(rand.NewPCG(1, 2))
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	var stream []byte
	var want [][]byte
	for i := range 60 {
		size := rng.IntN(100)
		if i%5 == 0 {
			size = rng.IntN(70000)
		}
		m := message(uint16(i), CmdRegionWrite, 0, pattern(size))
		want = append(want, m)
		stream = append(stream, m...)
	}
	var got []Message
	for len(stream) > 0 {
		n := min(1+rng.IntN(9000), len(stream))
		push(t, a, stream[:n])
		stream = stream[n:]
		got = append(got, pull(t, r)...)
	}
	same(t, got, want...)
}

func TestReceiverLargestMessage(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	payload := pattern(MaxMsg - HeaderSize)
	sent := make(chan error, 1)
	go func() { sent <- SendMessage(a, Header{ID: 9, Cmd: CmdRegionWrite}, payload, nil) }()
	var got []Message
	for len(got) == 0 {
		got = pull(t, r)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	same(t, got, message(9, CmdRegionWrite, 0, payload))
	push(t, a, message(1, CmdDeviceReset, 0, nil))
	pull(t, r)
	if len(r.buf) != recvBufSize {
		t.Fatalf("%d bytes kept after a large message, want %d", len(r.buf), recvBufSize)
	}
}

// A peer that announces a large message and sends little of it must not make us hold a
// large buffer.
func TestReceiverGrowsWithWhatComes(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	m := message(1, CmdRegionWrite, 0, make([]byte, MaxDataXfer))
	for _, n := range []int{100, 3000, 20000} {
		push(t, a, m[:n])
		m = m[n:]
		if got := pull(t, r); len(got) != 0 {
			t.Fatal("a message out of nothing")
		}
		if have := r.end - r.start; len(r.buf) > max(recvBufSize, recvGrowth*have) {
			t.Fatalf("buffer of %d bytes for %d", len(r.buf), have)
		}
	}
}

func TestReceiverBadSize(t *testing.T) {
	for _, size := range []uint32{0, 1, 15, MaxMsg + 1, 1 << 31, 0xffffffff} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			checkFDs(t)
			files := memFDs(t, 2)
			a, b := socketPair(t)
			defer closeFD(t, a)
			defer closeFD(t, b)
			r := NewReceiver(b, 0)
			good := message(1, CmdDeviceReset, 0, nil)
			bad := Header{ID: 2, Cmd: CmdDMAMap, Size: size}
			push(t, a, append(bytes.Clone(good), bad.Append(nil)...), files...)
			if eof, err := r.Fill(); eof || err != nil {
				t.Fatal(eof, err)
			}
			if m, ok, err := r.Next(); !ok || err != nil || m.ID != 1 || len(m.FDs) != 0 {
				t.Fatalf("%v %v %v: want the good message first", m, ok, err)
			}
			if _, ok, err := r.Next(); ok || !errors.Is(err, ErrProtocol) {
				t.Fatalf("%v %v: want ErrProtocol", ok, err)
			}
			push(t, a, good)
			if _, err := r.Fill(); !errors.Is(err, ErrProtocol) {
				t.Fatalf("Fill goes on: %v", err)
			}
			r.Close()
		})
	}
}

func TestReceiverSizeLimits(t *testing.T) {
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 64)
	defer r.Close()
	fits := message(1, CmdRegionWrite, 0, make([]byte, 48))
	push(t, a, fits)
	same(t, pull(t, r), fits)
	push(t, a, message(1, CmdRegionWrite, 0, make([]byte, 49)))
	if _, err := r.Fill(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Next(); !errors.Is(err, ErrProtocol) {
		t.Fatal(err)
	}
}

func TestReceiverTooManyFDs(t *testing.T) {
	t.Run("in pieces", func(t *testing.T) {
		checkFDs(t)
		files := memFDs(t, MaxFDsTaken)
		a, b := socketPair(t)
		defer closeFD(t, a)
		defer closeFD(t, b)
		r := NewReceiver(b, 0)
		defer r.Close()
		m := message(1, CmdDeviceSetIRQs, 0, pattern(20))
		push(t, a, m[:20], files...)
		push(t, a, m[20:], files[0])
		if _, err := r.Fill(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Fill(); !errors.Is(err, ErrProtocol) {
			t.Fatalf("%v: want ErrProtocol", err)
		}
	})
	t.Run("just enough", func(t *testing.T) {
		checkFDs(t)
		files := memFDs(t, MaxFDsTaken)
		a, b := socketPair(t)
		defer closeFD(t, a)
		defer closeFD(t, b)
		r := NewReceiver(b, 0)
		defer r.Close()
		push(t, a, message(1, CmdDeviceSetIRQs, 0, nil), files...)
		got := pull(t, r)
		sameFiles(t, got[0].FDs, files)
		closeAll(got[0].FDs)
	})
}

func TestReceiverClosesUntakenFDs(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 3)
	a, b := socketPair(t)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	push(t, a, message(1, CmdDMAMap, 0, nil), files[:2]...)
	push(t, a, message(2, CmdDMAMap, 0, nil)[:7], files[2])
	if _, err := r.Fill(); err != nil {
		t.Fatal(err)
	}
	m, ok, err := r.Next()
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	closeAll(m.FDs)
	if _, err := r.Fill(); err != nil {
		t.Fatal(err)
	}
	closeFD(t, a)
	if eof, err := r.Fill(); !eof || err != io.ErrUnexpectedEOF {
		t.Fatal(eof, err)
	}
	r.Close()
	if _, err := r.Fill(); err == nil {
		t.Fatal("Fill after Close")
	}
}

func TestReceiverEOF(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	r := NewReceiver(b, 0)
	push(t, a, message(1, CmdDeviceReset, 0, nil))
	closeFD(t, a)
	if eof, err := r.Fill(); eof || err != nil {
		t.Fatal(eof, err)
	}
	if _, err := r.Fill(); err != ErrUntaken {
		t.Fatalf("%v: want ErrUntaken", err)
	}
	drain(t, r)
	if eof, err := r.Fill(); !eof || err != nil {
		t.Fatal(eof, err)
	}
	r.Close()
	closeFD(t, b)

	a, b = socketPair(t)
	defer closeFD(t, b)
	r = NewReceiver(b, 0)
	defer r.Close()
	push(t, b, []byte("unread"))
	closeFD(t, a)
	if eof, err := r.Fill(); !eof || err != unix.ECONNRESET {
		t.Fatal(eof, err)
	}
}

func TestSendMessageTimeout(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	err := SendMessageTimeout(a, Header{Cmd: CmdRegionRead}, make([]byte, MaxDataXfer), nil, 20*time.Millisecond)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if err := SendMessage(a, Header{}, make([]byte, MaxMsg), nil); !errors.Is(err, errTooLong) {
		t.Fatal(err)
	}
	if err := SendMessage(a, Header{}, nil, make([]int, MaxFDs+1)); !errors.Is(err, errTooLong) {
		t.Fatal(err)
	}
}

func TestSendMessagePeerGone(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, a)
	sent := make(chan error, 1)
	go func() { sent <- SendMessage(a, Header{Cmd: CmdRegionRead}, make([]byte, MaxDataXfer), nil) }()
	for {
		var got [1]byte
		if _, err := unix.Read(b, got[:]); err == nil {
			break
		}
	}
	closeFD(t, b) // while the sender waits for room
	if err := <-sent; !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Fatal(err)
	}
}
