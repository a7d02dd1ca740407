package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// guests is two controllers after n seconds: one whose queues are busy and asleep, and one that does not answer.
func guests(n uint64) *inspect.Snapshot {
	return &inspect.Snapshot{Version: inspect.Version, Taken: int64(n+10) * 1e9, Controllers: []inspect.Controller{
		{Socket: "/run/a", Mode: "shadow", Shared: true, Queues: []inspect.Queue{
			{QID: 1, CQID: 1, State: "polling", Commands: 1000 * n, Kicks: 10 * n, CQKicks: 5 * n, KicksAsleep: 8 - n, Armed: 9 * n, ArmLost: n, Spurious: 2 * n, Interrupts: 500 * n},
			{QID: 2, CQID: 2, State: "armed", ArmedAt: 8e9},
		}},
		{Socket: "/run/b", Mode: "trap", Silent: true},
	}}
}

func TestDoorbellsTable(t *testing.T) {
	c := &doorbellsCmd{VM: 7}
	st := step{
		before: sample{at: time.Unix(0, 0), known: guests(1), kernel: &trace.Snapshot{KVM: []trace.ExitCell{{PID: 7, Exits: 100, MMIO: 10}}}},
		now:    sample{at: time.Unix(2, 0), mediator: guests(3), kernel: &trace.Snapshot{KVM: []trace.ExitCell{{PID: 7, Exits: 300, MMIO: 14, FastMMIO: 16}, {PID: 8, Exits: 1}}, Losses: trace.Losses{Map: 1}}},
	}
	s := doorbellsTable(c.figures(st))
	has(t, s, "2.0 s state commands SQ CQ MMIO/IO armed lost spurious IRQ/IO",
		"/run/a shadow 2,000 20 10 0.015 18 2 4 0.50", "queue 1 polling 2,000 20 10 0.015 18 2 4 0.50", "queue 2 asleep 5.00 s 0 0 0 - 0 0 0 -", "/run/b trap",
		"process 7: 200 exits; MMIO: 16 ioeventfd, 4 passed on; for each I/O 0.10 exits, 0.010 MMIO", "LOST", "/run/b did not answer in time")
	hasNot(t, s, "process 8")
	st.now.kernel = &trace.Snapshot{KVM: []trace.ExitCell{{PID: 7, Exits: 100, MMIO: 14}}}
	has(t, doorbellsTable(c.figures(st)), "process 7: 0 exits; MMIO: 0 ioeventfd, 4 passed on", "this kernel's KVM does not tell of exits")
	st.now.kernel = st.before.kernel
	has(t, doorbellsTable(c.figures(st)), "process 7: 0 exits; MMIO: 0 ioeventfd, 0 passed on")
	c.Socket, c.Queue = []string{"/run/a"}, []uint16{2}
	s = doorbellsTable(c.figures(st))
	hasNot(t, s, "  /run/b", "queue 1")
	has(t, s, "/run/a shadow 0 0 0 -", "queue 2")
}

// TestQueuesOfABusyWorker: one that could not be asked before is not taken for new when it can.
func TestQueuesOfABusyWorker(t *testing.T) {
	before, now := guests(1), guests(3)
	before.Controllers[0].Queues, before.Controllers[0].Busy = nil, []int{0}
	for _, x := range between(before, &now.Controllers[0]) {
		if x.bells != (bells{}) {
			t.Errorf("queue %d: %+v", x.queue.QID, x.bells)
		}
	}
	if notes := missing(before); len(notes) != 2 || !strings.Contains(notes[0], "workers [0] did not answer") {
		t.Errorf("%q", notes)
	}
	// A queue that was not there is new, and all of it.
	before.Controllers[0].Busy = nil
	if x := between(before, &now.Controllers[0]); x[0].Commands != 3000 {
		t.Errorf("%+v", x[0])
	}
}

// TestSharedCQCountsOnce: two SQs that feed one CQ show its doorbells and interrupts once, whichever of them was there before.
func TestSharedCQCountsOnce(t *testing.T) {
	at := func(n uint64, qids ...uint16) *inspect.Snapshot {
		c := inspect.Controller{Socket: "/run/a"}
		for _, qid := range qids {
			c.Queues = append(c.Queues, inspect.Queue{QID: qid, CQID: 5, Commands: 100 * n, Kicks: 3 * n, CQKicks: 10 * n, Completions: 200 * n, Interrupts: 50 * n})
		}
		return &inspect.Snapshot{Controllers: []inspect.Controller{c}}
	}
	for name, before := range map[string]*inspect.Snapshot{"both": at(1, 1, 2), "the other way round": at(1, 2, 1)} {
		var sum bells
		for _, x := range between(before, &at(3, 1, 2).Controllers[0]) {
			sum.add(x.bells)
		}
		if want := (bells{Commands: 400, Kicks: 12, CQKicks: 20, Completions: 400, Interrupts: 100}); sum != want {
			t.Errorf("%s: %+v, want %+v", name, sum, want)
		}
	}
	if n := mediatorNodes(at(1, 1, 2), at(3, 1, 2), 1)[0]; *n.MMIO != 32.0/400 {
		t.Errorf("MMIO per I/O is %v", *n.MMIO)
	}
	// The one that had the CQ's counts is deleted: what it counted before does not come again.
	x := between(at(1, 1, 2), &at(3, 2).Controllers[0])
	if len(x) != 1 || x[0].CQKicks != 20 {
		t.Errorf("%+v", x)
	}
}

