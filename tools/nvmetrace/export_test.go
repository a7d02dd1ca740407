package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/shared/latency"
)

// everything is a sampler with something of each family.
func everything(t *testing.T) *collector {
	f := newFake()
	f.c = newCounter()
	s, e := command(1, 1, read, 8, 8, 0, time.Millisecond)
	f.add(s, e)
	s, e = command(1, 2, 0x99, 8, 8, 0, time.Millisecond) // no name
	f.add(s, e)
	s, e = command(1, 2, 0x98, 8, 8, 0, time.Millisecond)
	f.add(s, e)
	q := f.c.queues[[2]uint16{0, 1}]
	q.Publishes, q.Interrupts = 1, 1 // with --driver
	lat := new(latency.Histogram)
	lat.Record(time.Millisecond, 3)
	f.block = []trace.BlockCell{{Disk: "vda", Op: 'R', Count: 3, Bytes: 12288, InDevice: lat, Queued: new(latency.Histogram)}}
	f.kvm = []trace.ExitCell{{PID: 77, Exits: 10, MMIO: 2, FastMMIO: 3}, {PID: 78, Exits: 10}}
	c := fakeControl(t, func() *inspect.Snapshot {
		q := inspect.Queue{QID: 1, CQID: 1, State: "polling", Commands: 100, Kicks: 7, CQKicks: 2}
		other := q // of the same CQ
		other.QID, other.Kicks = 2, 1
		return &inspect.Snapshot{Version: inspect.Version, Controllers: []inspect.Controller{{Socket: "/run/a", Queues: []inspect.Queue{q, other}}}}
	})
	return &collector{ctx: t.Context(), sampler: &sampler{src: f, control: c}, filter: &filterFlags{}, vm: 77}
}

func gather(t *testing.T, c *collector) map[string]int {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	if problems, err := testutil.GatherAndLint(r); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	found, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]int{}
	for _, f := range found {
		names[f.GetName()] = len(f.GetMetric())
	}
	return names
}

// TestEveryFamilyIsExported: what --help lists is there.
func TestEveryFamilyIsExported(t *testing.T) {
	names := gather(t, everything(t))
	for _, f := range families {
		if names[f.name] == 0 {
			t.Errorf("%s is not exported", f.name)
		}
		if !strings.Contains(exportHelp(), f.name) {
			t.Errorf("%s is not in --help", f.name)
		}
	}
	if len(names) != len(families) {
		t.Errorf("%d families are exported, %d are known", len(names), len(families))
	}
}

