package faults

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal"
)

var journalMethods = []journal.Method{journal.Flush, journal.Durable, journal.Durable, journal.Batch}

// startWriter starts the four writers of journalMethods on a namespace and returns where they write. Each run on a disk has its own number, from 0,
// and its own place there.
func startWriter(t *testing.T, vm *vmlab.VM, device string, run int) journal.Layout {
	t.Helper()
	l := journal.Layout{Run: rand.Uint64(), Methods: journalMethods, Records: 2000}
	l.Base = loadBelow + int64(run)*l.Size()
	vm.Run(t, fmt.Sprintf("setsid %s -device %s -run %d -records %d -base %d >/tmp/writer 2>&1 &", writer, device, l.Run, l.Records, l.Base))
	return l
}

const loadBelow = 24 << 20 // what load has of a disk

// load keeps a guest's disk busy beside the writers.
func load(device string) string {
	return fmt.Sprintf("fio --name=load --filename=%s --rw=randrw --bs=4k,64k --size=%d --iodepth=16 --ioengine=libaio --direct=1 --time_based --runtime=60 --fsync=32", device, loadBelow)
}

// TestKilledHostmedLosesNothing: hostmed and QEMU get SIGKILL in the middle of the work of four writers and fio, one before the other or
// together. What was acknowledged is in the file.
func TestKilledHostmedLosesNothing(t *testing.T) {
	lab := vmlab.Open(t)
	kill := func(pid int) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	for mode, order := range map[hostmed.DoorbellMode]string{hostmed.Shadow: "hostmed first", hostmed.Trap: "QEMU first", hostmed.Mmap: "both"} {
		t.Run(fmt.Sprintf("%v: %s", mode, order), func(t *testing.T) {
			disk := filepath.Join(t.TempDir(), "disk")
			socket := filepath.Join(shortDir(t), "s")
			h := vmlab.HostmedProcess(t, "--socket", socket, "--namespace", "file:"+disk+",size=64MiB", "--doorbells", mode.String())
			c := vmlab.Config{Devices: []vmlab.Device{vmlab.VFIOUser(socket)}}
			acks := withAcks(t, &c)
			vm := lab.Boot(t, c)
			ns := vm.Disk(t, 0).Namespace(1)
			l := startWriter(t, vm, ns, 0)
			vm.Run(t, load(ns)+" >/dev/null 2>&1 &")
			acks.more(t, 60+rand.IntN(120))

			switch order {
			case "hostmed first":
				kill(h.PID())
				time.Sleep(20 * time.Millisecond) // QEMU may abort by itself
			case "both":
				kill(h.PID())
			}
			vm.Kill()
			if order == "QEMU first" {
				kill(h.PID())
			}
			if err := h.Stop(); err == nil {
				t.Error("hostmed was killed and ended well")
			}
			checkFile(t, disk, l, acks.read(t), 50)
		})
	}
}