func TestDoorbellsCommand(t *testing.T) {
	n := uint64(0)
	path := serveControl(t, func() *inspect.Snapshot { n++; return guests(n) })
	code, stdout, stderr := run(t, "doorbells", "--control", path, "--interval", "20ms", "--duration", "70ms", "--json")
	if code != 0 || stderr != "" {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	var sum uint64
	var last doorbellsJSON
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); {
		last = doorbellsJSON{}
		if err := d.Decode(&last); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		if !last.Total {
			sum += last.Controllers[0].Commands
		}
	}
	if a := last.Controllers[0]; !last.Total || sum == 0 || a.Commands != sum || a.Queues[1].State != "armed" || a.Queues[1].AsleepNS == 0 {
		t.Errorf("%d commands: %+v", sum, last)
	}
}

// TestHostmedMayComeBack: while it does not answer that is said, and what it has counted meanwhile comes when it does.
func TestHostmedMayComeBack(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := uint64(0)
	path := serveControl(t, func() *inspect.Snapshot {
		if n++; n == 8 {
			cancel()
		}
		if n == 4 || n == 5 {
			return &inspect.Snapshot{Version: 99}
		}
		return guests(n)
	})
	out, read := files(t)
	if err := (&doorbellsCmd{controlFlags: controlFlags{path}, runFlags: runFlags{Interval: leastInterval, JSON: true}}).Run(ctx, out); err != nil {
		t.Fatal(err)
	}
	stdout, _ := read()
	var all []doorbellsJSON
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); {
		var j doorbellsJSON
		if err := d.Decode(&j); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		all = append(all, j)
	}
	if len(all) < 5 || len(all[1].Controllers) != 0 || len(all[1].Notes) != 1 || !strings.Contains(all[1].Notes[0], "version 99") {
		t.Fatalf("%s", stdout)
	}
	// Answers 4 and 5 are missing: the next one has what came since the third.
	if all[0].Controllers[0].Commands != 1000 || all[3].Controllers[0].Commands != 3000 {
		t.Errorf("%s", stdout)
	}
}

// TestTotalsHaveWhoHasGone: a guest that is not there at the end has its part in the totals.
func TestTotalsHaveWhoHasGone(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := uint64(0)
	path := serveControl(t, func() *inspect.Snapshot {
		if n++; n == 6 {
			cancel()
		}
		if n > 4 {
			return &inspect.Snapshot{Version: inspect.Version}
		}
		return guests(n)
	})
	out, read := files(t)
	if err := (&doorbellsCmd{controlFlags: controlFlags{path}, runFlags: runFlags{Interval: leastInterval, JSON: true}}).Run(ctx, out); err != nil {
		t.Fatal(err)
	}
	stdout, _ := read()
	var last doorbellsJSON
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); {
		last = doorbellsJSON{}
		if err := d.Decode(&last); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
	}
	// The first answer is openControl's, the second the beginning.
	if len(last.Controllers) != 2 || last.Controllers[0].Commands != 2000 || last.Controllers[0].Queues[0].Commands != 2000 || *last.Controllers[0].MMIOPerIO != 0.015 {
		t.Errorf("%+v", last)
	}
}

// TestAnotherServer: one that is no control socket of hostmed's is told from one that refuses.
func TestAnotherServer(t *testing.T) {
	for answer, says := range map[string]string{
		"hello": "hostmed answers 403 Forbidden", `{"error":{"code":"forbidden","message":"user 7 may not"}}`: "user 7 may not",
	} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, answer)
		})}
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(l) }()
		code, _, stderr := run(t, "doorbells", "--control", path)
		server.Close()
		<-done
		if code != 2 || !strings.Contains(stderr, says) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("exit %d: %s", code, stderr)
		}
	}
}

// TestOtherVersionsOfTheSocket: what answers otherwise is named.
func TestOtherVersionsOfTheSocket(t *testing.T) {
	path := serveControl(t, func() *inspect.Snapshot { return &inspect.Snapshot{Version: 99} })
	code, _, stderr := run(t, "doorbells", "--control", path)
	if code != 2 || !strings.Contains(stderr, "version 99") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("exit %d: %s", code, stderr)
	}
}
