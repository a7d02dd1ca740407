package backends

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// openBare boots a host without an IOMMU, for this test alone.
func openBare(t *testing.T) *host {
	t.Helper()
	dir, err := os.MkdirTemp(tmpfs(), "bare-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{dir: dir}
	h.VM = vmlab.Open(t).Boot(t, vmlab.Config{
		MemoryMiB: 1024, Ports: 1, Programs: []string{"hostmed", "guestdrv", guestProgram}, Args: []string{"-D", filepath.Join(dir, traceFile)},
	})
	h.tellIfFailed(t)
	return h
}

// busMaster waits until the function has the right to reach memory, or has it no longer.
func (d *disk) busMaster(t *testing.T, on bool) {
	t.Helper()
	want := map[bool]int{true: 4}[on]
	d.h.until(t, fmt.Sprintf("bus mastering is not %v", on), fmt.Sprintf("[ $(( $(od -An -tu1 -j4 -N1 /sys/bus/pci/devices/%s/config) & 4 )) = %d ]", d.PCI, want))
}

// TestWithoutIOMMU: a device on a machine without an IOMMU is hostmed's only if the operator insists. Then two guests have it, its DMA targets are their own pages, and when hostmed is
// killed under load the device is stopped before anybody else has that memory, and the next hostmed has it at once.
func TestWithoutIOMMU(t *testing.T) {
	h := openBare(t)
	d := h.disk(t, diskConfig{sizeMiB: 192})
	fill(t, d)
	refused := func(flag string, says ...string) {
		t.Helper()
		r := h.Try(t, fmt.Sprintf("hostmed serve %s --socket /tmp/no.sock --namespace vfio:%s", flag, d.PCI))
		for _, s := range says {
			if r.Exit != 2 || !strings.Contains(r.Stderr, s) {
				t.Errorf("%s: exit %d, %s; want %q", flag, r.Exit, r.Stderr, s)
			}
		}
	}
	const flag = "--unsafe-no-iommu"
	refused("", "no IOMMU", "intel_iommu=on", flag)
	refused(flag, "driver nvme has it", "guestdrv bind "+d.PCI)
	h.Run(t, "guestdrv bind "+d.PCI)
	t.Cleanup(func() {
		if !h.Ended() {
			d.kernel(t)
		}
	})
	refused("", "no IOMMU", "intel_iommu=on", flag)
	refused(flag, "huge pages", "nr_hugepages")
	d.busMaster(t, false)
	h.Run(t, "echo 24 > /proc/sys/vm/nr_hugepages")

	slice := func(at int) string { return fmt.Sprintf("vfio:%s,offset=%dMiB,size=32MiB", d.PCI, at) }
	others := func() string {
		return digest(d.read(t, 0, 32<<20)) + digest(d.read(t, 64<<20, 32<<20)) + digest(d.read(t, 128<<20, 64<<20))
	}
	before := others()
	m := h.mediate(t, "unsafe_no_iommu = true\n"+subsystems(slice(32), slice(96)))
	m.says(t, "UNSAFE: no IOMMU keeps "+d.PCI)
	refused(flag, "another process has it")
	const guard = "ps | grep '[s]hadowbell-dma-guard'"
	h.Run(t, guard)

	users := []*job{h.startVerify(t, m.device(0), sharingLoad), h.startVerify(t, m.device(1), sharingLoad)}
	for _, j := range users {
		f := j.verified()
		t.Logf("%s: %.0f IOPS", j.command, f.IOPS)
	}
	own := digest(d.read(t, 32<<20, 32<<20))
	h.outside(t, m.device(0))
	if digest(d.read(t, 32<<20, 32<<20)) != own {
		t.Error("the bytes of a guest have changed without its doing")
	}
	pages, last, _ := h.dma(t, m.device(1))
	if want := append(slices.Clone(pages), pages...); !slices.Equal(last, want) {
		t.Errorf("the device's DMA targets are %#x, and the guest's pages %#x", last, pages)
	}

	const piece = 1 << 20
	file, sum := h.random(t, piece)
	h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", m.device(0), file, 31<<20))
	s := &subject{h: h, d: d, m: m}
	for range 2 {
		load := h.start(t, "guestdrv bench "+m.device(1)+" --json --rw randrw --span 16MiB --bs 4k,64k --qd 32 --jobs 2 --runtime 100s")
		s.busy(t, load)
		m.kill(t)
		d.busMaster(t, false)
		if r := load.result(); r.Exit == 0 {
			t.Errorf("the load goes on without hostmed: %s", r.Stdout)
		}
		m.says(t, d.PCI+": whoever drove it is gone, and it reaches no memory any more")
		m.start(t)
		h.Run(t, fmt.Sprintf("guestdrv read %s --offset %d --length %d | cmp - %s", m.device(0), 31<<20, piece, file))
		h.verify(t, m.device(1), "--span 4MiB --bs 512,64k --qd 16 --jobs 2 --runtime 1s")
	}
	m.stop(t)
	d.busMaster(t, false)
	h.Run(t, "! "+guard)
	d.kernel(t)
	if h.sum(t, d.block(), 63<<20, piece) != sum {
		t.Error("the host does not read what a guest wrote")
	}
	if others() != before {
		t.Error("bytes of nobody's have changed")
	}
	h.CheckDmesg(t, "Ignoring bogus Namespace Identifiers")
}