func TestMetricValues(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(everything(t))
	const want = `
# HELP nvmetrace_commands_total Commands that ended.
# TYPE nvmetrace_commands_total counter
nvmetrace_commands_total{device="nvme0",opcode="other",queue="1"} 2
nvmetrace_commands_total{device="nvme0",opcode="read",queue="1"} 1
# HELP nvmetrace_hostmed_doorbells_total Doorbell messages: MMIO writes of the guest. bell is sq or cq, and queue the number of that.
# TYPE nvmetrace_hostmed_doorbells_total counter
nvmetrace_hostmed_doorbells_total{bell="cq",controller="/run/a",queue="1"} 2
nvmetrace_hostmed_doorbells_total{bell="sq",controller="/run/a",queue="1"} 7
nvmetrace_hostmed_doorbells_total{bell="sq",controller="/run/a",queue="2"} 1
# HELP nvmetrace_vm_exits_total Exits of the virtual machine (--vm): all, mmio, and ioeventfd, MMIO that KVM signals itself.
# TYPE nvmetrace_vm_exits_total counter
nvmetrace_vm_exits_total{kind="all",pid="77"} 10
nvmetrace_vm_exits_total{kind="ioeventfd",pid="77"} 3
nvmetrace_vm_exits_total{kind="mmio",pid="77"} 2
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want), "nvmetrace_commands_total", "nvmetrace_hostmed_doorbells_total", "nvmetrace_vm_exits_total"); err != nil {
		t.Error(err)
	}
}

// TestLabelsAreBounded: whatever opcodes there are, the label has no more values than the specification has names, and one.
func TestLabelsAreBounded(t *testing.T) {
	for name, labels := range map[string][256]string{"I/O": ioLabels, "admin": adminLabels} {
		all := slices.Clone(labels[:])
		slices.Sort(all)
		if n := len(slices.Compact(all)); n < 10 || n > 40 {
			t.Errorf("%d %s labels", n, name)
		}
	}
	if opcodeLabel(0, 0x02) != "get-log-page" || opcodeLabel(3, 0x02) != "read" || opcodeLabel(3, 0xEE) != "other" {
		t.Errorf("%q, %q, %q", opcodeLabel(0, 0x02), opcodeLabel(3, 0x02), opcodeLabel(3, 0xEE))
	}
}

// TestDashboardUsesWhatIsExported: each metric of the dashboard is exported, and each that is exported is in it.
func TestDashboardUsesWhatIsExported(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "nvmetrace-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	byName, used := map[string]*metric{}, map[string]bool{}
	for _, f := range families {
		byName[f.name] = f
	}
	metrics, labels := regexp.MustCompile(`nvmetrace_[a-z_]+`), regexp.MustCompile(`(\w+)(?:!=|=~|=)"`)
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			for _, name := range metrics.FindAllString(target.Expr, -1) {
				f := byName[name]
				for _, suffix := range []string{"_bucket", "_sum", "_count"} {
					if h := byName[strings.TrimSuffix(name, suffix)]; f == nil && h != nil && h.kind == histogramKind {
						f = h
					}
				}
				if f == nil {
					t.Errorf("%s: %s is not exported", p.Title, name)
					continue
				}
				used[f.name] = true
				for _, l := range labels.FindAllStringSubmatch(target.Expr, -1) {
					if !slices.Contains(f.labels, l[1]) {
						t.Errorf("%s: %s has no label %s", p.Title, name, l[1])
					}
				}
			}
			if strings.Count(target.Expr, "(") != strings.Count(target.Expr, ")") || strings.Count(target.Expr, "{") != strings.Count(target.Expr, "}") {
				t.Errorf("%s: %s", p.Title, target.Expr)
			}
		}
	}
	for _, f := range families {
		if !used[f.name] {
			t.Errorf("the dashboard has no %s", f.name)
		}
	}
}

// TestMediatorMayGoAway: without hostmed the kernel's metrics are still there.
func TestMediatorMayGoAway(t *testing.T) {
	c := everything(t)
	c.sampler.control = &control{attach.New(filepath.Join(t.TempDir(), "gone"))}
	names := gather(t, c)
	if names["nvmetrace_commands_total"] != 2 || names["nvmetrace_hostmed_up"] != 1 || names["nvmetrace_hostmed_commands_total"] != 0 {
		t.Errorf("%v", names)
	}
}

// TestExportServes: the program answers, on the loopback, until it is told to end.
func TestExportServes(t *testing.T) {
	f := newFake()
	f.use(t)
	s, e := command(1, 1, read, 8, 8, 0, time.Millisecond)
	f.add(s, e)
	ctx, cancel := context.WithCancel(t.Context())
	out, read := files(t)
	ended := make(chan error, 1)
	go func() { ended <- (&exportCmd{Listen: "127.0.0.1:0"}).Run(ctx, out) }()
	address := regexp.MustCompile(`http://\S+/metrics`)
	url := ""
	for deadline := time.Now().Add(time.Minute); url == ""; time.Sleep(time.Millisecond) {
		_, stderr := read()
		url = address.FindString(stderr)
		if time.Now().After(deadline) {
			t.Fatalf("it does not listen: %s", stderr)
		}
	}
	if !strings.HasPrefix(url, "http://127.0.0.1:") {
		t.Errorf("it listens on %s", url)
	}
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !strings.Contains(string(body), fmt.Sprintf("nvmetrace_bytes_total{device=%q,opcode=%q,queue=%q} 4096", "nvme0", "read", "1")) {
		t.Errorf("%v\n%s", err, body)
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if !f.closed {
		t.Error("the tracer is still open")
	}
}
