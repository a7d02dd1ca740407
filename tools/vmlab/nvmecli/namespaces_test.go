package nvmecli

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// namespaces: create-ns, attach-ns, detach-ns, delete-ns, list-ns --all, list-ctrl, and the capacity that they take and give back.
func namespaces(t *testing.T, b *bench) {
	ctrl := b.ctrl()
	free := func() uint64 { return number(t, b.object(t, "nvme id-ctrl "+ctrl)["unvmcap"]) }
	allocated := func() (ids []int) {
		var l struct {
			List []struct{ NSID int } `json:"nsid_list"`
		}
		b.json(t, &l, "nvme list-ns "+ctrl+" --all")
		for _, n := range l.List {
			ids = append(ids, n.NSID)
		}
		return ids
	}
	attachedTo := func(nsid int) string {
		var l struct {
			List []map[string]any `json:"ctrl_list"`
		}
		b.json(t, &l, fmt.Sprintf("nvme list-ctrl %s -n %d", ctrl, nsid))
		return fmt.Sprint(l.List)
	}
	if id := b.object(t, "nvme id-ctrl "+ctrl); number(t, id["tnvmcap"]) != b.sub.Pool.Capacity || free() != b.sub.Pool.Capacity {
		t.Errorf("id-ctrl: tnvmcap %v, unvmcap %v, want %d, all free", id["tnvmcap"], id["unvmcap"], b.sub.Pool.Capacity)
	}
	if got := allocated(); !slices.Equal(got, []int{1}) {
		t.Errorf("list-ns --all: %v, want 1", got)
	}
	if got := attachedTo(1); !strings.Contains(got, ":1]") {
		t.Errorf("list-ctrl -n 1: %s, want controller 1", got)
	}

	create := func(args string) int {
		t.Helper()
		m := regexp.MustCompile(`created nsid:(\d+)`).FindStringSubmatch(b.Run(t, "nvme create-ns "+ctrl+" "+args+" 2>&1"))
		if m == nil {
			t.Fatalf("create-ns %s does not say what it created", args)
		}
		var nsid int
		fmt.Sscan(m[1], &nsid)
		return nsid
	}
	two := create("--nsze=32768 --ncap=32768 --block-size=512")
	three := create("--nsze=4096 --ncap=4096 --flbas=1")
	if two != 2 || three != 3 || free() != b.sub.Pool.Capacity-32<<20 || !slices.Equal(allocated(), []int{1, 2, 3}) {
		t.Errorf("created %d and %d, %d bytes free, allocated %v", two, three, free(), allocated())
	}
	if got := b.Run(t, "nvme list-ns "+ctrl); strings.Contains(got, ":0x2") {
		t.Errorf("a namespace that is attached to nobody is listed:\n%s", got)
	}
	attach := func(nsid int) string {
		t.Helper()
		b.says(t, fmt.Sprintf("nvme attach-ns %s -n %d -c 1", ctrl, nsid), fmt.Sprintf("attach-ns: Success, nsid:%d", nsid))
		dev, err := b.NamespaceOf(t.Context(), b.disks[0], nsid)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	}
	for nsid, block := range map[int]int{two: 512, three: 4096} {
		dev := attach(nsid)
		if got := b.Run(t, "blockdev --getss "+dev+"; blockdev --getsize64 "+dev); got != fmt.Sprintf("%d\n%d", block, 16<<20) {
			t.Errorf("namespace %d has blocks of and size %q, want %d and 16 MiB", nsid, got, block)
		}
		b.fio(t, fmt.Sprintf(load, dev, "libaio"), 1024)
	}
	b.fails(t, nvme.StatusNamespaceAlreadyAttached, "nvme attach-ns "+ctrl+" -n 2 -c 1")
	b.fails(t, nvme.StatusControllerListInvalid, "nvme attach-ns "+ctrl+" -n 2 -c 77")
	b.fails(t, nvme.StatusInvalidNamespace, "nvme attach-ns "+ctrl+" -n 9 -c 1")
	b.fails(t, nvme.StatusNamespaceInsufficientCapacity, "nvme create-ns "+ctrl+" --nsze=0x10000000 --ncap=0x10000000 --block-size=512")
	b.fails(t, nvme.StatusInvalidFormat, "nvme create-ns "+ctrl+" --nsze=8 --ncap=8 --flbas=9")

	b.says(t, "nvme detach-ns "+ctrl+" -n 2 -c 1", "detach-ns: Success, nsid:2")
	b.vanishes(t, 2)
	b.fails(t, nvme.StatusNamespaceNotAttached, "nvme detach-ns "+ctrl+" -n 2 -c 1")
	b.says(t, "nvme delete-ns "+ctrl+" -n 2", "delete-ns: Success, deleted nsid:2")
	b.says(t, "nvme delete-ns "+ctrl+" -n 3", "delete-ns: Success, deleted nsid:3") // while it is attached
	b.vanishes(t, 3)
	if free() != b.sub.Pool.Capacity || !slices.Equal(allocated(), []int{1}) {
		t.Errorf("all deleted: %d bytes free, allocated %v", free(), allocated())
	}
}

