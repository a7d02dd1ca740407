package events

import (
	"errors"
	"math"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// records draws one of any kind, with the fields that it has.
func records() *rapid.Generator[Record] {
	u8, u16, u32, u64 := rapid.Uint8(), rapid.Uint16(), rapid.Uint32(), rapid.Uint64()
	return rapid.Custom(func(t *rapid.T) Record {
		r := Record{Time: rapid.Int64().Draw(t, "time"), Kind: Kind(rapid.IntRange(1, int(kinds)-1).Draw(t, "kind")), Key: Key(u32.Draw(t, "key"))}
		switch r.Kind {
		case Fetch, Publish, Submit, Complete, Reap:
			r.Opcode, r.CID = u8.Draw(t, "opcode"), u16.Draw(t, "cid")
		case Post:
			r.CID = u16.Draw(t, "cid")
		}
		switch r.Kind {
		case Fetch, Publish:
			r.NSID, r.SLBA, r.Blocks = u32.Draw(t, "nsid"), u64.Draw(t, "slba"), uint32(rapid.IntRange(0, 1<<16).Draw(t, "blocks"))
			r.Rang = r.Kind == Publish && rapid.Bool().Draw(t, "rang")
		case Submit:
			r.Op, r.Medium, r.Offset = u8.Draw(t, "op"), u16.Draw(t, "medium"), u64.Draw(t, "offset")
			if r.RealQID = u16.Draw(t, "real qid"); r.RealQID != 0 {
				r.RealCID = u16.Draw(t, "real cid")
			} else {
				r.Bytes = u32.Draw(t, "bytes")
			}
		case Complete:
			r.Status, r.RealQID, r.RealCID = u16.Draw(t, "status"), u16.Draw(t, "real qid"), u16.Draw(t, "real cid")
		case Post:
			r.Status, r.CQID = u16.Draw(t, "status"), u16.Draw(t, "cqid")
		case Reap:
			r.Status = u16.Draw(t, "status")
		case Arm, ArmLost:
			r.Consumed, r.Tail, r.Event = u32.Draw(t, "consumed"), u32.Draw(t, "tail"), u32.Draw(t, "event")
			r.CQ = rapid.Bool().Draw(t, "cq")
		case Kick:
			r.Value, r.Consumed, r.CQ, r.Asleep = u32.Draw(t, "value"), u32.Draw(t, "consumed"), rapid.Bool().Draw(t, "cq"), rapid.Bool().Draw(t, "asleep")
		case Sleep:
			r.Timeout = rapid.Int64().Draw(t, "timeout")
		case Wake:
			r.Ready = u32.Draw(t, "ready")
		}
		return r
	})
}

// typed puts r in by the method of its kind, if there is one.
func typed(w *Writer, r *Record) {
	switch {
	case r.Kind == Fetch:
		w.Fetch(r.Time, r.Key, r.CID, r.Opcode, r.NSID, r.SLBA, r.Blocks)
	case r.Kind == Submit && r.RealQID == 0:
		w.Submit(r.Time, r.Key, r.CID, r.Opcode, r.Op, r.Medium, r.Offset, uint64(r.Bytes))
	case r.Kind == Submit:
		w.SubmitReal(r.Time, r.Key, r.CID, r.Opcode, r.Op, r.Medium, r.Offset, r.RealQID, r.RealCID)
	case r.Kind == Complete:
		w.Complete(r.Time, r.Key, r.CID, r.Opcode, r.Status, r.RealQID, r.RealCID)
	case r.Kind == Post:
		w.Post(r.Time, r.Key, r.CID, r.CQID, r.Status)
	case r.Kind == Publish:
		w.Publish(r.Time, r.Key, r.CID, r.Opcode, r.NSID, r.SLBA, r.Blocks, r.Rang)
	case r.Kind == Reap:
		w.Reap(r.Time, r.Key, r.CID, r.Opcode, r.Status)
	default:
		w.Put(r)
	}
}

func TestRoundTrip(t *testing.T) {
	onEachKind(t, func(t *testing.T, c Config) {
		w, r := ring(t, c)
		rapid.Check(t, func(t *rapid.T) {
			want := rapid.SliceOfN(records(), 1, 100).Draw(t, "records")
			for i := range want {
				if i%2 == 0 {
					typed(w, &want[i])
				} else {
					w.Put(&want[i])
				}
			}
			w.Flush()
			var got []Record
			some := make([]Record, rapid.IntRange(1, 40).Draw(t, "at a time"))
			for {
				n, err := r.Read(some)
				if err != nil {
					t.Fatal(err)
				}
				if got = append(got, some[:n]...); n == 0 {
					break
				}
			}
			if len(got) != len(want) || r.Lost() != 0 {
				t.Fatalf("%d of %d records, %d lost", len(got), len(want), r.Lost())
			}
			for i := range want {
				if got[i] != want[i] {
					t.Fatalf("record %d: %+v, want %+v", i, got[i], want[i])
				}
			}
		})
	})
}

// What is not flushed is not seen, but for what Ahead forces out.
func TestFlush(t *testing.T) {
	w, r := ring(t, Config{Heap: true})
	out := make([]Record, 2*Ahead)
	for i := range Ahead {
		w.Post(int64(i), 1, 0, 0, 0)
		if n, err := r.Read(out); n != 0 || err != nil {
			t.Fatalf("%d records were seen before the flush: %v", n, err)
		}
	}
	w.Post(Ahead, 1, 0, 0, 0)
	if n, err := r.Read(out); n != Ahead || err != nil {
		t.Errorf("%d records: %v", n, err)
	}
	w.Flush()
	if n, err := r.Read(out); n != 1 || out[0].Time != Ahead || err != nil {
		t.Errorf("%d records, the first %+v: %v", n, out[0], err)
	}
}

// Read and Lost together are what was written, whatever the two sides' pace, and what is read is in order.
func TestOverrunIsCountedExactly(t *testing.T) {
	onEachKind(t, func(t *testing.T, c Config) {
		c.Records = MinRecords
		w, r := ring(t, c)
		out := make([]Record, 3000)
		rapid.Check(t, func(t *rapid.T) {
			before, lost, read := w.Written(), r.Lost(), 0
			for range rapid.IntRange(1, 8).Draw(t, "rounds") {
				for range rapid.IntRange(0, 5*MinRecords).Draw(t, "written") {
					w.Post(int64(w.Written()), 7, 0, 0, 0)
				}
				w.Flush()
				n, err := r.Read(out[:rapid.IntRange(0, len(out)).Draw(t, "read")])
				if err != nil {
					t.Fatal(err)
				}
				for i := range out[:n] {
					if want := int64(before) + int64(read) + int64(r.Lost()-lost) + int64(i); out[i].Time != want {
						t.Fatalf("record %d, want %d", out[i].Time, want)
					}
				}
				read += n
			}
			n, err := r.Read(out)
			if total := uint64(read+n) + r.Lost() - lost; total != w.Written()-before || err != nil {
				t.Fatalf("%d read and %d lost of %d: %v", read+n, r.Lost()-lost, w.Written()-before, err)
			}
		})
	})
}

// Of a full ring the last ones are there, all but Ahead.
func TestTheNewestStay(t *testing.T) {
	w, _ := ring(t, Config{Heap: true, Records: MinRecords})
	for range 10 * MinRecords {
		w.Post(int64(w.Written()), 7, 0, 0, 0)
	}
	w.Flush()
	r, err := NewReader(w.mem)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]Record, 2*MinRecords)
	n, err := r.Read(out)
	if n != MinRecords-Ahead || out[n-1].Time != 10*MinRecords-1 || r.Lost() != 9*MinRecords+Ahead || err != nil {
		t.Errorf("%d records up to %d, %d lost: %v", n, out[max(n-1, 0)].Time, r.Lost(), err)
	}
	w.Post(1, 7, 0, 0, 0)
	w.Flush()
	if err := r.Skip(); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(out); n != 0 || r.Lost() != 9*MinRecords+Ahead || err != nil {
		t.Errorf("after Skip: %d records, %d lost: %v", n, r.Lost(), err)
	}
}

