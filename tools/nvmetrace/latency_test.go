package main

import (
	"bytes"
	"encoding/json"
	"image/png"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/charmbracelet/x/ansi"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/latency"
	"pgregory.net/rapid"
)

// minute is what a device does in n seconds: reads, which are slow in the middle third, and writes, as what came in each second.
func minute(n int) (steps []*trace.Snapshot, all *trace.Snapshot) {
	r := rand.New(rand.NewPCG(1, 2))
	c := newCounter()
	for s := range n {
		before := c.snapshot()
		middle := 90 * time.Microsecond
		if s >= n/3 && s < 2*n/3 {
			middle = 2 * time.Millisecond
		}
		at := time.Duration(s) * time.Second
		for _, e := range append(load(r, at, 500, read, middle), load(r, at, 100, write, 25*time.Microsecond)...) {
			c.add(&e)
		}
		steps = append(steps, c.snapshot().Sub(before))
	}
	return steps, c.snapshot()
}

func TestGroups(t *testing.T) {
	_, all := minute(3)
	for by_, want := range map[string][]string{
		"":                         {"all commands 1800"},
		"device":                   {"nvme0 1800"},
		"device,opcode":            {"nvme0 Read 1500", "nvme0 Write 300"},
		"queue,opcode":             {"queue 1 Read 750", "queue 2 Read 750", "queue 1 Write 150", "queue 2 Write 150"},
		"device,opcode,size":       {"nvme0 Read <=4 KiB 1500", "nvme0 Write <=4 KiB 300"},
		"device,queue,opcode,size": {"nvme0 queue 1 Read <=4 KiB 750", "nvme0 queue 2 Read <=4 KiB 750", "nvme0 queue 1 Write <=4 KiB 150", "nvme0 queue 2 Write <=4 KiB 150"},
	} {
		var got []string
		for _, g := range groupsOf(all, makeBy(strings.Split(by_, ","))) {
			got = append(got, strings.Join([]string{g.Name, nonzero(g.lat.Count())}, " "))
			if g.Count != g.lat.Count() || g.P50 > g.P99 || g.P99 > g.Max || g.Bytes != g.Count*4096 {
				t.Errorf("%+v", g)
			}
		}
		for i := range want {
			want[i] = strings.Replace(want[i], "1800", "1,800", 1)
			want[i] = strings.Replace(want[i], "1500", "1,500", 1)
		}
		if !slices.Equal(got, want) {
			t.Errorf("by %s: %q, want %q", by_, got, want)
		}
	}
}

// TestPartsAreBuckets: parts of powers of two are gapless, and each holds what is in it.
func TestPartsAreBuckets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SampledFrom([]int{1, 2, 4, 8, 16}).Draw(t, "parts")
		d := time.Duration(rapid.Int64Range(16, int64(latency.MaxValue)).Draw(t, "d"))
		i := part(d, parts)
		if low, next := partLow(i, parts), partLow(i+1, parts); d < low || d >= next {
			t.Fatalf("%d is in part %d, which is [%d, %d)", d, i, low, next)
		}
	})
}

func TestHistogramBars(t *testing.T) {
	g := &group{Name: "nvme0 Read", Count: 4}
	g.lat.Record(70*time.Microsecond, 3)
	g.lat.Record(200*time.Microsecond, 1)
	const want = "nvme0 Read: 4 commands\n" +
		"   65.5 us - 98.3 us   ######## 3  75.0 %\n" +
		"   98.3 us - 131 us     0  0.0 %\n" +
		"    131 us - 197 us     0  0.0 %\n" +
		"    197 us - 262 us    ### 1  25.0 %\n"
	if got := histogram(g, 8, false); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	// However far apart they are, they fit on a screen.
	g.lat.Record(latency.MaxValue, 1)
	g.lat.Record(20, 1)
	if n := strings.Count(histogram(g, 8, false), "\n"); n > 2*maxBars {
		t.Errorf("%d lines", n)
	}
}

