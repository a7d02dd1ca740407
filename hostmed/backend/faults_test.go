package backend

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestParseFaults(t *testing.T) {
	for in, want := range map[string]Spec{
		"fault:drop,over=mem:size=1MiB":                                       {Kind: KindMem, Size: 1 << 20, LBA: 512, Faults: "drop"},
		"fault:drop@read@rate=1/1000,delay=3s@flush,seed=7,over=null:size=1M": {Kind: KindNull, Size: 1 << 20, LBA: 512, Faults: "drop@read@rate=1/1000,delay=3s@flush,seed=7"},
		"fault:status=write-fault+dnr@lba=0-0x7f@after=3@first=2,over=file:a,,b,size=1M,lba=4096": {
			Kind: KindFile, Path: "a,b", LBA: 4096, Size: 1 << 20, Faults: "status=write-fault+dnr@lba=0-0x7f@after=3@first=2",
		},
		"fault:reorder=4@opcode=0x19@first=9,over=mem:size=1MiB": {Kind: KindMem, Size: 1 << 20, LBA: 512, Faults: "reorder=4@opcode=0x19@first=9"},
		"fault:hold,torn,over=file:a,,b,size=1M,readonly":        {Kind: KindFile, Path: "a,b", LBA: 512, Size: 1 << 20, ReadOnly: true, Faults: "hold,torn"},
	} {
		got, err := ParseSpec(in)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
		if again, err := ParseSpec(got.String()); err != nil || again != got {
			t.Errorf("%q printed as %q parses as %+v, %v", in, got, again, err)
		}
	}
}

func TestParseFaultsSaysWhatIsWrong(t *testing.T) {
	const over = ",over=mem:size=1MiB"
	for in, want := range map[string][]string{
		"fault:":                                      {"over=SPEC"},
		"fault:drop":                                  {"over=SPEC", "fault:drop@read"},
		"fault:over=mem:size=1M":                      {"no rule"},
		"fault:" + over:                               {"nothing that can happen"},
		"fault:seed=1" + over:                         {"no rule"},
		"fault:seed=x" + over:                         {"no seed"},
		"fault:explode" + over:                        {`"explode"`, "drop, hold or torn"},
		"fault:drop=1" + over:                         {"nothing that can happen"},
		"fault:status" + over:                         {"nothing that can happen"},
		"fault:status=success" + over:                 {"no status of an error"},
		"fault:status=bad-luck" + over:                {"bad-luck", "status=2/80"},
		"fault:status=9/99" + over:                    {"no status"},
		"fault:delay=5" + over:                        {"no time", "50ms"},
		"fault:delay=-5s" + over:                      {"no time"},
		"fault:reorder" + over:                        {"nothing that can happen", "reorder=N"},
		"fault:reorder=1" + over:                      {"from 2 to 1024"},
		"fault:reorder=1025" + over:                   {"from 2 to 1024"},
		"fault:drop@opcode" + over:                    {"no condition", "@opcode=N"},
		"fault:drop@opcode=256" + over:                {"@opcode=0x05"},
		"fault:drop@opcode=1@opcode=2" + over:         {"one opcode"},
		"fault:torn@read" + over:                      {"only writes"},
		"fault:drop@sometimes" + over:                 {"no condition", "@first=N"},
		"fault:drop@read@write" + over:                {"one operation", "two rules"},
		"fault:drop@first=1@first=2" + over:           {"one first"},
		"fault:drop@first=0" + over:                   {"@first=3"},
		"fault:drop@after" + over:                     {"no condition"},
		"fault:drop@after=x" + over:                   {"@after=1000"},
		"fault:drop@rate=2/1" + over:                  {"@rate=1/1000"},
		"fault:drop@rate=1" + over:                    {"@rate=1/1000"},
		"fault:drop@lba=9-3" + over:                   {"@lba=0-2047"},
		"fault:drop,over=fault:drop,over=mem:size=1M": {"no other fault"},
		"fault:drop,over=file:a,over=b":               {`"over=b" is no option of file`},
		"fault:drop,over=ram:size=1M":                 {"over=", "it must begin with"},
		"fault:drop,over=mem:size=0":                  {"size=0 is nothing"},
	} {
		_, err := ParseSpec(in)
		if err == nil {
			t.Errorf("%q was taken", in)
			continue
		}
		oneLine(t, err, append(want, "namespace")...)
	}
}

// faultyOver opens rules over 1 MiB of memory.
func faultyOver(t *testing.T, rules string) (Backend, *faultQueue) {
	t.Helper()
	b := opened(t)(Open("fault:" + rules + ",over=mem:size=1MiB"))
	return b, newQueue(t, b).(*faultQueue)
}

