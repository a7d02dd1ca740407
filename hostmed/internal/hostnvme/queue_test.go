package hostnvme

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func random(n int) []byte {
	b := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)})
	_, _ = rnd.Read(b)
	return b
}

// TestDataComesAndGoes writes and reads by every way that there is, and looks at the disk.
func TestDataComesAndGoes(t *testing.T) {
	for _, c := range []struct {
		name    string
		cfg     nvmetest.Config
		polled  bool
		mapped  bool
		run     int
		bounced uint64
	}{
		{name: "mapped", mapped: true},
		{name: "mapped, by registers", mapped: true, cfg: nvmetest.Config{NoShadow: true}},
		{name: "polled", mapped: true, polled: true},
		{name: "page by page", mapped: true, run: 1},
		{name: "three pages by three, polled", mapped: true, run: 3, polled: true},
		{name: "copied", bounced: 40},
		{name: "copied, polled", polled: true, bounced: 40},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRigIn(t, c.cfg, c.run)
			q := r.queue(t, Attach{Slice: all, Polled: c.polled})
			mem := r.guests.Memory(2 << 20)
			if c.mapped {
				q.AddMemory(mem)
				r.mem.Settle(patience)
			}
			data := random(1 << 20)
			copy(mem, data)
			q.must(t, Request{Op: Write, Off: 512, Len: 1 << 20, Vec: []Seg{seg(mem[:1<<20])}})
			if !bytes.Equal(r.model.Disk(1)[512:][:1<<20], data) {
				t.Fatal("the disk has something else")
			}
			q.must(t, Request{Op: Read, Off: 512, Len: 1 << 20, Vec: []Seg{seg(mem[1<<20:])}})
			if !bytes.Equal(mem[1<<20:], data) {
				t.Fatal("something else was read")
			}
			n, _ := r.Counts()
			if (n.Bounced != 0) == c.mapped || (n.Mapped != 0) != c.mapped || n.Commands < 16 {
				t.Fatalf("%+v", n)
			}
			if own := q.Counts(); own.Commands != n.Commands || own.Mapped != n.Mapped || own.Bounced != n.Bounced || own.Native != 0 {
				t.Fatalf("%+v, and of all queues %+v", own, n)
			}
			if (q.EventFD() < 0) != c.polled {
				t.Fatalf("eventfd %d", q.EventFD())
			}
		})
	}
}

// seen is a hook that keeps the I/O commands of the controller.
type seen struct {
	mu   sync.Mutex
	cmds []nvme.Command
}

func (s *seen) hook(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
	if qid != 0 {
		s.mu.Lock()
		s.cmds = append(s.cmds, *cmd)
		s.mu.Unlock()
	}
	return nvmetest.Verdict{}
}

func (s *seen) take() []nvme.Command {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.cmds
	s.cmds = nil
	return c
}

