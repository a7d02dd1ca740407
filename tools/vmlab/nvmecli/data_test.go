package nvmecli

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestData: what fio and file systems write is what they read, and what is in the file on the host, in all three doorbell modes, with both
// block sizes, on memory and files, by interrupts and polled.
func TestData(t *testing.T) {
	vmlab.Open(t)
	var themes []theme
	for _, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap} {
		name := fmt.Sprint(mode)
		sub := named(name, 1, namespace("mem:size=16MiB"), namespace("mem:size=16MiB,lba=4096"),
			namespace(fileSpec(t, name, "size=16MiB")), namespace(fileSpec(t, name+"-4k", "size=16MiB,lba=4096")))
		sub.Controllers[0].Doorbells = mode
		themes = append(themes, theme{name: name, sub: sub, run: data})
	}
	stride := named("stride", 1, namespace("mem:size=16MiB"))
	stride.Controllers[0].DSTRD = 4
	themes = append(themes,
		theme{name: "stride", sub: stride, run: wideStride},
		theme{name: "filesystem", sub: named("filesystem", 1, namespace(fileSpec(t, "filesystem", "size=64MiB")), namespace("mem:size=64MiB,lba=4096")), run: fileSystems},
	)
	runThemes(t, vmlab.Config{Append: "nvme.poll_queues=1"}, themes...)
}

// load is what fio is told of every namespace.
const load = "fio --name=v --filename=%s --rw=randwrite --bs=4k --size=2M --offset_increment=2M --numjobs=2 --iodepth=32 --ioengine=%s --direct=1" +
	" --verify=crc32c --verify_fatal=1 --do_verify=1 --group_reporting --output-format=json"

// fio runs fio and checks that as much was verified as was written, without an error.
func (b *bench) fio(t *testing.T, command string, ios int) {
	t.Helper()
	out := b.Run(t, command)
	type counts struct {
		IOs int `json:"total_ios"`
	}
	var r struct {
		Jobs []struct {
			Error       int
			Read, Write counts
		}
	}
	if i := strings.Index(out, "{"); i < 0 {
		t.Fatalf("%s: no JSON:\n%s", command, out)
	} else if err := json.Unmarshal([]byte(out[i:]), &r); err != nil || len(r.Jobs) != 1 {
		t.Fatalf("%s: %v:\n%s", command, err, out)
	}
	if j := r.Jobs[0]; j.Error != 0 || j.Write.IOs != ios || j.Read.IOs != ios {
		t.Errorf("%s: error %d, %d writes, %d reads, want %d of each", command, j.Error, j.Write.IOs, j.Read.IOs, ios)
	}
}

// data: fio on each namespace of a controller, the queues that it goes through, and discards.
func data(t *testing.T, b *bench) {
	for _, nsid := range []int{1, 2, 3, 4} {
		b.fio(t, fmt.Sprintf(load, b.block(nsid), "io_uring"), 1024)
		if spec := b.sub.Namespaces[nsid-1].Spec; strings.HasPrefix(spec, "file:") {
			sum := sha256.Sum256(onDisk(t, spec, 0, 16<<20))
			if got := b.Run(t, "sha256sum "+b.block(nsid)); !strings.HasPrefix(got, fmt.Sprintf("%x", sum)) {
				t.Errorf("namespace %d: the guest reads %s, and %x is in the file", nsid, got, sum)
			}
		}
	}
	stats, err := b.daemon.Stats(b.sub.Controllers[0].Socket)
	if err != nil || stats.Errors > 0 || stats.Writes != 4*1024 {
		t.Errorf("hostmed counted %+v, %v: want %d writes", stats, err, 4*1024)
	}
	queues(t, b)
	discards(t, b, 1)
	discards(t, b, 4)
	if b.sub.Controllers[0].Doorbells == hostmed.Shadow {
		polled(t, b)
		// Commands past the kernel's block layer.
		b.fio(t, strings.Replace(fmt.Sprintf(load, strings.Replace(b.block(3), "nvme", "ng", 1), "io_uring_cmd --cmd_type=nvme"), "--direct=1", "", 1), 1024)
	}
}

// polled: the kernel's poll queue has no interrupts.
func polled(t *testing.T, b *bench) {
	before, err := b.daemon.Stats(b.sub.Controllers[0].Socket)
	if err != nil {
		t.Fatal(err)
	}
	b.fio(t, fmt.Sprintf(load, b.block(1), "io_uring --hipri"), 1024)
	after, err := b.daemon.Stats(b.sub.Controllers[0].Socket)
	if err != nil {
		t.Fatal(err)
	}
	if d := after.Sub(before); d.Interrupts > d.Commands()/20 || d.Commands() < 2048 {
		t.Errorf("polled: %d commands, %d interrupts", d.Commands(), d.Interrupts)
	}
}