// vanishes waits until the guest has no device of the namespace any more.
func (b *bench) vanishes(t *testing.T, nsid int) {
	t.Helper()
	b.Run(t, fmt.Sprintf("while cat /sys/class/nvme/%s/nvme*n*/nsid 2>/dev/null | grep -qx %d; do sleep 0.05; done", b.disks[0].Name, nsid))
}

// hotplug: the operator adds, resizes and removes namespaces while the guest does I/O; it hears of it and follows.
func hotplug(t *testing.T, b *bench) {
	i := slices.IndexFunc(b.config.Subsystems, func(s hostmed.SubsystemConfig) bool { return s.NQN == b.sub.NQN })
	reload := func(namespaces ...hostmed.NamespaceConfig) {
		t.Helper()
		b.config.Subsystems = slices.Clone(b.config.Subsystems)
		b.config.Subsystems[i].Namespaces = namespaces
		if err := b.daemon.Reload(b.config); err != nil {
			t.Fatal(err)
		}
	}
	one := b.sub.Namespaces[0]
	path := filepath.Join(t.TempDir(), "grows")
	grows := hostmed.NamespaceConfig{NSID: 5, Spec: "file:" + path + ",size=8MiB"}
	b.Run(t, fmt.Sprintf("(while [ ! -e /tmp/enough ]; do fio --name=v --filename=%s --rw=randrw --bs=4k --size=4M --iodepth=8 --ioengine=libaio --direct=1"+
		" --verify=crc32c --verify_fatal=1 || touch /tmp/failed; done; touch /tmp/over) >/tmp/fio 2>&1 &", b.block(1)))
	for range 2 {
		reload(one, grows)
		dev, err := b.NamespaceOf(t.Context(), b.disks[0], 5)
		if err != nil {
			t.Fatal(err)
		}
		is := func(size int) {
			t.Helper()
			b.Run(t, fmt.Sprintf("until [ $(blockdev --getsize64 %s) = %d ]; do sleep 0.05; done", dev, size))
		}
		is(8 << 20)
		b.fio(t, strings.Replace(fmt.Sprintf(load, dev, "libaio"), "--size=2M", "--size=512k", 1), 256)
		if err := os.Truncate(path, 24<<20); err != nil {
			t.Fatal(err)
		}
		reload(one, grows)
		is(24 << 20)
		b.Run(t, fmt.Sprintf("dd if=/dev/zero of=%s bs=1M seek=23 count=1 oflag=direct 2>/dev/null", dev))
		reload(one)
		b.vanishes(t, 5)
		if err := os.Truncate(path, 8<<20); err != nil {
			t.Fatal(err)
		}
	}
	b.RunWithin(t, 2*time.Minute, "touch /tmp/enough; until [ -e /tmp/over ]; do sleep 0.1; done; [ ! -e /tmp/failed ] || { cat /tmp/fio; exit 1; }; rm /tmp/enough /tmp/over")

	// The kernel reads the log when it hears of a change. Whoever does not want to hear finds it there.
	b.Run(t, "nvme set-feature "+b.ctrl()+" -f 0xb -V 0")
	reload(one, hostmed.NamespaceConfig{NSID: 7, Spec: "mem:size=8MiB"})
	changed := b.object(t, "nvme changed-ns-list-log "+b.ctrl())[b.disks[0].Name].(map[string]any)
	if len(changed) != 1 || fmt.Sprint(changed) != "map[[   1]:0x7]" {
		t.Errorf("changed-ns-list-log: %v, want 7", changed)
	}
	b.Run(t, "nvme ns-rescan "+b.ctrl())
	if _, err := b.NamespaceOf(t.Context(), b.disks[0], 7); err != nil {
		t.Error(err)
	}
}