// TestCommandsOfASlice looks at what the device is sent: ids and blocks are its own, limits are kept, hints arrive, and nothing else does.
func TestCommandsOfASlice(t *testing.T) {
	var s seen
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: s.hook}, Namespaces: []nvmetest.Namespace{{Blocks: 8, LBADS: 9}, {Blocks: 8192, LBADS: 9}}})
	part := Slice{NSID: 2, First: 1000, Blocks: 2000, Shift: 9, MaxTransfer: 64 << 10, Boundary: 128 << 10, Zeroes: true, MaxZeroes: 1 << 20, Dealloc: true, Discard: true, MaxDiscard: 200 << 9}
	q := r.queue(t, Attach{Slice: part, Polled: true})
	mem := r.guests.Memory(1 << 20)
	q.AddMemory(mem)
	r.mem.Settle(patience)
	type cmd struct {
		op           uint8
		slba         uint64
		blocks       int
		cdw12, cdw13 uint32
	}
	check := func(t *testing.T, want ...cmd) {
		t.Helper()
		got := s.take()
		if len(got) != len(want) {
			t.Fatalf("%d commands: %+v", len(got), got)
		}
		for i, w := range want {
			g := &got[i]
			blocks := int(g.NLB().Count())
			if g.Opcode != w.op || g.NSID != 2 || w.blocks > 0 && (g.SLBA() != w.slba || blocks != w.blocks) || g.CDW12&^0xFFFF != w.cdw12 || g.CDW13 != w.cdw13 {
				t.Fatalf("command %d: %+v, want %+v", i, g, w)
			}
			if g.CDW2|g.CDW3|g.CDW14|g.CDW15 != 0 || g.MPTR != 0 {
				t.Fatalf("command %d: %+v", i, g)
			}
		}
	}
	guest := &nvme.Command{Opcode: nvme.IOWrite, Flags: 0xC3, NSID: 77, CDW2: 1, CDW3: 1, MPTR: 1, CDW12: 0xFFFF_FFFF, CDW13: 0xFFFF_FFFF, CDW14: 1, CDW15: 1}
	one := func(n int) []Seg { return []Seg{seg(mem[:n])} }

	q.must(t, Request{Op: Write, Off: 512, Len: 512, Vec: one(512), Cmd: guest})
	check(t, cmd{nvme.IOWrite, 1001, 1, nvme.RWForceUnit | nvme.RWLimitedRetry, 0xFF})
	q.must(t, Request{Op: Read, Off: 512, Len: 512, Vec: one(512), Cmd: guest}) // of a Compare, say
	check(t, cmd{nvme.IORead, 1001, 1, 0, 0})
	q.must(t, Request{Op: Write, Off: 0, Len: 160 << 9, Vec: one(160 << 9), FUA: true}) // boundaries at multiples of 256 of the device's blocks
	check(t, cmd{nvme.IOWrite, 1000, 24, nvme.RWForceUnit, 0}, cmd{nvme.IOWrite, 1024, 128, nvme.RWForceUnit, 0}, cmd{nvme.IOWrite, 1152, 8, nvme.RWForceUnit, 0})
	q.must(t, Request{Op: Flush})
	check(t, cmd{op: nvme.IOFlush})
	q.must(t, Request{Op: WriteZeroes, Off: 24 << 9, Len: 300 << 9, Dealloc: true})
	check(t, cmd{nvme.IOWriteZeroes, 1024, 256, nvme.RWDeallocate, 0}, cmd{nvme.IOWriteZeroes, 1280, 44, nvme.RWDeallocate, 0})
	r.model.Fill(2, bytes.Repeat([]byte{1}, 8192<<9))
	q.must(t, Request{Op: Discard, Off: 100 << 9, Len: 300 << 9})
	check(t, cmd{op: nvme.IODSM}, cmd{op: nvme.IODSM})
	disk := r.model.Disk(2)
	for i := range 8192 {
		if inside := i >= 1100 && i < 1400; (disk[i<<9] == 0) != inside {
			t.Fatalf("block %d after a discard of 1100 to 1399: %d", i, disk[i<<9])
		}
	}
	for _, x := range []struct {
		r  Request
		st nvme.Status
	}{
		{Request{Op: Read, Off: 2000 << 9, Len: 512, Vec: one(512)}, nvme.StatusLBAOutOfRange},
		{Request{Op: Read, Off: 1999 << 9, Len: 1024, Vec: one(1024)}, nvme.StatusLBAOutOfRange},
		{Request{Op: Write, Off: ^uint64(0) &^ 511, Len: 1024, Vec: one(1024)}, nvme.StatusLBAOutOfRange},
		{Request{Op: Discard, Off: 512, Len: ^uint64(0) &^ 511}, nvme.StatusLBAOutOfRange},
		{Request{Op: Read, Off: 100, Len: 512, Vec: one(512)}, nvme.StatusInvalidField},
		{Request{Op: Command + 1}, nvme.StatusInvalidOpcode},
		{Request{Op: Command, Cmd: &nvme.Command{Opcode: 0x7F}}, nvme.StatusInvalidOpcode},
	} {
		if st := q.do(t, x.r); st != x.st.WithDNR() {
			t.Errorf("%+v: %v", x.r, st)
		}
	}
	q.must(t, Request{Op: Read, Vec: nil})
	check(t)
}

