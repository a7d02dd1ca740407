package backends

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// slice is the spec of a partition as a slice of the namespace.
func (d *disk) slice(t *testing.T, part, mib int) string {
	t.Helper()
	return fmt.Sprintf("nvme:%s,offset=%d,size=%dMiB", d.char(), d.partAt(t, part), mib)
}

// TestNVMeSlices has two guests on slices of a namespace while the host has a file system of it mounted.
func TestNVMeSlices(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{64, 48, 64, 16}})
	h.Run(t, fmt.Sprintf("mkfs.ext4 -q %s && mkdir -p /mnt/a && mount %s /mnt/a && head -c 3000000 /dev/urandom > /mnt/a/data && sync", d.part(2), d.part(2)))
	h.atEnd(t, "umount /mnt/a")
	neighbour := d.sumPart(t, 4)
	file := strings.Fields(h.Run(t, "sha256sum /mnt/a/data"))[0]
	m := h.serve(t, d.slice(t, 1, 64), d.slice(t, 3, 64)+",poll")
	// QEMU's device has 323 kelvin; hostmed of its own has 313.
	if out := h.Run(t, guestCommand+" smart "+m.device(0)); !strings.Contains(out, `"temperature":323`) {
		t.Errorf("the device's health: %s", out)
	}
	first := h.startVerify(t, m.device(0), "--span 8MiB --bs 4k,64k,1m --qd 16 --jobs 2 --runtime 2s")
	second := h.startVerify(t, m.device(1), "--span 8MiB --bs 512,4k,32k --qd 16 --jobs 2 --runtime 2s")
	h.Run(t, "for i in 1 2 3 4; do cp /mnt/a/data /mnt/a/copy$i && sync; done; sha256sum /mnt/a/copy* | grep -vc "+file+" | grep -q '^0$'")
	first.verified()
	second.verified()

	// Bytes, both ways, at both ends.
	for i, part := range []int{1, 3} {
		for _, at := range []int{0, 63 << 20} {
			name, sum := h.random(t, 1<<20)
			h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", m.device(i), name, at))
			if h.sum(t, d.part(part), at, 1<<20) != sum {
				t.Errorf("slice %d: the host does not read at %#x what the guest wrote", i, at)
			}
			name, _ = h.random(t, 1<<20)
			h.Run(t, fmt.Sprintf("dd if=%s of=%s bs=1M seek=%d oflag=direct conv=notrunc && guestdrv read %s --offset %d --length %d | cmp - %s", name, d.part(part), at>>20, m.device(i), at, 1<<20, name))
		}
	}
	if d.sumPart(t, 4) != neighbour || strings.Fields(h.Run(t, "echo 3 > /proc/sys/vm/drop_caches; sha256sum /mnt/a/data"))[0] != file {
		t.Error("a neighbour's bytes have changed")
	}
}

// TestNVMeConformance has every command that the specification demands asked of a slice, errors and blocks outside of it among them, and looks
// at what is beside it.
func TestNVMeConformance(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{})
	fill(t, d)
	before := append(d.read(t, 0, 64<<20), d.read(t, 96<<20, 64<<20)...)
	m := h.serve(t, "nvme:"+d.char()+",offset=64MiB,size=32MiB")
	if passed := h.conformance(t, m.device(0), "--destructive"); passed < 200 {
		t.Errorf("%d cases passed", passed)
	}
	if !bytes.Equal(before, append(d.read(t, 0, 64<<20), d.read(t, 96<<20, 64<<20)...)) {
		t.Error("bytes outside the slice have changed")
	}
}