// A reader that is overtaken while it reads yields no record that is a mixture of two: all four words of each here are functions of one number.
func TestReadersAreNotTorn(t *testing.T) {
	onEachKind(t, func(t *testing.T, c Config) {
		c.Records = MinRecords
		w, first := ring(t, c)
		readers := []*Reader{first}
		for range 2 {
			r, err := NewReader(w.mem)
			if err != nil {
				t.Fatal(err)
			}
			readers = append(readers, r)
		}
		var over atomic.Bool
		var wg sync.WaitGroup
		for which, r := range readers {
			wg.Go(func() {
				out := make([]Record, 400)
				last, seen := int64(-1), uint64(0)
				for {
					done := over.Load()
					n, err := r.Read(out)
					if err != nil {
						t.Error(err)
						return
					}
					for i := range out[:n] {
						x := &out[i]
						if x.Time <= last || uint64(x.Time) != x.SLBA || uint32(x.Time) != x.NSID || uint16(x.Time) != x.CID {
							t.Errorf("reader %d: %+v after %d", which, *x, last)
							return
						}
						last = x.Time
					}
					seen += uint64(n)
					if n == 0 && done {
						break
					}
				}
				if seen+r.Lost() != w.Written() {
					t.Errorf("reader %d: %d and %d lost of %d", which, seen, r.Lost(), w.Written())
				}
			})
		}
		for i := range int64(200_000) {
			w.Fetch(i, 9, uint16(i), 2, uint32(i), uint64(i), 8)
			if i%16 == 15 {
				w.Flush()
			}
			if i%5000 == 0 {
				runtime.Gosched()
			}
		}
		w.Flush()
		over.Store(true)
		wg.Wait()
	})
}