func TestFaultsAreNotSeenWhereNoneIsMet(t *testing.T) {
	b, q := faultyOver(t, "drop@lba=2047")
	plain := opened(t)(Open("mem:size=1MiB"))
	got, want := b.Info(), plain.Info()
	if got.Name != "fault:drop@lba=2047,over=mem:size=1MiB" {
		t.Errorf("name %q", got.Name)
	}
	got.Name, got.NGUID, got.UUID = want.Name, want.NGUID, want.UUID
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	mem, back := pattern(guestMemory(t, 64<<10), 1), guestMemory(t, 64<<10)
	mustRun(t, q, write(4096, mem), &Request{Op: OpFlush})
	mustRun(t, q, read(4096, back))
	expect(t, back, mem, "through no fault")
	if yes, run, err := b.(Mapper).Allocated(4096, 64<<10); !yes || run != 64<<10 || err != nil {
		t.Errorf("allocated %v, %d, %v", yes, run, err)
	}
	if Plain(b).Info().Name != "mem:size=1MiB" || Plain(plain) != plain {
		t.Error("Plain is not")
	}
	if err := b.(Alterable).Format(4096); err != nil || b.Info().LBAShift != 12 {
		t.Errorf("format: %v, %+v", err, b.Info())
	}
}

func TestFaultStatus(t *testing.T) {
	_, q := faultyOver(t, "status=2/81@read@lba=8-15,status=write-fault+dnr@write@after=1@first=2")
	mem := guestMemory(t, 8192)
	for i, want := range []nvme.Status{0, nvme.StatusWriteFault.WithDNR(), nvme.StatusWriteFault.WithDNR(), 0} {
		r := write(0, pattern(mem[:512], uint64(i)))
		if run(t, q, r); r.Status != want {
			t.Errorf("write %d: %v", i, r.Status)
		}
		if i == 2 { // what failed was not done
			back := guestMemory(t, 512)
			mustRun(t, q, read(0, back))
			expect(t, back, pattern(make([]byte, 512), 0), "after a write that failed")
		}
	}
	for off, want := range map[uint64]nvme.Status{0: 0, 7 * 512: nvme.StatusUnrecoveredRead, 15 * 512: nvme.StatusUnrecoveredRead, 16 * 512: 0} {
		r := read(off, mem[:1024])
		if run(t, q, r); r.Status != want {
			t.Errorf("read at block %d: %v", off/512, r.Status)
		}
	}
}

// TestFaultRate wants the same chances from the same seed, others from another, and about as many as were asked for.
func TestFaultRate(t *testing.T) {
	hits := func(rules string) string {
		_, q := faultyOver(t, rules)
		var b strings.Builder
		for range 2000 {
			r := &Request{Op: OpFlush}
			run(t, q, r)
			fmt.Fprint(&b, r.Status.SC())
		}
		return b.String()
	}
	one := hits("status=0/6@rate=1/10")
	if n := strings.Count(one, "6"); n < 120 || n > 290 {
		t.Errorf("%d of 2000 at a rate of 1/10", n)
	}
	if again := hits("status=0/6@rate=1/10"); again != one {
		t.Error("the same seed, and other faults")
	}
	if other := hits("status=0/6@rate=1/10,seed=1"); other == one {
		t.Error("another seed, and the same faults")
	}
}

func TestFaultDelay(t *testing.T) {
	const by = 30 * time.Millisecond
	for _, medium := range []string{"mem:size=1MiB", "file:" + diskDir(t) + "/disk,size=1MiB"} {
		b := opened(t)(Open("fault:delay=" + by.String() + "@write,over=" + medium))
		q := newQueue(t, b)
		mem, back := pattern(guestMemory(t, 4096), 3), guestMemory(t, 4096)
		late, done := write(0, mem), make([]*Request, 4)
		begin := time.Now()
		if n := q.Submit([]*Request{late}, done); n != 0 || q.Inflight() != 1 {
			t.Fatalf("%s: %d at once, %d in flight", medium, n, q.Inflight())
		}
		run := 0
		for run == 0 { // asleep, as a worker is
			p := []unix.PollFd{{Fd: int32(q.EventFD()), Events: unix.POLLIN}}
			if n, err := unix.Poll(p, 5000); err != nil && err != unix.EINTR || n == 0 {
				t.Fatalf("%s: the eventfd says nothing: %v", medium, err)
			}
			var eight [8]byte
			unix.Read(q.EventFD(), eight[:])
			run = q.Reap(done)
		}
		if spent := time.Since(begin); run != 1 || done[0] != late || !late.Status.OK() || spent < by || q.Inflight() != 0 {
			t.Errorf("%s: %d after %v, %v", medium, run, spent, late.Status)
		}
		mustRun(t, q, read(0, back))
		expect(t, back, mem, "written late")
	}
}