// TestNVMeClaims: what the host uses is not served, what is served the host cannot use, and no range is served twice. A hostmed that was killed
// leaves nothing behind.
func TestNVMeClaims(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{partitions: []int{32, 48, 32}})
	refused := func(spec string, says string) {
		t.Helper()
		r := h.Try(t, fmt.Sprintf("timeout 20 hostmed serve --socket /tmp/%s --namespace '%s'", h.name("refused"), spec))
		if r.Exit == 0 || r.Exit == 124 || !strings.Contains(r.Stderr, says) {
			t.Errorf("%s: exit %d, %q; want %q", spec, r.Exit, r.Stderr, says)
		}
	}
	h.Run(t, fmt.Sprintf("mkfs.ext4 -q %s && mkdir -p /mnt/a && mount %s /mnt/a", d.part(2), d.part(2)))
	refused("nvme:"+d.char(), "p2 is mounted at /mnt/a")
	refused(d.slice(t, 2, 1), "p2 is mounted at /mnt/a")
	refused("nvme:"+d.char()+",size=32MiB", "partition table")
	refused("nvme:"+d.block(), "use block:"+d.block())
	refused("nvme:"+d.char()+",offset=1GiB", "behind its end")
	h.Run(t, "umount /mnt/a")
	h.Run(t, fmt.Sprintf("mkswap %s >/dev/null && swapon %s", d.part(2), d.part(2)))
	refused(d.slice(t, 2, 1), "p2 is swap")
	h.Run(t, "swapoff "+d.part(2))
	h.Run(t, "mkfs.ext4 -q -F "+d.part(2))
	// Only the claim sees what another mount namespace has mounted.
	h.Run(t, "unshare -m sh -c 'mount "+d.part(2)+" /mnt/a; touch /tmp/mounted; while [ ! -e /tmp/done ]; do sleep 0.05; done' >/dev/null 2>&1 & echo $! > /tmp/unshared; until [ -e /tmp/mounted ]; do sleep 0.05; done")
	refused(d.slice(t, 2, 1), "p2 is in use")
	h.Run(t, "touch /tmp/done; while kill -0 $(cat /tmp/unshared) 2>/dev/null; do sleep 0.05; done; rm -f /tmp/done /tmp/mounted")

	m := h.serve(t, d.slice(t, 1, 32), d.slice(t, 2, 24))
	refused("nvme:"+d.char(), "in use")
	refused(d.slice(t, 1, 1), "in use")
	refused("nvme:"+d.char()+",offset=2MiB,size=512,readonly", "in use")
	if r := h.Try(t, "mount "+d.part(2)+" /mnt/a"); r.Exit == 0 {
		t.Error("the host has mounted what is served")
		h.Run(t, "umount /mnt/a")
	}
	beside := h.serve(t, fmt.Sprintf("nvme:%s,offset=%d,size=24MiB", d.char(), d.partAt(t, 2)+24<<20), d.slice(t, 3, 32))
	load := h.startVerify(t, m.device(0), "--span 8MiB --bs 4k,64k --qd 32 --runtime 3s")
	h.verify(t, beside.device(0), "--span 4MiB --bs 4k,64k --qd 16 --runtime 1s")
	m.kill(t)
	if r := load.result(); r.Exit == 0 {
		t.Error("the load has not seen the end of its device")
	}
	m.start(t)
	h.verify(t, m.device(0), "--span 4MiB --bs 4k,64k --qd 16 --runtime 1s")
	m.stop(t)
	beside.stop(t)
	h.Run(t, fmt.Sprintf("mkfs.ext4 -q -F %s && mount %s /mnt/a && umount /mnt/a", d.part(2), d.part(2)))
}

// TestNVMeFormatted: the host formats a namespace with other blocks while a guest has it. Nothing of the guest's is written where it does not belong.
func TestNVMeFormatted(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{})
	m := h.serve(t, "nvme:"+d.char())
	h.verify(t, m.device(0), "--span 4MiB --qd 16 --runtime 1s")
	at := fmt.Sprint(64 << 20)
	file, _ := h.random(t, 4096)
	h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %s", m.device(0), file, at))
	lbaf := h.Run(t, "nvme id-ns "+d.char()+" | sed -n 's/^lbaf *\\([0-9]*\\) .*ms:0 .*lbads:12 .*/\\1/p'")
	h.Run(t, fmt.Sprintf("nvme format /dev/%s --namespace-id=1 --lbaf=%s --force", d.Name, strings.Fields(lbaf)[0]))
	h.until(t, "the kernel has not seen it", "[ $(cat /sys/class/block/"+strings.TrimPrefix(d.block(), "/dev/")+"/queue/logical_block_size) = 4096 ]")
	h.until(t, "a guest still writes", fmt.Sprintf("! guestdrv write %s --file %s --offset %s 2>/dev/null", m.device(0), file, at))
	m.stop(t)
	m.start(t)
	h.verify(t, m.device(0), "--span 4MiB --bs 4k,64k --qd 16 --runtime 1s")
}

// TestNVMeRemoved: the disk is pulled out under load. Commands fail, the namespace goes, the guest is told, and hostmed goes on with what else it has. The slot
// tells the kernel, or it does not and somebody else has to.
func TestNVMeRemoved(t *testing.T) {
	h := open(t)
	other := h.disk(t, diskConfig{})
	for name, removed := range map[string]func(*disk, *testing.T){"slot tells": (*disk).pullOut, "slot is silent": func(d *disk, t *testing.T) {
		d.vanish(t)
		d.forget(t)
	}} {
		t.Run(name, func(t *testing.T) {
			d := h.disk(t, diskConfig{})
			m := h.serve(t, "nvme:"+d.char()+"\nnvme:"+other.char()+",size=32MiB", "nvme:"+other.char()+",offset=32MiB,size=32MiB")
			s := h.spectate(t, m.device(0), 2)
			beside := h.startVerify(t, m.device(1), "--span 4MiB --bs 4k,64k --qd 4 --runtime 4s")
			m.says(t, "client connected: socket="+m.sockets[1])
			removed(d, t)
			m.says(t, "namespace removed: its medium is gone.*"+d.char())
			s.lost(t, 1)
			beside.verified()
			if !m.running(t) {
				t.Fatal("hostmed is gone")
			}
		})
	}
}

