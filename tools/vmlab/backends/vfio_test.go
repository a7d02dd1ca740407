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
		loads = append(loads, h.startVerify(t, m.device(i), "--span 8MiB --qd 16 --jobs 2 --runtime 2s --bs "+sizes))
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
	// Until their memory is pinned, guests' data is copied; TestNoCopy has what comes after.
	if line := m.says(t, "namespace closed.*commands="); strings.Contains(line, " mapped=0 ") {
		t.Errorf("all data was copied: %s", line)
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

// TestVFIORemoved: a device of hostmed's goes under load: unplugged as an operator does it, or pulled out of a slot that tells the kernel. Commands fail, the
// namespace goes, the guest is told, and hostmed and another one go on with what else they have.
func TestVFIORemoved(t *testing.T) {
	h := open(t)
	for name, removed := range map[string]func(*disk, *testing.T){"unplugged": (*disk).unplug, "pulled out": (*disk).pullOut} {
		t.Run(name, func(t *testing.T) {
			s := h.removal(t)
			removed(s.d, t)
			s.survived(t)
		})
	}
}

// removal is a device of hostmed's that is to go, with its guest, and another device, of another hostmed, that is to go on.
type removal struct {
	*subject
	guest   *spectator
	another *mediator
	load    *job // on that
}

func (h *host) removal(t *testing.T) *removal {
	t.Helper()
	r := &removal{subject: h.subject(t, "vfio")}
	r.m.stop(t)
	other := h.disk(t, diskConfig{sizeMiB: 64})
	h.vfio(t, other)
	r.m = h.serve(t, r.spec("")+"\nmem:size=1MiB")
	r.another = h.serve(t, "vfio:"+other.PCI)
	r.guest = h.spectate(t, r.m.device(0), 2)
	r.load = h.startVerify(t, r.another.device(0), "--span 4MiB --bs 4k,64k --qd 4 --runtime 4s")
	r.another.says(t, "client connected")
	return r
}

// survived looks at what has become of all after the device went.
func (r *removal) survived(t *testing.T) {
	t.Helper()
	r.m.says(t, "namespace removed: its medium is gone.*"+r.d.PCI)
	r.guest.lost(t, 1)
	r.load.verified()
	if !r.m.running(t) || !r.another.running(t) {
		t.Fatal("hostmed is gone")
	}
}

// TestVFIODetached: another controller of the device's subsystem takes a namespace away from hostmed's, and gives it back. The guest is told, and the device's
// other namespace goes on; SIGHUP brings the one back that has come back.
func TestVFIODetached(t *testing.T) {
	h := open(t)
	d, other := h.twins(t)
	cntlid := strings.TrimSpace(h.Run(t, "cat /sys/class/nvme/"+d.Name+"/cntlid"))
	h.vfio(t, d)
	m := h.serve(t, "vfio:"+d.PCI+",nsid=1\nvfio:"+d.PCI+",nsid=2")
	file, sum := h.random(t, 1<<20)
	write := fmt.Sprintf("guestdrv write %s --nsid 1 --file %s --offset %d", m.device(0), file, 8<<20)
	h.Run(t, write)
	s := h.spectate(t, m.device(0), 2)
	h.Run(t, fmt.Sprintf("nvme detach-ns /dev/%s --namespace-id=1 --controllers=%s", other.Name, cntlid))
	m.says(t, "namespace removed: its medium is gone.*"+d.PCI)
	s.lost(t, 1)

	s = h.spectate(t, m.device(0), 1)
	h.Run(t, fmt.Sprintf("nvme attach-ns /dev/%s --namespace-id=1 --controllers=%s", other.Name, cntlid))
	h.until(t, "the namespace does not come back", fmt.Sprintf(`{ kill -HUP $(cat %s); sleep 0.5; grep '"using"' %s | grep -q '"nsid":1[,}]'; }`, m.pid, s.out))
	told(t, s.end(t), 1, "appeared")
	h.Run(t, fmt.Sprintf("guestdrv read %s --nsid 1 --offset %d --length %d | cmp - %s", m.device(0), 8<<20, 1<<20, file))
	if h.sum(t, other.block(), 8<<20, 1<<20) != sum {
		t.Error("the host does not read by the other controller what the guest wrote")
	}
	m.stop(t)
}

// TestVFIOVanished: a device is pulled out of a slot that does not tell anybody. hostmed finds out, the guest is told, and all else goes on as when the slot tells.
// The kernel does not find out: it resets what is not there for a minute and more once hostmed has let go, so the machine ends here, and the next test has another.
func TestVFIOVanished(t *testing.T) {
	h := open(t)
	r := h.removal(t)
	r.d.vanish(t)
	r.survived(t)
	h.Kill()
}
