package backends

import (
	"fmt"
	"testing"
)

// TestFileOnDisk: a disk's file system has the file of a guest in it, which is what others do who have no partition for each guest. What a
// guest writes the host reads in the file, and the other way round.
func TestFileOnDisk(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{16, 128}})
	image := h.mount(t, d.part(2)) + "/guest.img"
	neighbour := d.sumPart(t, 1)
	m := h.serve(t, "file:"+image+",size=64MiB")
	h.verify(t, m.device(0), "--span 4MiB --bs 4k,64k --qd 16 --jobs 2 --runtime 1s")

	file, sum := h.random(t, 1<<20)
	h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", m.device(0), file, 3<<20))
	if got := h.sum(t, image, 3<<20, 1<<20); got != sum {
		t.Error("the host does not read what the guest wrote")
	}
	file, _ = h.random(t, 1<<20)
	h.Run(t, fmt.Sprintf("dd if=%s of=%s bs=64k seek=%d conv=notrunc oflag=direct && guestdrv read %s --offset %d --length %d | cmp - %s", file, image, 5<<20>>16, m.device(0), 5<<20, 1<<20, file))
	if d.sumPart(t, 1) != neighbour {
		t.Error("the partition beside it has changed")
	}
}
