package path

import (
	"testing"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Commands at a depth of 32 with both ends of the guest's, each with one real command.
func BenchmarkMatcher(b *testing.B) {
	m := New(Config{}, func(*Command) {})
	m.Media([]events.Medium{{ID: 1, Kind: "nvme", Disk: "nvme0n1", Shift: 9}})
	worker, guest := m.Worker(events.Info{Thread: 9}), m.Guest()
	key := events.NewKey(1, 1)
	const depth = 32
	begin, end := make([]events.Record, 0, 2*depth), make([]events.Record, 0, 2*depth)
	publish, reap := make([]events.Record, 0, depth), make([]events.Record, 0, depth)
	kernel := make([]trace.Event, 0, 2*depth)
	b.ReportAllocs()
	for i := int64(0); i < int64(b.N); i += depth {
		at := i * 1000
		begin, end, publish, reap, kernel = begin[:0], end[:0], publish[:0], reap[:0], kernel[:0]
		for cid := range uint16(depth) {
			slba := uint64(i+int64(cid)) % 1e6 * 8
			publish = append(publish, events.Record{Time: at, Kind: events.Publish, Key: key, CID: cid, Opcode: nvme.IORead, SLBA: slba})
			begin = append(begin,
				events.Record{Time: at + 1, Kind: events.Fetch, Key: key, CID: cid, Opcode: nvme.IORead, SLBA: slba},
				events.Record{Time: at + 1, Kind: events.Submit, Key: key, CID: cid, Opcode: nvme.IORead, Op: OpRead, Medium: 1, Offset: slba * 512, Bytes: 4096})
			e := trace.Event{Kind: trace.Start, Time: at + 2, QID: 1, CID: cid, Opcode: nvme.IORead, Disk: "nvme0n1", SLBA: slba, Blocks: 8, TID: 9, Comm: "hostmed"}
			kernel = append(kernel, e)
			end = append(end, events.Record{Time: at + 4, Kind: events.Complete, Key: key, CID: cid}, events.Record{Time: at + 4, Kind: events.Post, Key: key, CID: cid})
			reap = append(reap, events.Record{Time: at + 5, Kind: events.Reap, Key: key, CID: cid})
		}
		for _, e := range kernel {
			e.Kind, e.Time, e.Latency = trace.End, at+3, 1
			kernel = append(kernel, e)
		}
		m.Records(guest, publish)
		m.Records(worker, begin)
		m.Events(kernel)
		m.Records(worker, end)
		m.Records(guest, reap)
		m.Advance(at + 6)
	}
	if c := m.Counts(); c.Matched != c.Commands || c.Commands < uint64(b.N) || c.Guestless != 0 {
		b.Fatalf("%+v", c)
	}
}
