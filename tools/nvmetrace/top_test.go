package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// twoDevices is a second of reads and writes on two queues of nvme0, an error and a timeout among them, and of one flush on nvme1.
func twoDevices() *trace.Snapshot {
	c := newCounter()
	add := func(dev, qid uint16, op uint8, n int, blocks uint32, took time.Duration) {
		for i := range n {
			s, e := command(qid, uint16(i), op, uint64(i), blocks, time.Duration(i), took)
			s.Device, e.Device = dev, dev
			c.add(&s)
			c.add(&e)
		}
	}
	add(0, 1, read, 1000, 8, 100*time.Microsecond)
	add(0, 2, write, 50, 256, time.Millisecond)
	add(1, 1, 0, 1, 0, 3*time.Millisecond)
	s, e := command(2, 7, write, 0, 8, 0, time.Second)
	e.Status = 0x2002 &^ 0x2000
	c.add(&s)
	c.add(&e)
	c.add(&trace.Event{Kind: trace.Timeout, QID: 2, CID: 9})
	under, _ := command(1, 99, read, 0, 8, 0, 0)
	c.add(&under)
	c.add(&trace.Event{Kind: trace.Reset, Device: 1})
	idle, done := command(5, 1, read, 0, 8, 0, 1)
	_, _ = idle, done
	c.queue(&trace.Event{QID: 5})
	return c.snapshot()
}

func twoFrames() frame {
	s := twoDevices()
	return frame{seconds: 2, elapsed: 2, nodes: kernelNodes(s, 2)}
}

// screen is what the model shows, without styles.
func screen(m tea.Model) string { return ansi.Strip(m.View().Content) }

// press plays keys.
func press(t *testing.T, m tea.Model, keys ...string) tea.Model {
	t.Helper()
	named := map[string]rune{"up": tea.KeyUp, "down": tea.KeyDown, "enter": tea.KeyEnter, "esc": tea.KeyEscape, "space": tea.KeySpace, "end": tea.KeyEnd, "home": tea.KeyHome}
	for _, k := range keys {
		msg := tea.KeyPressMsg{Text: k, Code: []rune(k)[0]}
		if code, ok := named[k]; ok {
			msg = tea.KeyPressMsg{Code: code}
		}
		if msg.String() != k {
			t.Fatalf("key %q is %q", k, msg.String())
		}
		m, _ = m.Update(msg)
	}
	return m
}

// has fails the test unless each of lines is in one line of s, in this order. Runs of spaces count as one.
func has(t *testing.T, s string, lines ...string) {
	t.Helper()
	rest := strings.Split(s, "\n")
	for i, l := range rest {
		rest[i] = strings.Join(strings.Fields(l), " ")
	}
	for _, want := range lines {
		i := slices.IndexFunc(rest, func(l string) bool { return strings.Contains(l, want) })
		if i < 0 {
			t.Fatalf("%q is missing, or not in its place, in\n%s", want, s)
		}
		rest = rest[i+1:]
	}
}

func hasNot(t *testing.T, s string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if strings.Contains(s, p) {
			t.Errorf("%q should not be in\n%s", p, s)
		}
	}
}

func TestTopShowsDevicesAndQueues(t *testing.T) {
	var m tea.Model = newTopModel("all devices")
	has(t, screen(m), "the first interval is not over")
	m, _ = m.Update(tea.WindowSizeMsg{Width: 130, Height: 30})
	m, _ = m.Update(twoFrames())
	s := screen(m)
	has(t, s, "nvmetrace top all devices 2 s", "name v IOPS MiB/s depth max p50 p99 errors t.outs resets MMIO/IO",
		"nvme0 526 5.1 1 1 ", "queue 1 500 2.0 1 1 ", "queue 2 26 3.1 0 1 1.02 ms 1.00 s 1 1 - -", "nvme1 1 0 0 1 3.00 ms 3.00 ms - - 1 -", "queue 1 1 0 0 1 3.00 ms 3.00 ms", "q quit")
	hasNot(t, s, "queue 5", "LOST")
	if n := strings.Count(s, "\n") + 1; n != 30 {
		t.Errorf("%d lines on a terminal of 30", n)
	}
	has(t, screen(press(t, m, "i")), "queue 5 0 0 0 0 - - - - - -")
}

