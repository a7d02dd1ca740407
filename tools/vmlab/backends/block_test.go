package backends

import (
	"fmt"
	"strings"
	"testing"
)

// TestBlockPartitions has two guests on partitions, one by the poll queues, while the host has a file system on another one mounted. Bytes are the same from both
// sides, what the guest discards is gone from the medium, and the neighbours' bytes never change.
func TestBlockPartitions(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{64, 48, 64, 16}})
	dir := h.mount(t, d.part(2))
	h.Run(t, fmt.Sprintf("head -c 3000000 /dev/urandom > %s/data && sync", dir))
	file := strings.Fields(h.Run(t, "sha256sum "+dir+"/data"))[0]
	neighbour := d.sumPart(t, 4)
	m := h.serve(t, "block:"+d.part(1), "block:"+d.part(3)+",poll")
	first := h.startVerify(t, m.device(0), "--span 8MiB --bs 4k,64k,1m --qd 16 --jobs 2 --runtime 2s")
	second := h.startVerify(t, m.device(1), "--span 8MiB --bs 512,4k,32k --qd 16 --jobs 2 --runtime 2s")
	h.Run(t, fmt.Sprintf("for i in 1 2 3 4; do cp %[1]s/data %[1]s/copy$i && sync; done; sha256sum %[1]s/copy* | grep -vc %[2]s | grep -q '^0$'", dir, file))
	first.verified()
	second.verified()

	for i, part := range []int{1, 3} {
		for _, at := range []int{0, 63 << 20} {
			name, sum := h.random(t, 1<<20)
			h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", m.device(i), name, at))
			if h.sum(t, d.part(part), at, 1<<20) != sum {
				t.Errorf("partition %d: the host does not read at %#x what the guest wrote", part, at)
			}
			if digest(d.read(t, d.partAt(t, part)+at, 1<<20)) != sum {
				t.Errorf("partition %d: what the guest wrote at %#x is not on the medium", part, at)
			}
		}
	}
	if d.sumPart(t, 4) != neighbour || strings.Fields(h.Run(t, "echo 3 > /proc/sys/vm/drop_caches; sha256sum "+dir+"/data"))[0] != file {
		t.Error("a neighbour's bytes have changed")
	}
}

// TestBlockConformance has every I/O command that the specification demands asked of a partition, by each of the two ways to it, and looks at what is
// beside it. TestNVMeConformance has the rest of the suite, which does not depend on the medium.
func TestBlockConformance(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{32, 32, 32}})
	fill(t, d)
	before := [2]string{d.sumPart(t, 1), d.sumPart(t, 3)}
	for _, options := range []string{"", ",poll,lba=4096"} {
		m := h.serve(t, "block:"+d.part(2)+options)
		if passed := h.conformance(t, m.device(0), "--filter 'io.*'"); passed < 50 {
			t.Errorf("block%s: %d cases passed", options, passed)
		}
		m.stop(t)
	}
	if before != [2]string{d.sumPart(t, 1), d.sumPart(t, 3)} {
		t.Error("bytes outside the partition have changed")
	}
}

// TestBlockClaims: what the host uses is not served, and what is served the host cannot use.
func TestBlockClaims(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{32, 32}})
	refused := func(spec string, says string) {
		t.Helper()
		r := h.Try(t, fmt.Sprintf("timeout 20 hostmed serve --socket /tmp/%s --namespace '%s'", h.name("refused"), spec))
		if r.Exit == 0 || r.Exit == 124 || !strings.Contains(r.Stderr, says) {
			t.Errorf("%s: exit %d, %q; want %q", spec, r.Exit, r.Stderr, says)
		}
	}
	h.Run(t, fmt.Sprintf("mkfs.ext4 -q %[1]s && mkdir -p /mnt/b && mount %[1]s /mnt/b", d.part(2)))
	refused("block:"+d.part(2), "p2 is mounted at /mnt/b")
	refused("block:"+d.block(), "p2 is mounted at /mnt/b")
	refused("block:"+d.char(), "use nvme:")
	refused("block:"+d.part(1)+",lba=256", "lba=256")
	h.Run(t, "umount /mnt/b")
	m := h.serve(t, "block:"+d.part(2))
	refused("block:"+d.part(2), "in use")
	refused("block:"+d.block(), "in use")
	refused(d.slice(t, 2, 1), "in use")
	for _, c := range []string{"mount " + d.part(2) + " /mnt/b", "mkfs.ext4 -q " + d.part(2)} {
		if r := h.Try(t, c); r.Exit == 0 {
			t.Errorf("%s: the host has what is served", c)
		}
	}
	m.kill(t)
	m.start(t)
	h.verify(t, m.device(0), "--span 4MiB --bs 4k,64k --qd 16 --runtime 1s")
	m.stop(t)
	h.Run(t, fmt.Sprintf("mkfs.ext4 -q -F %[1]s && mount %[1]s /mnt/b && umount /mnt/b", d.part(2)))
}

