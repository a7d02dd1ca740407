package backends

import (
	"fmt"
	"strings"
	"testing"
)

// TestVFIOSlices has three guests on one device that hostmed drives, two by interrupts and one that polls, while the range of the fourth stays as it is. Afterwards the host's
// kernel reads what they wrote.
func TestVFIOSlices(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{sizeMiB: 160})
	fill(t, d)
	before := digest(d.read(t, 96<<20, 32<<20))
	h.vfio(t, d)
	slice := func(mib int, options string) string {
		return fmt.Sprintf("vfio:%s,offset=%dMiB,size=32MiB%s", d.PCI, mib, options)
	}
	m := h.serve(t, slice(0, ""), slice(32, ",queues=1"), slice(64, ",poll"), slice(96, ",readonly"))
	var loads []*job
	for i, sizes := range []string{"4k,64k", "512,4k,1m", "4k,32k"} {
		loads = append(loads, h.startVerify(t, m.device(i), "--span 24MiB --qd 16 --jobs 2 --runtime 3s --bs "+sizes))
	}
	for _, l := range loads {
		f := l.verified()
		t.Logf("%.0f IOPS", f.IOPS)
	}
	var sums []string
	for i := range loads {
		file, sum := h.random(t, 1<<20)
		h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", m.device(i), file, 31<<20))
		sums = append(sums, sum)
	}
	if r := h.Try(t, fmt.Sprintf("hostmed serve --socket /tmp/no.sock --namespace vfio:%s", d.PCI)); r.Exit == 0 {
		t.Error("two processes have the device")
	}
	m.stop(t)
	if line := m.says(t, "namespace closed.*commands="); !strings.Contains(line, " copied=0 ") {
		t.Errorf("data was copied: %s", line)
	}
	d.kernel(t)
	for i, sum := range sums {
		if h.sum(t, d.block(), (32*i+31)<<20, 1<<20) != sum {
			t.Errorf("the host does not read what guest %d wrote", i)
		}
	}
	if digest(d.read(t, 96<<20, 32<<20)) != before {
		t.Error("a neighbour's bytes have changed")
	}
}