// What is stuck is done late, and nothing ends it sooner.
func TestFaultStuck(t *testing.T) {
	for _, medium := range []string{"mem:size=1MiB", "file:" + diskDir(t) + "/disk,size=1MiB"} {
		b := opened(t)(Open("fault:stuck=50ms@read@first=1,over=" + medium))
		q := newQueue(t, b)
		mem, back := pattern(guestMemory(t, 4096), 3), guestMemory(t, 4096)
		stuck, done := read(0, back), make([]*Request, 4)
		if n := q.Submit([]*Request{stuck}, done); n != 0 || q.Inflight() != 1 {
			t.Fatalf("%s: %d at once, %d in flight", medium, n, q.Inflight())
		}
		for _, aborted := range []bool{true, false} {
			if n := q.(Keeper).GiveUp(aborted, func(*Request) bool { return true }); n != 0 {
				t.Errorf("%s: %d given up", medium, n)
			}
		}
		if n := q.Submit([]*Request{write(0, mem)}, done); n == 0 {
			sleepFor(t, q)
		}
		if late := sleepFor(t, q); len(late) != 1 || late[0] != stuck || !stuck.Status.OK() || q.Inflight() != 0 {
			t.Errorf("%s: %v, %d in flight", medium, stuck.Status, q.Inflight())
		}
		expect(t, back, mem, "read late")
	}
}

func TestFaultDropAndHold(t *testing.T) {
	_, q := faultyOver(t, "drop@write,hold@flush,delay=1h@read")
	mem := pattern(guestMemory(t, 4096), 4)
	reqs := []*Request{write(0, mem), {Op: OpFlush, Owner: 7}, read(0, guestMemory(t, 4096)), {Op: OpDiscard, Len: 512}}
	done := make([]*Request, 8)
	if n := q.Submit(reqs, done); n != 1 || done[0] != reqs[3] || q.Inflight() != 3 || q.Reap(done) != 0 {
		t.Fatalf("%d done, %d in flight", n, q.Inflight())
	}
	all := func(*Request) bool { return true }
	if n := q.GiveUp(true, func(r *Request) bool { return r.Op == OpWrite }); n != 0 {
		t.Errorf("%d aborted of what was dropped", n)
	}
	if n := q.GiveUp(true, all); n != 1 || q.Reap(done) != 1 || done[0] != reqs[1] || done[0].Status != nvme.StatusAbortRequested || done[0].Owner != 7 {
		t.Errorf("%d aborted, %v", n, done[0].Status)
	}
	if n := q.GiveUp(false, func(r *Request) bool { return r.Op == OpRead }); n != 1 || q.Reap(done) != 1 || done[0] != reqs[2] || done[0].Status != nvme.StatusAbortSQDeleted {
		t.Errorf("%d given up, %v", n, done[0].Status)
	}
	if n := q.GiveUp(false, all); n != 1 || q.Reap(done) != 1 || done[0] != reqs[0] || done[0].Status != nvme.StatusAbortSQDeleted {
		t.Errorf("%d given up, %v", n, done[0].Status)
	}
	if q.Inflight() != 0 {
		t.Errorf("%d in flight", q.Inflight())
	}
	back := guestMemory(t, 4096)
	mustRun(t, q.Queue, read(0, back))
	expect(t, back, make([]byte, 4096), "what was dropped")
	q.Submit([]*Request{write(0, mem)}, done) // and is left for Close
}

func TestFaultTorn(t *testing.T) {
	for _, pieces := range [][]int{{8192}, {512, 512, 1024, 6144}, {4096, 4096}, {6144, 2048}} {
		_, q := faultyOver(t, "torn@first=1")
		mem := pattern(guestMemory(t, 8192), 5)
		var from [][]byte
		for rest := mem; len(pieces) > 0; pieces = pieces[1:] {
			from = append(from, rest[:pieces[0]])
			rest = rest[pieces[0]:]
		}
		r := write(0, from...)
		run(t, q, r)
		if r.Status != nvme.StatusWriteFault || r.Len != 8192 || len(r.Vec) != len(from) || r.Vec[len(from)-1].Len != uint64(len(from[len(from)-1])) {
			t.Errorf("%v, %d bytes in %d pieces", r.Status, r.Len, len(r.Vec))
		}
		back := guestMemory(t, 8192)
		mustRun(t, q, read(0, back))
		if !bytes.Equal(back[:4096], mem[:4096]) || !bytes.Equal(back[4096:], make([]byte, 4096)) {
			t.Error("not the first half, or more than that")
		}
		mustRun(t, q, r)
		mustRun(t, q, read(0, back))
		expect(t, back, mem, "written once more")
	}
}
