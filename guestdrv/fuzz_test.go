package guestdrv_test

import (
	"context"
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// liar decides, from random bytes, where a device does something else than it should. It lies rarely, or Open would hardly ever get
// anywhere.
type liar struct {
	mu    sync.Mutex
	bytes []byte
	after int // occasions to be honest at before the first lie
}

// lie returns 8 bytes to lie with, or false.
func (l *liar) lie() (uint64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.after > 0 {
		l.after--
		return 0, false
	}
	if len(l.bytes) < 10 {
		return 0, false
	}
	l.after = int(l.bytes[0]) % 32
	v := binary.LittleEndian.Uint64(l.bytes[2:])
	if l.bytes[1]%2 == 0 {
		v &= 0xFF // small lies go further
	}
	l.bytes = l.bytes[10:]
	return v, true
}

func (l *liar) hooks() nvmetest.Hooks {
	return nvmetest.Hooks{
		Read: func(off uint32, v uint64) uint64 {
			if x, ok := l.lie(); ok {
				if off == nvme.RegCAP {
					// TO in units of 500 ms would make each run take minutes.
					return uint64(nvme.CAP(v ^ x).WithTO(1))
				}
				return v ^ x
			}
			return v
		},
		Command: func(uint16, *nvme.Command) nvmetest.Verdict {
			x, ok := l.lie()
			switch {
			case !ok:
				return nvmetest.Verdict{}
			case x%4 == 0:
				return nvmetest.Verdict{Action: nvmetest.Drop}
			}
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.Status(x>>2) & 0x7FFF}
		},
		Identify: func(cmd *nvme.Command, data []byte) {
			for range 8 {
				if x, ok := l.lie(); ok {
					data[(x>>8)%uint64(len(data))] ^= byte(x)
					binary.LittleEndian.PutUint64(data[x%512&^7:], x)
				}
			}
		},
		Post: func(qid uint16, e *ring.Entry) {
			if x, ok := l.lie(); ok {
				e.Hi ^= x << (x % 48) &^ (1 << 48)
				e.Lo ^= x
			}
		},
	}
}

// FuzzHostileDevice opens and uses a device that lies. Whatever it does, each call must end, without a panic.
func FuzzHostileDevice(f *testing.F) {
	f.Add(uint16(0), []byte{})
	f.Add(uint16(3), []byte("0123456789"))
	f.Add(uint16(40), []byte("01234567890123456789"))
	f.Add(uint16(60), []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, after uint16, script []byte) {
		if len(script) > 200 {
			return
		}
		l := &liar{bytes: script, after: int(after % 200)}
		dev := nvmetest.New(nvmetest.Config{
			CAP: nvme.CAP(0).WithMQES(63).WithTO(1).WithCSS(1), Vectors: 8, Queues: 4,
			Namespaces: []nvmetest.Namespace{{Blocks: 2048, LBADS: 9}, {Blocks: 64, LBADS: 12}}, Hooks: l.hooks(),
		})
		defer dev.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			useAll(ctx, dev)
		}()
		select {
		case <-done:
		case <-time.After(2 * patience):
			panic("the driver hangs")
		}
	})
}

func useAll(ctx context.Context, dev *nvmetest.Device) {
	o := guestdrv.Options{DMASize: 1 << 20, Queues: 1, MaxQueuePairs: 1, QueueDepth: 8, Timeout: 40 * time.Millisecond}
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), o)
	if err != nil {
		return
	}
	defer c.Close()
	for _, ns := range c.Namespaces() {
		p := make([]byte, 24*ns.BlockSize())
		_, _ = ns.ReadAtContext(ctx, p, 0)
		_, _ = ns.WriteAtContext(ctx, p, ns.Size()-int64(len(p)))
		_ = ns.Discard(ctx, 0, ns.Size())
		_ = ns.Flush(ctx)
	}
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 4})
	if err != nil {
		return
	}
	defer p.Close()
	buf, err := c.Alloc(4096)
	if err != nil {
		return
	}
	defer buf.Free()
	var out [8]guestdrv.Result
	for range 20 {
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: 1, IOVA: buf.IOVA()}}); err != nil {
			return
		}
		if p.Publish() != nil || p.Wait(ctx) != nil {
			return
		}
		if _, err := p.Reap(out[:]); err != nil {
			return
		}
	}
}