// TestNativeCommands are commands that the device does itself.
func TestNativeCommands(t *testing.T) {
	var mu sync.Mutex
	var last nvme.Command
	var list []byte
	var r *rig
	r = newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid == 0 {
			return nvmetest.Verdict{}
		}
		mu.Lock()
		defer mu.Unlock()
		last = *cmd
		if cmd.Opcode == nvme.IOCopy || cmd.Opcode == nvme.IODSM {
			list = make([]byte, 64)
			r.model.ReadIOVA(cmd.PRP1, list)
		}
		if cmd.Opcode == nvme.IOCompare {
			return nvmetest.Verdict{}
		}
		return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusSuccess}
	}}})
	part := all
	part.First, part.Blocks = 100, 1000
	q := r.queue(t, Attach{Slice: part})
	mem := r.guests.Memory(1 << 20)
	command := func(cmd nvme.Command, off, n uint64, vec []Seg) nvme.Status {
		return q.do(t, Request{Op: Command, Cmd: &cmd, Off: off << 9, Len: n << 9, Vec: vec})
	}
	if st := command(nvme.Command{Opcode: nvme.IOVerify, CDW12: 0xFFFF_FFFF}, 7, 9, nil); !st.OK() || last.SLBA() != 107 || last.NLB().Count() != 9 {
		t.Fatalf("%v, %+v", st, last)
	}
	if st := command(nvme.Command{Opcode: nvme.IOWriteUncorrectable, CDW12: 0xFFFF_FFFF}, 7, 9, nil); !st.OK() || last.SLBA() != 107 || last.CDW12 != 8 {
		t.Fatalf("%v, %+v", st, last)
	}
	if st := command(nvme.Command{Opcode: nvme.IOCompare}, 0, 2, []Seg{seg(mem[:1024])}); !st.OK() {
		t.Fatal(st)
	}
	mem[1000] = 1
	if st := command(nvme.Command{Opcode: nvme.IOCompare}, 0, 2, []Seg{seg(mem[:1024])}); st != nvme.StatusCompareFailure.WithDNR() {
		t.Fatal(st)
	}
	ranges := make([]byte, 64)
	putRange(ranges, nvme.DSMRange{Attributes: 3, Length: 10, SLBA: 990})
	putRange(ranges[16:], nvme.DSMRange{Length: 0, SLBA: 0})
	dsm := nvme.Command{Opcode: nvme.IODSM, CDW10: 0xFF01, CDW11: 0xFFFF_FFFF}
	if st := command(dsm, 0, 0, []Seg{seg(ranges)}); !st.OK() || last.CDW10 != 1 || last.CDW11 != 7 || list[8] != byte(1090&0xFF) || list[9] != 1090>>8 || list[0] != 3 || list[24] != 100 {
		t.Fatalf("%v, %+v, %v", st, last, list)
	}
	putRange(ranges, nvme.DSMRange{Length: 11, SLBA: 990})
	if st := command(dsm, 0, 0, []Seg{seg(ranges)}); st != nvme.StatusLBAOutOfRange.WithDNR() {
		t.Fatal(st)
	}
	if st := command(dsm, 0, 0, []Seg{seg(ranges[:16])}); st != nvme.StatusInternalError.WithDNR() {
		t.Fatalf("a list that is shorter than it says: %v", st)
	}
	sources := bytes.Repeat([]byte{0xFF}, 64)
	clear(sources[8:24])
	sources[8], sources[16] = 50, 9
	cp := nvme.Command{Opcode: nvme.IOCopy, CDW12: 0}
	if st := command(cp, 990, 10, []Seg{seg(sources)}); !st.OK() || last.SLBA() != 1090 || list[8] != 150 || list[16] != 9 || !bytes.Equal(list[24:32], make([]byte, 8)) {
		t.Fatalf("%v, %+v, %v", st, last, list)
	}
	if st := command(cp, 991, 9, []Seg{seg(sources)}); st != nvme.StatusLBAOutOfRange.WithDNR() {
		t.Fatal(st)
	}
	sources[8], sources[9] = 0xE0, 3 // 992
	if st := command(cp, 0, 10, []Seg{seg(sources)}); st != nvme.StatusLBAOutOfRange.WithDNR() {
		t.Fatal(st)
	}
	part.ReadOnly = true
	q = r.queue(t, Attach{Slice: part})
	if st := command(cp, 0, 10, []Seg{seg(sources)}); st != nvme.StatusNamespaceWriteProtected.WithDNR() {
		t.Fatal(st)
	}
	if st := q.do(t, Request{Op: Write, Len: 512, Vec: []Seg{seg(mem[:512])}}); st != nvme.StatusNamespaceWriteProtected.WithDNR() {
		t.Fatal(st)
	}
}