func TestTopDrillsDownAndBack(t *testing.T) {
	var m tea.Model = newTopModel("")
	m, _ = m.Update(tea.WindowSizeMsg{Width: 130, Height: 30})
	m, _ = m.Update(twoFrames())
	m = press(t, m, "enter") // nvme0
	s := screen(m)
	has(t, s, "> nvme0", "queue 1 500", "queue 2 26")
	hasNot(t, s, "nvme1")
	m = press(t, m, "down", "enter") // its queue 2
	s = screen(m)
	has(t, s, "> nvme0 > queue 2", "Write ", "Write ")
	hasNot(t, s, "Read")
	m = press(t, m, "enter") // nothing below
	has(t, screen(m), "> nvme0 > queue 2")
	m = press(t, m, "esc")
	if got := m.(topModel).selected; got != "queue 2" {
		t.Errorf("%q is selected after going back", got)
	}
	m = press(t, m, "esc", "esc")
	has(t, screen(m), "nvme0", "nvme1")
	// From the top a queue opens at once.
	m = press(t, m, "home", "down", "enter")
	has(t, screen(m), "> nvme0 > queue 1", "Read ")
	// What was opened has gone.
	m, _ = m.Update(frame{elapsed: 3})
	has(t, screen(m), "nothing happens here")
}

func TestTopSorts(t *testing.T) {
	var m tea.Model = newTopModel("")
	m, _ = m.Update(tea.WindowSizeMsg{Width: 130, Height: 30})
	m, _ = m.Update(twoFrames())
	m = press(t, m, "s") // IOPS
	has(t, screen(m), "IOPSv", "nvme0", "queue 1", "queue 2", "nvme1")
	m = press(t, m, "s") // MiB/s
	has(t, screen(m), "MiB/sv", "nvme0", "queue 2", "queue 1", "nvme1")
	m = press(t, m, "r")
	has(t, screen(m), "MiB/s^", "nvme1", "nvme0", "queue 1", "queue 2")
	m = press(t, m, "S", "S", "r")
	has(t, screen(m), "name v")
	m = press(t, m, "S")
	has(t, screen(m), "MMIO/IOv")
	m = press(t, m, "s")
	has(t, screen(m), "name v")
}

func TestTopPausesAndQuits(t *testing.T) {
	var m tea.Model = newTopModel("")
	m, _ = m.Update(tea.WindowSizeMsg{Width: 130, Height: 30})
	m, _ = m.Update(twoFrames())
	m = press(t, m, "space")
	m, _ = m.Update(frame{elapsed: 77})
	has(t, screen(m), "2 s PAUSED", "nvme0")
	m = press(t, m, "p")
	has(t, screen(m), "77 s")
	hasNot(t, screen(m), "PAUSED", "nvme0")
	has(t, screen(press(t, m, "?")), "select a line", "end, and print the totals")
	for _, msg := range []tea.Msg{tea.KeyPressMsg{Text: "q", Code: 'q'}, tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}, endMsg{}} {
		_, cmd := m.Update(msg)
		if cmd == nil || cmd() != (tea.QuitMsg{}) {
			t.Errorf("%v does not end it", msg)
		}
	}
}

// TestTopSaysWhatIsLost: at any size, losses are on the screen, and no line is longer than it.
func TestTopSaysWhatIsLost(t *testing.T) {
	f := twoFrames()
	f.lost = trace.Losses{Map: 12345, Recursion: 1}
	f.notes = []string{"a note"}
	for _, size := range []tea.WindowSizeMsg{{Width: 130, Height: 30}, {Width: 80, Height: 24}, {Width: 40, Height: 8}, {Width: 10, Height: 1}} {
		var m tea.Model = newTopModel("all devices")
		m, _ = m.Update(size)
		m, _ = m.Update(f)
		m = press(t, m, "end")
		s := screen(m)
		if !strings.Contains(s, "LOST: 12,345"[:min(12, size.Width)]) {
			t.Errorf("%v: losses are not shown:\n%s", size, s)
		}
		for l := range strings.SplitSeq(s, "\n") {
			if len([]rune(l)) > size.Width {
				t.Errorf("%v: %q is too long", size, l)
			}
		}
		if n := strings.Count(s, "\n") + 1; size.Height >= 8 && n != size.Height {
			t.Errorf("%v: %d lines:\n%s", size, n, s)
		}
	}
}

// TestNarrowTerminals: what says nothing makes room for what does.
func TestNarrowTerminals(t *testing.T) {
	mmio := 0.5
	f := frame{elapsed: 1, nodes: []*node{{Source: "hostmed", Name: "/run/a", Commands: 7, IOPS: 7, MMIO: &mmio}}}
	var m tea.Model = newTopModel("all devices")
	m, _ = m.Update(tea.WindowSizeMsg{Width: 60, Height: 24})
	m, _ = m.Update(f)
	has(t, screen(m), "MMIO/IO", "0.50")
	f = twoFrames()
	m, _ = m.Update(tea.WindowSizeMsg{Width: 80, Height: 24})
	m, _ = m.Update(f)
	has(t, screen(m), "IOPS MiB/s depth max p50 p99 errors t.outs")
	hasNot(t, screen(m), "MMIO/IO")
}