// TestBlockGone: a disk that is pulled out under load takes its namespace along, and nothing else. The guest is told.
func TestBlockGone(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{64}})
	m := h.serve(t, "block:"+d.part(1)+"\nmem:size=1MiB")
	s := h.spectate(t, m.device(0), 2)
	d.unplug(t)
	m.says(t, "namespace removed")
	s.lost(t, 1)
	if !m.running(t) {
		t.Error("hostmed has ended with the disk")
	}
}

// target is an NVMe subsystem of the host's kernel, to which the host is connected by loopback. Its namespace can grow, which that of a QEMU device cannot.
type target struct {
	h          *host
	nqn, image string
	dev        string // the block device
}

// target makes one of 64 MiB, until the end of t.
func (h *host) target(t *testing.T) *target {
	t.Helper()
	name := h.name("target")
	g := &target{h: h, nqn: "nqn.2026-11.test:" + name, image: "/tmp/" + name + ".img"}
	h.Run(t, fmt.Sprintf(`modprobe -a nvmet nvme-loop
[ -d /sys/kernel/config/nvmet ] || mount -t configfs none /sys/kernel/config
cd /sys/kernel/config/nvmet
truncate -s 64M %[2]s
mkdir subsystems/%[1]s && echo 1 > subsystems/%[1]s/attr_allow_any_host && mkdir subsystems/%[1]s/namespaces/1
cd subsystems/%[1]s/namespaces/1 && echo -n %[2]s > device_path && echo 1 > buffered_io && echo 1 > enable && cd ../../../..
mkdir ports/1 && echo loop > ports/1/addr_trtype && ln -s $PWD/subsystems/%[1]s ports/1/subsystems/%[1]s
nvme connect -t loop -n %[1]s -q nqn.2026-11.test:host`, g.nqn, g.image))
	h.atEnd(t, fmt.Sprintf("nvme disconnect -n %[1]s; cd /sys/kernel/config/nvmet; rm ports/1/subsystems/%[1]s; rmdir ports/1; rmdir subsystems/%[1]s/namespaces/1 subsystems/%[1]s; rm %[2]s", g.nqn, g.image))
	find := "for s in /sys/class/nvme-subsystem/*; do grep -qx " + g.nqn + " $s/subsysnqn && ls $s | grep '^nvme[0-9]*n[0-9]*$'; done"
	h.until(t, "the namespace is not there", "[ -b /dev/$("+find+") ]")
	g.dev = "/dev/" + strings.TrimSpace(h.Run(t, find))
	return g
}

// grow makes it 128 MiB large.
func (g *target) grow(t *testing.T) {
	t.Helper()
	g.h.Run(t, fmt.Sprintf("truncate -s 128M %s && echo 1 > /sys/kernel/config/nvmet/subsystems/%s/namespaces/1/revalidate_size", g.image, g.nqn))
}

// TestBlockGrows: a namespace that grows is larger for the guest, under load; the guest is told, and uses the new blocks.
func TestBlockGrows(t *testing.T) {
	h := open(t)
	g := h.target(t)
	m := h.serve(t, "block:"+g.dev+"\nmem:size=1MiB")
	s := h.spectate(t, m.device(0), 2)
	g.grow(t)
	m.says(t, "namespace resized.*to=128MiB")
	s.grown(t, 1, 128<<20)
	file, sum := h.random(t, 1<<20)
	h.Run(t, fmt.Sprintf("guestdrv write %s --nsid 1 --file %s --offset %d", m.device(0), file, 127<<20))
	if h.sum(t, g.dev, 127<<20, 1<<20) != sum {
		t.Error("the host does not read what the guest wrote behind the old end")
	}
	m.stop(t)
}

// TestBlockTrims: what a guest discards is gone from the medium, what it zeroes is zero, and what is beside it stays.
func TestBlockTrims(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{32, 32}})
	fill(t, d)
	at := d.partAt(t, 2)
	before := digest(d.read(t, at, 4<<20)) + digest(d.read(t, at+12<<20+512<<10, 8<<20)) + digest(d.read(t, at-32<<20, 32<<20))
	m := h.serve(t, "block:"+d.part(2))
	h.Run(t, guestCommand+" trim "+m.device(0))
	if d.written(t, at+4<<20, 8<<20+512<<10) {
		t.Error("what was discarded or zeroed is still on the medium")
	}
	if before != digest(d.read(t, at, 4<<20))+digest(d.read(t, at+12<<20+512<<10, 8<<20))+digest(d.read(t, at-32<<20, 32<<20)) {
		t.Error("bytes beside it have changed")
	}
}
