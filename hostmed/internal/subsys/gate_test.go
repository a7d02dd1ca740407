package subsys

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	holder   = Host{ID: [16]byte{1}}
	another  = Host{ID: [16]byte{2}}
	stranger = Host{ID: [16]byte{3}}
)

// TestReservedAccess is the figure of command behaviour in the presence of a reservation, NVMe Base 2.0c 8.19.
func TestReservedAccess(t *testing.T) {
	const (
		r  = "read"
		rw = "read and write"
		no = "neither"
	)
	for _, c := range []struct {
		typ                          nvme.ReservationType
		holder, registrant, stranger string
	}{
		{nvme.WriteExclusive, rw, r, r},
		{nvme.ExclusiveAccess, rw, no, no},
		{nvme.WriteExclusiveRegistrants, rw, rw, r},
		{nvme.ExclusiveAccessRegistrants, rw, rw, no},
		{nvme.WriteExclusiveAllRegistrants, rw, rw, r},
		{nvme.ExclusiveAccessAllRegistrants, rw, rw, no},
	} {
		g := &Gate{Reserved: &Reservation{Type: c.typ, Holder: holder, Registrants: []Host{another, holder}}}
		for _, h := range []struct {
			name string
			host Host
			may  string
		}{{"holder", holder, c.holder}, {"registrant", another, c.registrant}, {"stranger", stranger, c.stranger}} {
			for class, ok := range map[Class]bool{Neutral: true, Reads: h.may != no, Writes: h.may == rw} {
				v, st := g.Check(class, h.host)
				if ok && (v != Pass || st != 0) || !ok && (v != Refuse || st.Code() != nvme.StatusReservationConflict) {
					t.Errorf("%v, %s, class %d: verdict %d, %v; it may %s", c.typ, h.name, class, v, st, h.may)
				}
			}
		}
	}
}

func TestGate(t *testing.T) {
	for _, c := range []struct {
		name  string
		g     Gate
		class Class
		want  Verdict
		st    nvme.Status
	}{
		{"held", Gate{Hold: true}, Writes, Wait, 0},
		{"held, read", Gate{Hold: true}, Reads, Wait, 0},
		{"held, report", Gate{Hold: true}, Neutral, Pass, 0},
		{"held and protected", Gate{Hold: true, Protected: true}, Writes, Wait, 0},
		{"failing", Gate{Fail: nvme.StatusFormatInProgress}, Reads, Refuse, nvme.StatusFormatInProgress},
		{"failing, report", Gate{Fail: nvme.StatusFormatInProgress}, Neutral, Refuse, nvme.StatusFormatInProgress},
		{"protected, read", Gate{Protected: true}, Reads, Pass, 0},
		{"protected, flush", Gate{Protected: true}, Flushes, Pass, 0},
		{"held, flush", Gate{Hold: true}, Flushes, Wait, 0},
		{"protected, write", Gate{Protected: true}, Writes, Refuse, nvme.StatusNamespaceWriteProtected},
	} {
		if v, st := c.g.Check(c.class, holder); v != c.want || st.Code() != c.st {
			t.Errorf("%s: verdict %d, %v", c.name, v, st)
		}
	}
}

func TestClasses(t *testing.T) {
	for op, want := range map[uint8]Class{
		nvme.IORead: Reads, nvme.IOCompare: Reads, nvme.IOVerify: Reads, nvme.IOWrite: Writes, nvme.IOFlush: Flushes, nvme.IODSM: Writes,
		nvme.IOWriteZeroes: Writes, nvme.IOWriteUncorrectable: Writes, nvme.IOCopy: Writes, nvme.IOReservationRegister: Neutral,
		nvme.IOReservationReport: Neutral, nvme.IOReservationAcquire: Neutral, nvme.IOReservationRelease: Neutral, 0xff: Neutral,
	} {
		if got := ClassOf(op); got != want {
			t.Errorf("%s: class %d, want %d", nvme.IOOpcodeName(op), got, want)
		}
	}
}

func TestMarkedBlocks(t *testing.T) {
	g := &Gate{Bad: []Range{{10, 10}, {20, 29}, {^uint64(0), ^uint64(0)}}}
	for _, c := range []struct {
		first, n uint64
		want     bool
	}{
		{0, 10, false}, {0, 11, true}, {10, 1, true}, {11, 9, false}, {11, 10, true}, {25, 1, true}, {29, 1, true}, {30, 100, false},
		{0, 0, false}, {^uint64(0), 1, true}, {^uint64(0) - 1, 1, false}, {^uint64(0) - 1, 2, true},
	} {
		if got := g.Marked(c.first, c.n); got != c.want {
			t.Errorf("%d blocks from %d: %v", c.n, c.first, got)
		}
	}
}

// The data path must find nothing while nothing is special.
func TestOpenGateIsNil(t *testing.T) {
	n := Alone(1, nil, testInfo)
	if n.Gate() != nil {
		t.Fatal("a new namespace has a gate")
	}
	n.protect(Protected)
	n.SetBad(func([]Range) []Range { return []Range{{1, 2}} })
	if g := n.Gate(); g == nil || !g.Protected || len(g.Bad) != 1 || g.Hold {
		t.Errorf("gate %+v", g)
	}
	n.protect(Unprotected)
	n.Exclusive(func() {
		if g := n.Gate(); g == nil || !g.Hold || len(g.Bad) != 1 {
			t.Errorf("alone: gate %+v", g)
		}
		n.SetBad(func(old []Range) []Range { return nil })
	})
	if g := n.Gate(); g != nil {
		t.Errorf("gate %+v when all is over", g)
	}
}
