package main

import (
	"context"
	"encoding/json"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// fake is a source of events that a test gives it.
type fake struct {
	mu     sync.Mutex
	c      *counter
	lost   trace.Losses
	events chan trace.Event
	block  []trace.BlockCell
	kvm    []trace.ExitCell
	opened trace.Options
	closed bool
}

func newFake() *fake { return &fake{c: newCounter(), events: make(chan trace.Event, 4096)} }

// add counts events, and has Read give them.
func (f *fake) add(events ...trace.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range events {
		f.c.add(&e)
		select {
		case f.events <- e:
		default:
			f.lost.Ring++
		}
	}
}

func (f *fake) Snapshot() (*trace.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.c.snapshot()
	s.At, s.Losses, s.Block, s.KVM = time.Now(), f.lost, f.block, f.kvm
	return s, nil
}

func (f *fake) Read(ctx context.Context, each func(trace.Event)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-f.events:
			each(e)
		}
	}
}

func (f *fake) Close() error {
	f.closed = true
	return nil
}

// use has commands open f for the length of a test.
func (f *fake) use(t *testing.T) { f.useAs(t, f) }

// useAs is use with something around f.
func (f *fake) useAs(t *testing.T, s source) {
	before := openTrace
	openTrace = func(_ context.Context, o trace.Options, _ bool) (source, []string, error) {
		f.opened = o
		return s, nil, nil
	}
	t.Cleanup(func() { openTrace = before })
}

// command is a command of nvme0 from start to end.
func command(qid, cid uint16, opcode uint8, lba uint64, blocks uint32, begin, took time.Duration) (start, end trace.Event) {
	start = trace.Event{Kind: trace.Start, Time: int64(begin), QID: qid, CID: cid, Opcode: opcode, NSID: 1, SLBA: lba, Blocks: blocks, Bytes: blocks * 512, TID: 77, Comm: "fio", Disk: "nvme0n1"}
	if blocks > 0 {
		start.CDW10 = [6]uint32{uint32(lba), uint32(lba >> 32), blocks - 1}
	}
	end = start
	end.Kind, end.Time, end.Latency = trace.End, int64(begin+took), int64(took)
	return start, end
}

// load is a second of random commands from at on, whose latencies are around middle, some of them ten times as long.
func load(r *rand.Rand, at time.Duration, n int, opcode uint8, middle time.Duration) (out []trace.Event) {
	for i := range n {
		took := time.Duration(float64(middle) * math.Exp(r.NormFloat64()*0.25))
		if r.IntN(50) == 0 {
			took *= 10
		}
		begin := at + time.Duration(i)*time.Second/time.Duration(n)
		s, e := command(uint16(1+i%2), uint16(i), opcode, uint64(i)*8, 8, begin, took)
		out = append(out, s, e)
	}
	return out
}

var (
	read  = uint8(nvme.IORead)
	write = uint8(nvme.IOWrite)
)

// fakeControl is hostmed's control socket, which answers what snapshot returns.
func fakeControl(t *testing.T, snapshot func() *inspect.Snapshot) *control {
	t.Helper()
	c, err := openControl(t.Context(), serveControl(t, snapshot))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

// serveControl returns its path.
func serveControl(t *testing.T, snapshot func() *inspect.Snapshot) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/inspect", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(snapshot()) })
	server := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return path
}