// TestDeviceWithoutTheCommands has a device that knows neither Write Zeroes nor Dataset Management.
func TestDeviceWithoutTheCommands(t *testing.T) {
	var s seen
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: s.hook}})
	poor := all
	poor.Zeroes, poor.Discard = false, false
	q := r.queue(t, Attach{Slice: poor})
	r.model.Fill(1, bytes.Repeat([]byte{1}, 16384<<9))
	q.must(t, Request{Op: Discard, Off: 0, Len: 1 << 20})
	q.must(t, Request{Op: WriteZeroes, Off: 512, Len: 600 << 9})
	for _, c := range s.take() {
		if c.Opcode != nvme.IOWrite {
			t.Fatalf("%+v", c)
		}
	}
	disk := r.model.Disk(1)
	if disk[0] != 1 || disk[511] != 1 || !bytes.Equal(disk[512:601<<9], make([]byte, 600<<9)) || disk[601<<9] != 1 {
		t.Fatal("other blocks are zeroes")
	}
}

// TestFirstErrorOfAPieceWins has one of the commands of a request fail.
func TestFirstErrorOfAPieceWins(t *testing.T) {
	var n atomic.Int32
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 && n.Add(1) == 3 {
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusUnrecoveredRead.WithDNR() | 1<<13}
		}
		return nvmetest.Verdict{}
	}}})
	q := r.queue(t, Attach{Slice: all})
	mem := r.guests.Memory(1 << 20)
	for _, mapped := range []bool{false, true} {
		if n.Store(0); mapped {
			q.AddMemory(mem)
			r.mem.Settle(patience)
		}
		if st := q.do(t, Request{Op: Read, Len: 1 << 20, Vec: []Seg{seg(mem)}}); st != nvme.StatusUnrecoveredRead.WithDNR() {
			t.Fatalf("mapped %v: %v", mapped, st)
		}
	}
}

// TestMoreThanThereIsRoomFor puts ten times as much as the pair has slots, by several queues, and expects all of it back.
func TestMoreThanThereIsRoomFor(t *testing.T) {
	r := newRig(t, nvmetest.Config{Queues: 1, Vectors: 2})
	mem := r.guests.Memory(1 << 20)
	var queues []*Queue
	for i := range 3 {
		q := r.queue(t, Attach{Slice: all})
		if i > 0 { // the first has to copy
			q.AddMemory(mem)
		}
		queues = append(queues, q)
	}
	r.mem.Settle(patience)
	const each = 1000
	for _, q := range queues {
		q.Begin()
		for i := range each {
			x := q.Take()
			x.Op, x.Off, x.Len, x.Vec = Write, uint64(i)<<9, 512, []Seg{seg(mem[i<<9:][:512])}
			x.Owner = q
			q.Put(x)
		}
		q.Commit()
	}
	var wg sync.WaitGroup
	for _, q := range queues {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for _, x := range q.wait(t, each) {
				if !x.Status.OK() || x.Owner != q {
					t.Errorf("%v", x.Status)
				}
				q.Free(x)
			}
		}()
	}
	wg.Wait()
	if n, _ := r.Counts(); n.Full == 0 || n.Ended != 3*each || n.Commands != 3*each {
		t.Fatalf("%+v", n)
	}
}

// TestTurns has a queue with a thousand requests and one with a single one, which does not wait for all of those.
func TestTurns(t *testing.T) {
	hold := atomic.Bool{}
	hold.Store(true)
	r := newRig(t, nvmetest.Config{Queues: 1, Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		if qid != 0 && hold.Load() {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}}})
	mem := r.guests.Memory(1 << 20)
	greedy, modest := r.queue(t, Attach{Slice: all}), r.queue(t, Attach{Slice: all})
	greedy.AddMemory(mem)
	r.mem.Settle(patience)
	greedy.Begin()
	for range 1000 {
		x := greedy.Take()
		x.Op, x.Len, x.Vec = Write, 512, []Seg{seg(mem[:512])}
		greedy.Put(x)
	}
	greedy.Commit()
	x := modest.put1(Request{Op: Write, Len: 512, Vec: []Seg{seg(mem[:512])}})
	hold.Store(false)
	r.model.Release()
	modest.wait(t, 1)
	if !x.Status.OK() {
		t.Fatal(x.Status)
	}
	p := greedy.pair
	p.mu.Lock()
	issued := greedy.counts.Commands + modest.counts.Commands
	p.mu.Unlock()
	greedy.wait(t, 1000)
	if issued == 1001 {
		t.Log("the device was faster than this test")
	}
}

