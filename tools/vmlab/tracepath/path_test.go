package tracepath

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const diskMiB = 64

// host is a guest that plays the host, with a hostmed in it.
type host struct {
	*vmlab.VM
	specs []string // of the controllers
}

const control = "/tmp/control"

func socket(i int) string { return fmt.Sprintf("/tmp/%d.sock", i) }

// boot starts a machine with three disks and hostmed over them: a slice by the character device, a partition by the block device, the last by VFIO.
func boot(t *testing.T) *host {
	t.Helper()
	lab := vmlab.Open(t)
	var devices []vmlab.Device
	for i := range 3 {
		image := filepath.Join(t.TempDir(), fmt.Sprint(i))
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, diskMiB<<20); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			cmd := lab.Program("usr/sbin/sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--lock=no", image)
			cmd.Stdin = strings.NewReader("label: gpt\nfirst-lba: 2048\nstart=18432, size=65536\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("sfdisk: %v: %s", err, out)
			}
		}
		devices = append(devices, vmlab.QEMUNVMe(image, fmt.Sprintf("path%d", i)))
	}
	h := &host{VM: lab.Boot(t, vmlab.Config{
		MemoryMiB: 1024, VIOMMU: true, Append: "intel_iommu=on iommu=pt", Devices: devices, Programs: []string{"hostmed", "guestdrv", "nvmetrace"},
	})}
	char := strings.Replace(h.Disk(t, 0).Namespace(1), "/dev/nvme", "/dev/ng", 1)
	pci := h.Disk(t, 2).PCI
	h.Run(t, "modprobe -a vfio_iommu_type1 vfio-pci && guestdrv bind "+pci+" --driver vfio-pci")
	h.specs = []string{"nvme:" + char + ",offset=16MiB,size=32MiB", "block:" + h.Disk(t, 1).Namespace(1) + "p1", "vfio:" + pci}
	config := fmt.Sprintf("control = %q\n", control)
	for i, spec := range h.specs {
		config += fmt.Sprintf("[[subsystem]]\n[[subsystem.controller]]\nsocket = %q\n[[subsystem.namespace]]\nspec = %q\n", socket(i), spec)
	}
	if err := h.WriteFile(t.Context(), "/tmp/hostmed.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Run(t, fmt.Sprintf(`setsid hostmed serve --config /tmp/hostmed.toml >/tmp/hostmed.log 2>&1 </dev/null &
until [ -S %s ] && [ -S %s ]; do kill -0 $! || { cat /tmp/hostmed.log >&2; exit 1; }; sleep 0.05; done`, control, socket(len(h.specs)-1)))
	return h
}

// span and group are what nvmetrace path --json prints of a medium.
type span struct {
	Name  string  `json:"name"`
	Mean  float64 `json:"mean_ns"`
	Share float64 `json:"share"`
}

type group struct {
	Name      string  `json:"name"`
	Guest     bool    `json:"guest"`
	Commands  uint64  `json:"commands"`
	Mean      float64 `json:"mean_ns"`
	Spans     []span  `json:"spans"`
	Unmatched uint64  `json:"unmatched"`
}

type result struct {
	Groups []group           `json:"groups"`
	Counts map[string]uint64 `json:"counts"`
	Notes  []string          `json:"notes"`
}

// bench is what guestdrv bench --json prints.
type bench struct {
	Errors  uint64 `json:"errors"`
	Latency struct {
		Mean float64 `json:"mean"`
	} `json:"lat_ns"`
	Ops []struct {
		IOs uint64 `json:"ios"`
	} `json:"ops"`
}

// follow runs nvmetrace path while a load runs, and returns what both print: one object of the load for each of its lines.
func (h *host) follow(t *testing.T, flags, load string) (r result, loads []bench) {
	t.Helper()
	out := h.RunWithin(t, time.Minute, fmt.Sprintf(`nvmetrace path --control %s --json %s >/tmp/path.json 2>/tmp/path.err & path=$!
until grep -q following /tmp/path.err; do kill -0 $path || { cat /tmp/path.err >&2; exit 1; }; sleep 0.05; done
{ %s; } || { kill $path; exit 1; }
kill -INT $path; wait $path || { cat /tmp/path.err >&2; exit 1; }
echo; cat /tmp/path.json`, control, flags, load))
	at := strings.LastIndex(out, "\n{")
	if err := json.Unmarshal([]byte(out[at+1:]), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for d := json.NewDecoder(strings.NewReader(out[:at])); d.More(); {
		var b bench
		if err := d.Decode(&b); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		loads = append(loads, b)
	}
	return r, loads
}

// TestPath follows each command of three guests, on three backends, to the real queue and back: all are matched, and what guestdrv measures is the
// sum of their spans.
func TestPath(t *testing.T) {
	h := boot(t)
	var load, flags []string
	for i := range h.specs {
		file := fmt.Sprintf("/dev/shm/guest%d", i)
		flags = append(flags, "--guest "+file)
		load = append(load, fmt.Sprintf("guestdrv bench vfio-user:%s --json --events %s --rw randrw --bs 4k,64k --qd 4 --jobs 1 --span 16MiB --runtime 1s 2>/dev/null", socket(i), file))
	}
	r, loads := h.follow(t, strings.Join(flags, " "), strings.Join(load, " && "))
	t.Logf("%+v", r.Counts)
	if len(loads) != len(h.specs) || len(r.Groups) != len(h.specs) || len(r.Notes) != 0 {
		t.Fatalf("%d loads, %+v", len(loads), r)
	}
	sum := uint64(0)
	for i, g := range r.Groups {
		b, ios := loads[i], uint64(0)
		for _, o := range b.Ops {
			ios += o.IOs
		}
		sum += ios
		if !strings.HasPrefix(g.Name, h.specs[i]) || !g.Guest || g.Unmatched != 0 || b.Errors != 0 {
			t.Errorf("%s: %+v", h.specs[i], g)
		}
		// Beyond what it counts the load has some under way when its time is over.
		if g.Commands < ios || g.Commands > ios+8 {
			t.Errorf("%s: %d commands, of %d", g.Name, g.Commands, ios)
		}
		total, words := 0.0, ""
		for _, s := range g.Spans {
			total += s.Mean
			words += fmt.Sprintf("  %s %.0f us", s.Name, s.Mean/1e3)
			if seen := s.Name != "real queue" || !strings.HasPrefix(g.Name, "vfio:"); seen != (s.Mean > 0) {
				t.Errorf("%s: %+v", g.Name, s)
			}
		}
		t.Logf("%s: %d commands, %.0f us by guestdrv:%s", g.Name, g.Commands, b.Latency.Mean/1e3, words)
		if off := math.Abs(total-b.Latency.Mean) / b.Latency.Mean; off > 0.05 {
			t.Errorf("%s: the spans are %.0f us in all, and guestdrv has %.0f us", g.Name, total/1e3, b.Latency.Mean/1e3)
		}
	}
	c := r.Counts
	if c["matched"]+c["own"] != c["commands"] || c["unmatched"] != 0 || c["without_guest"] != 0 || c["matched"] < sum || c["real"] == 0 {
		t.Errorf("of %d: %v", sum, c)
	}
	for _, name := range []string{"real_unmatched", "dropped", "suspect", "full", "lost_records", "lost_events", "under_way"} {
		if c[name] != 0 {
			t.Errorf("%s: %d", name, c[name])
		}
	}
	t.Run("strangers", h.strangers)
	h.CheckDmesg(t, "bogus Namespace Identifiers") // QEMU gives none
}

// strangers are guests without records, beside other commands on one of the disks. What is too large for one command of the device's becomes several.
func (h *host) strangers(t *testing.T) {
	r, loads := h.follow(t, "", fmt.Sprintf(`guestdrv bench vfio-user:%s --json --rw randrw --bs 1m --qd 2 --jobs 1 --span 16MiB --runtime 1s 2>/dev/null &&
{ guestdrv bench vfio-user:%s --json --rw randread --bs 4k --qd 4 --jobs 1 --span 16MiB --runtime 1s 2>/dev/null & load=$!
dd if=%s of=/dev/null bs=4k count=500 iflag=direct 2>/dev/null; wait $load; }`, socket(1), socket(0), h.Disk(t, 0).Namespace(1)))
	t.Logf("%+v", r.Counts)
	c := r.Counts
	if len(loads) != 2 || len(r.Groups) != 2 || c["unmatched"] != 0 || c["matched"] == 0 || c["real"] <= c["matched"] || c["real_foreign"] < 500 || c["without_guest"] != c["commands"] {
		t.Fatalf("%+v", r)
	}
	for _, g := range r.Groups {
		if g.Guest || len(g.Spans) != 4 || g.Unmatched != 0 || g.Commands == 0 {
			t.Errorf("%+v", g)
		}
	}
}