// queues: there is a queue for each CPU, and one for polling; each CPU's I/O is completed by its own queue's interrupt.
func queues(t *testing.T, b *bench) {
	name := b.disks[0].Name
	disk := strings.TrimPrefix(b.block(1), "/dev/")
	if n := b.Run(t, "ls /sys/block/"+disk+"/mq | wc -l"); strings.TrimSpace(n) != "3" {
		t.Errorf("%s has %s hardware queues, want one for each of 2 CPUs and one for polling", disk, n)
	}
	b.says(t, "dmesg", "nvme "+name+": 2/0/1 default/read/poll queues")
	for cpu := range 2 {
		before := b.interrupts(t)
		b.Run(t, fmt.Sprintf("taskset %d dd if=%s of=/dev/null bs=4k count=50 iflag=direct 2>/dev/null", 1<<cpu, b.block(1)))
		after := b.interrupts(t)
		for q := 1; q <= 2; q++ {
			for on := range 2 {
				n := after[q][on] - before[q][on]
				if mine := q == cpu+1 && on == cpu; mine && n == 0 || !mine && n > 0 && q != cpu+1 {
					t.Errorf("50 reads on CPU %d: %d interrupts of queue %d on CPU %d", cpu, n, q, on)
				}
			}
		}
	}
}

// interrupts returns the counts of I/O queues 1 and 2, by queue and CPU.
func (b *bench) interrupts(t *testing.T) (n [3][2]uint64) {
	t.Helper()
	for line := range strings.Lines(b.Run(t, "cat /proc/interrupts")) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		q, ok := strings.CutPrefix(f[len(f)-1], b.disks[0].Name+"q")
		qid, err := strconv.Atoi(q)
		if !ok || err != nil || qid < 1 || qid > 2 {
			continue
		}
		for cpu := range 2 {
			n[qid][cpu], _ = strconv.ParseUint(f[1+cpu], 10, 64)
		}
	}
	return n
}

// discards: what blkdiscard takes is zeroes, and nothing else is; on a file, the space is given back.
func discards(t *testing.T, b *bench, nsid int) {
	dev, spec := b.block(nsid), b.sub.Namespaces[nsid-1].Spec
	allocated := func() int64 {
		if !strings.HasPrefix(spec, "file:") {
			return 0
		}
		path, _, _ := strings.Cut(strings.TrimPrefix(spec, "file:"), ",")
		return usage(t, path)
	}
	b.put(t, "/tmp/data", pattern("discards", 64<<10))
	b.Run(t, fmt.Sprintf("for i in $(seq 0 15); do cat /tmp/data; done | dd of=%s bs=64k iflag=fullblock oflag=direct 2>/dev/null", dev))
	full := allocated()
	b.Run(t, fmt.Sprintf("blkdiscard -o 0 -l $((512*1024)) %s", dev))
	if freed := full - allocated(); full > 0 && freed != 512<<10 {
		t.Errorf("%s: a discard of 512 KiB freed %d bytes of %d in the file", dev, freed, full)
	}
	b.Run(t, fmt.Sprintf("dd if=%s bs=64k count=8 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c | grep -qx 0", dev))
	b.Run(t, fmt.Sprintf("dd if=%s bs=64k skip=8 count=1 iflag=direct 2>/dev/null | cmp - /tmp/data", dev))
}

// usage is how many bytes of a file have space of their own.
func usage(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

// wideStride: doorbells that are 64 bytes apart work with a driver that goes by CAP.DSTRD.
func wideStride(t *testing.T, b *bench) {
	if b.seen[0].caps.DSTRD() != 4 {
		t.Errorf("CAP.DSTRD is %d, want 4", b.seen[0].caps.DSTRD())
	}
	b.fio(t, fmt.Sprintf(load, b.block(1), "io_uring"), 1024)
	b.fio(t, fmt.Sprintf(load, b.block(1), "libaio"), 1024)
	stats, err := b.daemon.Stats(b.sub.Controllers[0].Socket)
	if err != nil || stats.Writes != 2048 || stats.Errors != 0 {
		t.Errorf("hostmed counted %+v, %v: want 2048 writes", stats, err)
	}
}