// TestNVMeGrows: a slice that goes to the end of its namespace grows with it, under load; the guest is told, and uses the new blocks. One with a size stays.
func TestNVMeGrows(t *testing.T) {
	h := open(t)
	g := h.target(t)
	char := strings.Replace(g.dev, "/dev/nvme", "/dev/ng", 1)
	m := h.serve(t, "nvme:"+char+",offset=16MiB\nnvme:"+char+",size=16MiB")
	s := h.spectate(t, m.device(0), 2)
	g.grow(t)
	m.says(t, "namespace resized.*to=112MiB")
	s.grown(t, 1, 112<<20)
	file, sum := h.random(t, 1<<20)
	h.Run(t, fmt.Sprintf("guestdrv write %s --nsid 1 --file %s --offset %d", m.device(0), file, 111<<20))
	if h.sum(t, g.dev, 127<<20, 1<<20) != sum {
		t.Error("the host does not read what the guest wrote behind the old end")
	}
	m.stop(t)
}

// TestNVMeUnprivileged: an ordinary user who was given the device serves it, as far as the kernel lets him.
func TestNVMeUnprivileged(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{})
	dir := "/tmp/" + h.name("user")
	h.Run(t, "grep -q ^user: /etc/passwd 2>/dev/null || echo 'user:x:1000:1000::/tmp:/bin/sh' >> /etc/passwd")
	h.Run(t, fmt.Sprintf("mkdir -m 777 %s; chmod 666 %s %s; mkdir -p /run/shadowbell; chmod 777 /run/shadowbell; rm -f /run/shadowbell/*", dir, d.char(), d.block()))
	h.atEnd(t, "chmod 755 /run/shadowbell")
	serve := fmt.Sprintf("su user -c 'exec hostmed serve --socket %[1]s/s --namespace nvme:%[2]s' >%[1]s/log 2>&1 & echo $! >%[1]s/pid; until [ -e %[1]s/s ]; do kill -0 $! || { cat %[1]s/log; exit 1; }; sleep 0.05; done", dir, d.char())
	if r := h.Try(t, serve); r.Exit != 0 {
		t.Fatalf("exit %d: %s%s", r.Exit, r.Stdout, r.Stderr)
	}
	h.atEnd(t, fmt.Sprintf("kill -TERM $(cat %[1]s/pid); while kill -0 $(cat %[1]s/pid) 2>/dev/null; do sleep 0.05; done; rm -rf %[1]s", dir))
	h.Run(t, "grep -q 'without CAP_SYS_ADMIN' "+dir+"/log")
	h.verify(t, "vfio-user:"+dir+"/s", "--span 4MiB --bs 4k,64k --qd 16 --runtime 1s")
}

// TestNVMePolled: a device that is polled is reset under load, and then pulled out, while nothing but the queue's own looks tell of anything.
func TestNVMePolled(t *testing.T) {
	h := open(t)
	d := h.disk(t, diskConfig{})
	m := h.serve(t, "nvme:"+d.char()+",poll")
	load := h.startVerify(t, m.device(0), "--span 16MiB --bs 4k,64k --qd 32 --jobs 2 --runtime 5s")
	m.says(t, "client connected")
	for range 3 {
		h.Run(t, fmt.Sprintf("guestdrv list >/dev/null; echo 1 > /sys/class/nvme/%[1]s/reset_controller; until [ $(cat /sys/class/nvme/%[1]s/state) = live ]; do sleep 0.05; done", d.Name))
	}
	if load.ended() {
		t.Error("the load had ended before the resets had")
	}
	load.verified()
	load = h.start(t, "guestdrv bench "+m.device(0)+" --json --rw randrw --bs 4k,64k --qd 32 --span 128MiB --runtime 8s --timeout 10s")
	h.until(t, "no second client", "[ $(grep -c 'client connected' "+m.log+") = 2 ]")
	d.vanish(t)
	d.forget(t)
	m.says(t, "namespace removed: its medium is gone.*"+d.char())
	if r := load.result(); r.Exit == 0 {
		t.Errorf("a load without its disk ended well: %s", r.Stdout)
	}
}
