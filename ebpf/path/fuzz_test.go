package path

import (
	"encoding/binary"
	"testing"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
)

// FuzzMatcher: whatever rings and the kernel say, bounds hold and spans add up.
func FuzzMatcher(f *testing.F) {
	f.Add([]byte{0, 1, 0, 2, 3, 0, 1, 1, 0, 2, 3, 0, 1, 2, 4, 2, 3, 0, 2, 3, 5, 2, 3, 0})
	f.Add([]byte{2, 10, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 2, 2, 1, 1, 1, 3, 0, 4, 1, 1, 1, 3, 1, 5, 1, 1, 1, 0, 4, 6, 1, 1, 1, 2, 11, 7, 1, 1, 1, 4, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		const open = 16
		m := New(Config{MaxAge: 1000, MaxOpen: open, MaxQueued: 64}, func(c *Command) {
			sum := int64(0)
			for _, ns := range c.Spans {
				if ns < 0 {
					t.Fatalf("%+v", *c)
				}
				sum += ns
			}
			if sum != c.Total {
				t.Fatalf("%+v", *c)
			}
		})
		m.Media([]events.Medium{{ID: 1, Kind: "block", Disk: "nvme0n1", Shift: 9}, {ID: 2, Kind: "nvme", Disk: "nvme0n1", Shift: 9}, {ID: 3, Kind: "vfio"}})
		rings := []int{m.Worker(events.Info{Thread: 1}), m.Worker(events.Info{Thread: 2}), m.Guest()}
		at := int64(0)
		for ; len(data) >= 6; data = data[6:] {
			what, kind, step := data[0]%6, data[1], int64(data[2])
			x := binary.LittleEndian.Uint16(data[3:])
			at += step - 20
			cid, op, offset := x&3, uint8(x>>2&7), uint64(x>>5&7)*512
			switch {
			case what < 3:
				m.Records(rings[what], []events.Record{{
					Time: at, Kind: events.Kind(kind % 12), Key: events.Key(x >> 14), CID: cid, Opcode: op, Op: data[5] % 7, Medium: uint16(data[5] >> 4), Offset: offset, Bytes: uint32(x>>8&7) * 512,
					RealQID: uint16(data[5] & 1),
				}})
			case what == 3:
				m.Events([]trace.Event{{
					Kind: trace.Kind(1 + kind%2), Time: at, Latency: int64(kind), QID: 1 + x>>15, CID: cid, Opcode: op, Disk: "nvme0n1", SLBA: offset / 512, Blocks: uint32(x >> 8 & 7), TID: uint32(data[5] & 3),
				}})
			case what == 4:
				m.Advance(at)
			default:
				m.Lost(rings[kind%3], uint64(step))
			}
			if len(m.open) > open || len(m.real) > open || len(m.guests.published) > open || m.queued > 64+1 {
				t.Fatalf("%d, %d, %d, %d", len(m.open), len(m.real), len(m.guests.published), m.queued)
			}
		}
		m.Close()
		if n := m.UnderWay(); n != 0 {
			t.Fatalf("%d are under way", n)
		}
		for _, d := range m.disks {
			if d.first != nil || d.last != nil || len(d.at) != 0 {
				t.Fatal("steps are left")
			}
		}
	})
}