// TestQueuesFindPairs says which pair a queue gets.
func TestQueuesFindPairs(t *testing.T) {
	r := newRig(t, nvmetest.Config{Queues: 4, Vectors: 8})
	a, b, c, d := r.queue(t, Attach{Slice: all, Owner: "a"}), r.queue(t, Attach{Slice: all, Owner: "b"}), r.queue(t, Attach{Slice: all, Owner: "a"}), r.queue(t, Attach{Slice: all})
	if a.pair == b.pair || a.pair != c.pair || d.pair == a.pair || d.pair == b.pair {
		t.Fatal("a worker has one pair, and its own while there are any")
	}
	if _, err := r.Reserve(2); err == nil {
		t.Fatal("more is reserved than is free")
	}
	pool, err := r.Reserve(1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reserve(1); err == nil {
		t.Fatal("nothing is left for others")
	} else {
		t.Log(err)
	}
	e, f := r.queue(t, Attach{Slice: all, Owner: "a", Pool: pool}), r.queue(t, Attach{Slice: all, Owner: "e"})
	if e.pair == a.pair || f.pair == e.pair {
		t.Fatal("a reserved pair is for those it is reserved for")
	}
	if f.home || !c.home || !a.home {
		t.Fatal("whoever shares a pair with another worker is not its home")
	}
	r.queue(t, Attach{Slice: all, Polled: true, Pool: pool}) // polling needs nothing
	if _, used := r.Counts(); used != 4 {
		t.Fatalf("%d pairs are used", used)
	}
}

// TestPairsChangeHowTheyAreUsed opens queues that are polled, and then others that sleep.
func TestPairsChangeHowTheyAreUsed(t *testing.T) {
	r := newRig(t, nvmetest.Config{Queues: 1})
	mem := r.guests.Memory(4096)
	for i := range 4 {
		q, err := r.NewQueue(Attach{Slice: all, Polled: i%2 == 0})
		if err != nil {
			t.Fatal(err)
		}
		q.must(t, Request{Op: Read, Len: 4096, Vec: []Seg{seg(mem)}})
		if i%2 == 0 {
			if _, err := r.NewQueue(Attach{Slice: all}); err == nil {
				t.Fatal("nobody would wake this one")
			}
		}
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSleepersOnOnePair has workers that only look when their eventfd says so, each on the same pair, one of which leaves.
func TestSleepersOnOnePair(t *testing.T) {
	r := newRig(t, nvmetest.Config{Queues: 1})
	const workers, rounds = 4, 300
	mem := r.guests.Memory(1 << 20)
	var wg sync.WaitGroup
	var queues []*Queue
	for i := range workers {
		q, err := r.NewQueue(Attach{Slice: all, Owner: i})
		if err != nil {
			t.Fatal(err)
		}
		q.AddMemory(mem)
		queues = append(queues, q)
	}
	r.mem.Settle(patience)
	for i, q := range queues {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := range rounds {
				if i == 0 && n == rounds/2 {
					break // the one that listens to the device
				}
				x := q.put1(Request{Op: Read, Len: 512, Vec: []Seg{seg(mem[i*512:][:512])}})
				for len(q.Reap(1)) == 0 {
					if !readable(q.EventFD()) {
						t.Errorf("worker %d: asleep for ever in round %d", i, n)
						return
					}
				}
				q.Free(x)
			}
			if err := q.Close(); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	n, used := r.Counts()
	if used != 0 {
		t.Fatalf("%d pairs are used", used)
	}
	t.Logf("%+v", n)
}

// readable waits for an eventfd and reads it.
func readable(fd int) bool {
	var buf [8]byte
	for end := time.Now().Add(patience); time.Now().Before(end); {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 100); n > 0 && err != unix.EINTR {
			_, _ = unix.Read(fd, buf[:])
			return true
		}
	}
	return false
}
