package backends

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestKilled: hostmed is killed under load, with commands at the device. Its next process has the device at once and finds what was
// acknowledged; a guest reads and writes; and the host's own driver has a healthy device. No reboot, no rescue.
func TestKilled(t *testing.T) {
	h := open(t)
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			s := h.subject(t, kind)
			const piece = 1 << 20
			file, sum := h.random(t, piece)
			h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", s.m.device(0), file, subjectSize-piece))
			before := s.neighbours(t)
			for range 2 {
				load := h.start(t, fmt.Sprintf("guestdrv bench %s --json --rw randrw --span 16MiB --bs 4k,64k --qd 32 --jobs 2 --runtime 30s", s.m.device(0)))
				s.busy(t, load)
				s.m.kill(t)
				if r := load.result(); r.Exit == 0 || !strings.Contains(r.Stderr, "gone") {
					t.Errorf("the guest's load: exit %d: %s", r.Exit, tail(r.Stderr, 5))
				}
				s.m.start(t)
				h.Run(t, fmt.Sprintf("guestdrv read %s --offset %d --length %d | cmp - %s", s.m.device(0), subjectSize-piece, piece, file))
				h.verify(t, s.m.device(0), "--span 4MiB --bs 512,64k --qd 16 --jobs 2 --runtime 1s")
			}
			s.m.kill(t)
			if kind == "vfio" {
				s.d.kernel(t)
			}
			if h.sum(t, s.d.block(), subjectAt+subjectSize-piece, piece) != sum {
				t.Error("the host does not read what the guest wrote")
			}
			h.Run(t, fmt.Sprintf("fio --name=host --filename=%s --size=4M --rw=randwrite --bs=4k --ioengine=io_uring --iodepth=8 --direct=1 --verify=crc32c --do_verify=1", s.d.part(1)))
			if kind == "vfio" {
				s.d.vfio(t)
				s.m.start(t)
				h.verify(t, s.m.device(0), "--span 4MiB --qd 16 --jobs 1 --runtime 1s")
				s.m.stop(t)
				s.d.kernel(t)
			}
			if after := s.neighbours(t)[64:]; after != before[64:] {
				t.Error("bytes behind the range have changed")
			}
		})
	}
}

// busy waits until the load has brought I/O to the device, and a thousand commands have passed since.
func (s *subject) busy(t *testing.T, load *job) {
	t.Helper()
	const event = "pci_nvme_write"
	seen := s.h.traced(t, event, func() {
		for deadline := time.Now().Add(patience); !load.ended() && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if b, err := os.ReadFile(filepath.Join(s.h.dir, traceFile)); err == nil && strings.Count(string(b[s.h.traceFrom:]), event) > 1000 {
				return
			}
		}
	})
	if len(seen) < 1000 || load.ended() {
		t.Fatalf("the load does not run: %d writes", len(seen))
	}
}

// settled waits until the kernel's driver has its device live again.
func (s *subject) settled(t *testing.T) {
	t.Helper()
	s.h.until(t, s.d.Name+" is not live", "[ $(cat /sys/class/nvme/"+s.d.Name+"/state) = live ]")
}

// reset resets the controller under whoever drives it, as an operator does, or a kernel whose commands time out, and waits until it is back.
func (s *subject) reset(t *testing.T) {
	t.Helper()
	if s.kind == "vfio" {
		s.h.Run(t, "echo 1 > /sys/bus/pci/devices/"+s.d.PCI+"/reset")
		s.m.says(t, "controller is back")
		return
	}
	s.h.Run(t, "echo 1 > /sys/class/nvme/"+s.d.Name+"/reset_controller")
	s.settled(t)
}

// TestReset: the controller is reset under load. The guest sees a delay: no error, and nothing wrong in what it reads.
func TestReset(t *testing.T) {
	h := open(t)
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			s := h.subject(t, kind)
			load := h.startVerify(t, s.m.device(0), "--span 8MiB --bs 4k,64k --qd 32 --jobs 2 --runtime 3s")
			s.busy(t, load)
			s.reset(t)
			f := load.verified()
			t.Logf("%.0f IOPS; the longest command took %.0f ms", f.IOPS, f.Latency.Max/1e6)
			h.verify(t, s.m.device(0), "--span 4MiB --bs 512,64k --qd 16 --jobs 1 --runtime 1s")
			h.CheckDmesg(t, "Ignoring bogus Namespace Identifiers")
		})
	}
}
