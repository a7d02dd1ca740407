package faults

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal/volatile"
)

// TestPowerLoss cuts the power of the medium below hostmed, several times in the life of one guest: of a namespace that is written to as it is, first with
// its write cache on, then off, and of one with ext4 on it.
func TestPowerLoss(t *testing.T) {
	lab := vmlab.Open(t)
	raw, fs := volatile.New(80<<20), volatile.New(64<<20)
	rawFile, fsFile := volatile.MountFor(t, raw), volatile.MountFor(t, fs)
	socket := filepath.Join(shortDir(t), "s")
	// A process of its own: see package journal's tests.
	vmlab.HostmedProcess(t, "--socket", socket, "--namespace", "file:"+rawFile.Path, "--namespace", "file:"+fsFile.Path)
	c := vmlab.Config{Devices: []vmlab.Device{vmlab.VFIOUser(socket)}}
	acks := withAcks(t, &c)
	vm := lab.Boot(t, c)
	disk := vm.Disk(t, 0)
	random := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))

	cuts := func(t *testing.T, l journal.Layout) {
		t.Helper()
		for _, p := range []float64{0, 0.5, 0.9} {
			acks.more(t, 40)
			a := acks.read(t) // before the cut
			r, err := journal.Check(bytes.NewReader(raw.Cut(random, p)), l, a)
			if err != nil {
				t.Fatal(err)
			}
			found(t, r, 20)
		}
		vm.Run(t, "killall -q fio; "+stopWriter)
		if err := os.Truncate(string(acks), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("flush and FUA", func(t *testing.T) {
		l := startWriter(t, vm, disk.Namespace(1), 0)
		vm.Run(t, load(disk.Namespace(1))+" >/dev/null 2>&1 &")
		cuts(t, l)
		if s := raw.Stats(); s.Syncs == 0 || s.Durable == 0 {
			t.Errorf("%+v: the medium was asked for nothing", s)
		}
	})
	t.Run("write cache off", func(t *testing.T) {
		vm.Run(t, fmt.Sprintf("nvme set-feature /dev/%s -f 6 -V 0", disk.Name))
		l := journal.Layout{Run: rand.Uint64(), Methods: []journal.Method{journal.Through, journal.Through}, Records: 2000, Base: 60 << 20} // behind the other's
		vm.Run(t, fmt.Sprintf("setsid %s -device %s -methods through,through -run %d -records %d -base %d >/tmp/writer 2>&1 &", writer, disk.Namespace(1), l.Run, l.Records, l.Base))
		cuts(t, l)
	})
	t.Run("ext4", func(t *testing.T) {
		run := rand.Uint64()
		vm.Run(t, fmt.Sprintf("mkfs.ext4 -q %[1]s && mount %[1]s /mnt && mkdir /mnt/d && sync", disk.Namespace(2)))
		vm.Run(t, fmt.Sprintf("setsid %s -dir /mnt/d -run %d >/tmp/writer 2>&1 &", writer, run))
		for _, p := range []float64{0, 0.5, 0.9} {
			acks.more(t, 15)
			a := acks.read(t)
			image := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(image, fs.Cut(random, p), 0o600); err != nil {
				t.Fatal(err)
			}
			found(t, recovered(t, lab, image, run, a), 10)
		}
		vm.Run(t, stopWriter+"; umount /mnt")
	})
	vm.CheckDmesg(t)
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}

// recovered replays the journal of an ext4 image, checks that all is well with the file system then, and looks for the files.
func recovered(t *testing.T, lab *vmlab.Lab, image string, run uint64, acks journal.Acks) journal.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// -E journal_only: nothing but the replay. Whatever is wrong after it is not what a crash may leave.
	if out, err := lab.Tool(ctx, "usr/sbin/e2fsck", "-p", "-E", "journal_only", image); err != nil {
		t.Errorf("replaying the journal: %v\n%s", err, out)
	}
	if out, err := lab.Tool(ctx, "usr/sbin/e2fsck", "-fn", image); err != nil {
		t.Errorf("the file system is not clean after its journal was replayed: %v\n%s", err, out)
	}
	out := t.TempDir()
	if msg, err := lab.Tool(ctx, "usr/sbin/debugfs", "-R", "rdump /d "+out, image); err != nil {
		t.Fatalf("%v\n%s", err, msg)
	}
	r, err := journal.CheckFiles(filepath.Join(out, "d"), run, acks)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