// A reader cannot get at the memory to write it, nor take it away.
func TestReadersCannotWrite(t *testing.T) {
	w, _ := ring(t, Config{})
	if m, err := shm.Map(w.FD(), 0, w.Size(), true); err == nil {
		t.Error("it was mapped for writing")
		m.Close()
	}
	if _, err := unix.Pwrite(w.FD(), []byte{1}, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write: %v", err)
	}
	for _, size := range []int64{0, int64(w.Size()) * 2} {
		if err := unix.Ftruncate(w.FD(), size); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncate to %d: %v", size, err)
		}
	}
	w.Post(1, 2, 3, 4, 5)
	w.Flush()
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	w, err := Create(path, Config{Name: "guestdrv " + strings.Repeat("x", 100), Number: 3, Thread: 4, Records: 5000})
	if err != nil {
		t.Fatal(err)
	}
	w.Reap(5, NewKey(6, 7), 8, 9, 10)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(path, Config{}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("over an existing file: %v", err)
	}
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	i := r.Info()
	if i.Records != 8192 || i.Number != 3 || i.Thread != 4 || i.Process != uint32(unix.Getpid()) || i.Name != "guestdrv "+strings.Repeat("x", 55) || i.Began > Now() {
		t.Errorf("%+v", i)
	}
	out := make([]Record, 2)
	want := Record{Kind: Reap, Time: 5, Key: 6<<16 | 7, CID: 8, Opcode: 9, Status: 10}
	if n, err := r.Read(out); n != 1 || out[0] != want || err != nil {
		t.Errorf("%d records, %+v: %v", n, out[0], err)
	}
	if s := out[0].Key.String() + " " + out[0].Kind.String() + " " + Kind(99).String(); s != "6:7 reap kind 99" {
		t.Error(s)
	}
}

func TestMerge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var readers []*Reader
		var all []int64
		for range rapid.IntRange(1, 4).Draw(t, "rings") {
			w, err := New(Config{Heap: true, Records: 4096})
			if err != nil {
				t.Fatal(err)
			}
			now := int64(0)
			for range rapid.IntRange(0, 1500).Draw(t, "records") {
				now += rapid.Int64Range(0, 3).Draw(t, "gap")
				w.Post(now, Key(len(readers)), 0, 0, 0)
				all = append(all, now)
			}
			w.Flush()
			r, err := NewReader(w.mem)
			if err != nil {
				t.Fatal(err)
			}
			readers = append(readers, r)
		}
		m := NewMerge(readers...)
		out := make([]Record, rapid.IntRange(1, 700).Draw(t, "at a time"))
		got, last := 0, int64(0)
		for until := int64(100); ; {
			n, err := m.Read(out, until)
			if err != nil {
				t.Fatal(err)
			}
			for i := range out[:n] {
				if out[i].Time < last || out[i].Time >= until || int(out[i].Key) != out[i].Source {
					t.Fatalf("%+v after %d, to %d", out[i], last, until)
				}
				last = out[i].Time
			}
			got += n
			if n < len(out) && until == End {
				break
			}
			if n < len(out) {
				if until += 777; until > 4000 {
					until = End
				}
			}
		}
		if got != len(all) || m.Lost() != 0 {
			t.Fatalf("%d of %d records, %d lost", got, len(all), m.Lost())
		}
	})
}

// A broken ring does not keep the others' records back.
func TestMergeWithABrokenRing(t *testing.T) {
	good, r := ring(t, Config{Heap: true})
	bad, broken := ring(t, Config{Heap: true})
	m := NewMerge(broken, r)
	out := make([]Record, 10)
	bad.Post(1, 1, 0, 0, 0)
	bad.Flush()
	good.Post(2, 2, 0, 0, 0)
	good.Flush()
	if n, err := m.Read(out, End); n != 2 || err != nil {
		t.Fatalf("%d: %v", n, err)
	}
	store(bad.written, 0)
	good.Post(3, 2, 0, 0, 0)
	good.Flush()
	for want := range []int{1, 0} {
		if n, err := m.Read(out, End); n != 1-want || !errors.Is(err, ErrProducer) {
			t.Errorf("%d records: %v", n, err)
		}
	}
}

func TestNowIsMonotonicTime(t *testing.T) {
	c := NewClock()
	for range 1000 {
		var ts unix.Timespec
		before := c.Now()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			t.Fatal(err)
		}
		after := Now()
		const exact = int64(2 * time.Microsecond)
		if ts.Nano() < before-exact || ts.Nano() > after+exact {
			t.Fatalf("%d is not within [%d, %d]", ts.Nano(), before, after)
		}
	}
}

func TestWritingAllocatesNothing(t *testing.T) {
	w, r := ring(t, Config{Heap: true})
	out := make([]Record, 64)
	if n := testing.AllocsPerRun(1000, func() {
		w.Fetch(1, 2, 3, 4, 5, 6, 7)
		w.Submit(1, 2, 3, 4, 5, 6, 7, math.MaxUint64)
		w.Put(&Record{Kind: Sleep, Timeout: -1})
		w.Flush()
		if n, err := r.Read(out); n != 3 || out[1].Bytes != math.MaxUint32 || err != nil {
			t.Fatal(n, out[1], err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