func TestMediatorNodes(t *testing.T) {
	queue := func(qid uint16, commands, kicks, cqKicks uint64) inspect.Queue {
		return inspect.Queue{QID: qid, State: "polling", Commands: commands, Kicks: kicks, CQKicks: cqKicks, Inflight: 3}
	}
	before := &inspect.Snapshot{Controllers: []inspect.Controller{{Socket: "/run/a", Queues: []inspect.Queue{queue(1, 1000, 100, 0), queue(2, 900, 0, 0)}}}}
	now := &inspect.Snapshot{Taken: 10e9, Controllers: []inspect.Controller{{Socket: "/run/a", Queues: []inspect.Queue{queue(1, 3000, 110, 10), queue(2, 100, 50, 0)}}}}
	now.Controllers[0].Queues[1].State, now.Controllers[0].Queues[1].ArmedAt = "armed", 5.8e9
	nodes := mediatorNodes(before, now, 2)
	if len(nodes) != 1 || len(nodes[0].Parts) != 2 {
		t.Fatalf("%+v", nodes)
	}
	q1, q2 := nodes[0].Parts[0], nodes[0].Parts[1]
	if q1.Commands != 2000 || q1.IOPS != 1000 || *q1.MMIO != 0.01 || *q1.Depth != 3 || q1.State != "polling" {
		t.Errorf("queue 1: %+v", q1)
	}
	// Its counters are smaller than before: the queue was created anew.
	if q2.Commands != 100 || *q2.MMIO != 0.5 || q2.State != "asleep" {
		t.Errorf("queue 2: %+v", q2)
	}
	if q1.MiB != nil {
		t.Errorf("nobody knows the bytes: %v", *q1.MiB)
	}
	if n := nodes[0]; n.Commands != 2100 || *n.Depth != 6 || *n.MMIO != 70.0/2100 {
		t.Errorf("all: %+v", n)
	}
	if again := mediatorNodes(now, now, 2); again[0].MMIO != nil {
		t.Errorf("MMIO per I/O of no I/O: %v", *again[0].MMIO)
	}
}

// files are an Output that is no terminal.
func files(t *testing.T) (out *cli.Output, read func() (stdout, stderr string)) {
	t.Helper()
	dir := t.TempDir()
	create := func(name string) *os.File {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	out = &cli.Output{Stdout: create("out"), Stderr: create("err")}
	return out, func() (string, string) {
		o, err := os.ReadFile(out.Stdout.Name())
		e, err2 := os.ReadFile(out.Stderr.Name())
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		return string(o), string(e)
	}
}

// run is the program with these arguments, on a fake tracer.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	out, read := files(t)
	code = program().Run(args, out)
	stdout, stderr = read()
	return code, stdout, stderr
}

func TestTopWithoutATerminal(t *testing.T) {
	f := newFake()
	f.use(t)
	f.lost.Map = 3
	started := make(chan struct{})
	go func() {
		<-started
		s, e := command(1, 1, read, 8, 8, 0, time.Millisecond)
		f.add(s, e)
	}()
	close(started)
	code, stdout, stderr := run(t, "top", "--interval", "50ms", "--duration", "150ms")
	if code != 0 || stderr != "" {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	has(t, stdout, "IOPS MiB/s depth max", "LOST: 3 commands found no room in a map", "totals", "LOST")
	if !f.closed {
		t.Error("the tracer is still open")
	}
}

func TestTopJSON(t *testing.T) {
	f := newFake()
	f.use(t)
	s, e := command(1, 1, read, 8, 8, 0, time.Millisecond)
	f.add(s, e)
	code, stdout, stderr := run(t, "top", "--interval", "20ms", "--duration", "100ms", "--json", "--opcode", "read", "--device", "nvme0")
	if code != 0 || stderr != "" {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	if !slices.Equal(f.opened.Devices, []uint16{0}) || !slices.Equal(f.opened.Opcodes, []uint8{2}) {
		t.Errorf("opened with %+v", f.opened)
	}
	var last topJSON
	n := 0
	for d := json.NewDecoder(bytes.NewReader([]byte(stdout))); d.More(); n++ {
		last = topJSON{}
		if err := d.Decode(&last); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
	}
	if n < 2 || !last.Total || last.Seconds < 0.1 || len(last.Devices) != 1 || last.Devices[0].Name != "nvme0" || last.Devices[0].Parts[0].Name != "queue 1" {
		t.Errorf("%d objects, the last is %+v", n, last)
	}
}