func TestHeatMapInATerminal(t *testing.T) {
	steps, _ := minute(30)
	show := func(colour bool, width int) string {
		var b bytes.Buffer
		h := newHeatPrinter(&b, colour, width)
		for i, s := range steps {
			if err := h.add(time.Duration(i+1)*time.Second, allLatencies(s)); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.add(31*time.Second, new(latency.Histogram)); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	plain := show(false, 80)
	lines := strings.Split(strings.TrimSuffix(plain, "\n"), "\n")
	if len(lines) != 31+2 { // the axis twice
		t.Fatalf("%d lines:\n%s", len(lines), plain)
	}
	for _, l := range lines {
		if len(l) > 80 || strings.Contains(l, "\x1b") {
			t.Errorf("%q", l)
		}
	}
	// The darkest cell moves to the right when it gets slow, and back.
	darkest := func(l string) int { return strings.IndexAny(l, "@#") }
	fast, slow := darkest(lines[2]), darkest(lines[15])
	if fast < 0 || slow < fast+5 || darkest(lines[32-1]) != fast {
		t.Errorf("columns %d, %d:\n%s", fast, slow, plain)
	}
	// It stands under its number: 90 us before the 100 us of the axis, 2 ms after 1 ms.
	if at := strings.Index(lines[0], "|100us"); fast > at || fast < at-3 {
		t.Errorf("column %d, 100us at %d", fast, at)
	}
	if at := strings.Index(lines[0], "|1ms"); slow < at || slow > at+6 {
		t.Errorf("column %d, 1ms at %d", slow, at)
	}
	has(t, lines[1], "1.0 s")
	has(t, lines[len(lines)-1], "31.0 s 0")
	// With colours it has the same cells.
	stripped := ansi.Strip(show(true, 80))
	if a, b := strings.Count(stripped, "\n"), strings.Count(plain, "\n"); a != b {
		t.Errorf("%d lines with colours, %d without", a, b)
	}
	if wide := show(false, 200); len(strings.Split(wide, "\n")[1]) <= len(lines[1]) {
		t.Error("a wider terminal shows no more")
	}
}

func TestShades(t *testing.T) {
	for _, c := range []struct {
		n, of uint64
		want  int
	}{{0, 100, 0}, {100, 100, 8}, {51, 100, 8}, {50, 100, 7}, {25, 100, 6}, {1, 100, 2}, {1, 1e9, 1}} {
		if got := shade(c.n, c.of); got != c.want {
			t.Errorf("%d of %d: %d, want %d", c.n, c.of, got, c.want)
		}
	}
}

func TestPlotIsDrawn(t *testing.T) {
	steps, all := minute(60)
	m := newHeatMap()
	for i, s := range steps {
		m.add(float64(i), float64(i+1), groupsOf(s, by{device: true, opcode: true}))
	}
	var svg, picture bytes.Buffer
	if err := m.draw(&svg, "x.svg", 60); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"nvme0 Read: 30,000 commands (500 per second), p50 ", "nvme0 Write: 6,000 commands", "time in seconds", ">latency<", ">p99<", ">100 us<", ">1 ms<", ">commands<"} {
		if !strings.Contains(svg.String(), s) {
			t.Errorf("the picture does not say %q", s)
		}
	}
	if err := m.draw(&picture, "x.PNG", 60); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&picture)
	if err != nil {
		t.Fatal(err)
	}
	if b := img.Bounds(); b.Dx() < 900 || b.Dy() < 600 {
		t.Errorf("%v", b)
	}
	var total uint64
	for _, g := range groupsOf(all, by{}) {
		total += g.Count
	}
	if n := m.total["nvme0 Read"].Count() + m.total["nvme0 Write"].Count(); n != total {
		t.Errorf("%d commands are drawn, %d there were", n, total)
	}
	if err := newHeatMap().draw(new(bytes.Buffer), "x.svg", 1); err != nil {
		t.Errorf("nothing cannot be drawn: %v", err)
	}
}

// TestPlotIsBounded: however long it is, there are at most maxColumns columns, and all commands are in them.
func TestPlotIsBounded(t *testing.T) {
	m := newHeatMap()
	g := &group{Name: "x"}
	g.lat.Record(time.Millisecond, 1)
	const n = 5*maxColumns + 7
	for i := range n {
		m.add(float64(i), float64(i+1), []*group{g})
		if len(m.columns) > maxColumns {
			t.Fatalf("%d columns", len(m.columns))
		}
	}
	var count uint64
	end := 0.0
	for _, c := range m.columns {
		if c.from != end {
			t.Fatalf("a column begins at %v, the last ended at %v", c.from, end)
		}
		end = c.to
		count += c.lat["x"].Count()
	}
	if count != n || end != n {
		t.Errorf("%d commands until %v s, want %d", count, end, n)
	}
	many := newHeatMap()
	for i := range 20 {
		many.add(0, 1, []*group{{Name: string(rune('a' + i)), lat: g.lat}})
	}
	if p := many.panels(); len(p) != maxPanels {
		t.Errorf("%d panels", len(p))
	}
}

func TestLatencyCommand(t *testing.T) {
	f := newFake()
	f.use(t)
	r := rand.New(rand.NewPCG(1, 2))
	f.add(load(r, 0, 100, read, 100*time.Microsecond)...)
	f.lost.Recursion = 2
	code, stdout, stderr := run(t, "latency", "--duration", "60ms")
	if code != 0 || stderr != "" {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	// What was there before the command is not counted.
	has(t, stdout, "0.1 s", "no command ended", "LOST: 2 programs were not run")
}

// growing is a fake that has had another hundred reads each time that it is asked.
type growing struct {
	*fake
	r *rand.Rand
}

func (g *growing) Snapshot() (*trace.Snapshot, error) {
	g.add(load(g.r, 0, 100, read, 100*time.Microsecond)...)
	return g.fake.Snapshot()
}

func TestLatencyIntervalsAddUp(t *testing.T) {
	f := newFake()
	f.useAs(t, &growing{f, rand.New(rand.NewPCG(1, 2))})
	svg := filepath.Join(t.TempDir(), "x.svg")
	code, stdout, stderr := run(t, "latency", "--duration", "180ms", "--interval", "50ms", "--step", "10ms", "--json", "--plot", svg)
	if code != 0 || stderr != "nvmetrace: drew "+svg+"\n" {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	var sum uint64
	var last latencyJSON
	n := 0
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); n++ {
		last = latencyJSON{}
		if err := d.Decode(&last); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		if !last.Total {
			sum += last.Groups[0].Count
		}
	}
	if !last.Total || n < 2 || last.Groups[0].Name != "nvme0 Read" || last.Groups[0].Count != sum {
		t.Errorf("%d objects, %d commands, and %+v", n, sum, last)
	}
	if b, err := os.ReadFile(svg); err != nil || !strings.Contains(string(b), "nvme0 Read") {
		t.Errorf("%v: %d bytes", err, len(b))
	}
}
