package backends

import (
	"fmt"
	"testing"
)

const (
	sharingLoad = "--bs 512,4k,64k --qd 16 --jobs 2 --runtime 2s --span 8MiB"
	hostLoad    = "fio --name=host --directory=%s --size=8M --rw=randwrite --bs=4k --ioengine=io_uring --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --output-format=terse --terse-version=5"
)

// TestSideBySide: one disk has three users at once: a guest by block: on partition 1, the host with a file system on partition 2, and a guest by
// nvme: on a slice. Each checks what it reads. Then each guest names blocks outside of its range while the others go on: their bytes
// stay what they were.
func TestSideBySide(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{sizeMiB: 192, partitions: []int{32, 64, 32, 32}})
	fill(t, d)
	slice := func(part int) string { return fmt.Sprintf("nvme:%s,offset=%d,size=32MiB", d.char(), d.partAt(t, part)) }
	m := h.serve(t, "block:"+d.part(1), slice(3))
	dir := h.mount(t, d.part(2))
	nobodys := d.sumPart(t, 4)
	users := []*job{h.startVerify(t, m.device(0), sharingLoad), h.startVerify(t, m.device(1), sharingLoad), h.start(t, fmt.Sprintf(hostLoad, dir))}
	for _, j := range users[:2] {
		f := j.verified()
		t.Logf("%s: %.0f IOPS", j.command, f.IOPS)
	}
	users[2].wait()
	for i := range 2 {
		other := 1 - i
		before := d.sumPart(t, 1+2*i)
		users := []*job{h.startVerify(t, m.device(other), sharingLoad), h.start(t, fmt.Sprintf(hostLoad, dir))}
		h.outside(t, m.device(i))
		users[0].verified()
		users[1].wait()
		if d.sumPart(t, 1+2*i) != before {
			t.Errorf("the bytes of guest %d have changed without its doing", i)
		}
	}
	if d.sumPart(t, 4) != nobodys {
		t.Error("the bytes of a partition that nobody has have changed")
	}
	h.CheckDmesg(t, "Ignoring bogus Namespace Identifiers")
}

// TestSlicesOfOneDevice: two guests share a device of hostmed's, a slice each, and a third slice is nobody's.
func TestSlicesOfOneDevice(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{sizeMiB: 192})
	fill(t, d)
	h.vfio(t, d)
	slice := func(at int) string { return fmt.Sprintf("vfio:%s,offset=%dMiB,size=32MiB", d.PCI, at) }
	m := h.serve(t, slice(32), slice(96))
	others := func() string {
		return digest(d.read(t, 0, 32<<20)) + digest(d.read(t, 64<<20, 32<<20)) + digest(d.read(t, 128<<20, 64<<20))
	}
	before := others()
	users := []*job{h.startVerify(t, m.device(0), sharingLoad), h.startVerify(t, m.device(1), sharingLoad)}
	for _, j := range users {
		f := j.verified()
		t.Logf("%s: %.0f IOPS", j.command, f.IOPS)
	}
	for i, at := range []int{32, 96} {
		own := digest(d.read(t, at<<20, 32<<20))
		j := h.startVerify(t, m.device(1-i), sharingLoad)
		h.outside(t, m.device(i))
		j.verified()
		if digest(d.read(t, at<<20, 32<<20)) != own {
			t.Errorf("the bytes of guest %d have changed without its doing", i)
		}
	}
	if others() != before {
		t.Error("bytes of nobody's have changed")
	}
}
