package backends

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// kinds are the backends over an NVMe device.
var kinds = []string{"block", "nvme", "vfio"}

const (
	guestProgram = "vmlab/backends/guest"
	guestCommand = "vmlab-backends-guest"
	// Each subject has 32 MiB, with a neighbour on either side.
	subjectAt   = 64 << 20
	subjectSize = 32 << 20
)

// subject is a range of a disk that one guest has through a backend.
type subject struct {
	h    *host
	d    *disk
	kind string
	m    *mediator
}

// subject serves a range of a new disk through the backend of that kind.
func (h *host) subject(t *testing.T, kind string) *subject {
	t.Helper()
	s := &subject{h: h, kind: kind, d: h.disk(t, diskConfig{sizeMiB: 192, partitions: []int{63, 32, 63}})}
	if at := s.d.partAt(t, 2); at != subjectAt {
		t.Fatalf("the partition is at %d", at)
	}
	if kind == "vfio" {
		h.vfio(t, s.d)
	}
	s.m = h.serve(t, s.spec(""))
	return s
}

// spec is that of the range, with options that go on with a comma.
func (s *subject) spec(options string) string {
	at := fmt.Sprintf("offset=%d,size=%d", subjectAt, subjectSize)
	switch s.kind {
	case "block":
		return "block:" + s.d.part(2) + options
	case "nvme":
		return "nvme:" + s.d.char() + "," + at + options
	default:
		return "vfio:" + s.d.PCI + "," + at + options
	}
}

// toHost is what it takes before the host's kernel sees the disk; toGuest takes it back.
func (s *subject) toHost(t *testing.T) {
	t.Helper()
	if s.kind == "vfio" {
		s.m.stop(t)
		s.d.kernel(t)
	}
}

func (s *subject) toGuest(t *testing.T) {
	t.Helper()
	if s.kind == "vfio" {
		s.d.vfio(t)
		s.m.start(t)
	}
}

// neighbours is a checksum of what is on the disk before and behind the range, as it is behind the device.
func (s *subject) neighbours(t *testing.T) string {
	t.Helper()
	return digest(s.d.read(t, 0, subjectAt)) + digest(s.d.read(t, subjectAt+subjectSize, s.d.bytes-subjectAt-subjectSize))
}

// outside has a guest name blocks that it has not got. Each command must end with LBA Out of Range, or, if there is none of its kind, with Invalid
// Command Opcode.
func (h *host) outside(t *testing.T, device string) {
	t.Helper()
	var answers []struct {
		Command      string
		SLBA, Blocks uint64
		Status       uint16
		Text         string
	}
	if err := json.Unmarshal([]byte(h.Run(t, guestCommand+" outside "+device)), &answers); err != nil {
		t.Fatal(err)
	}
	const (
		invalidOpcode = 0x01
		outOfRange    = 0x80
	)
	ranged := map[string]bool{}
	for _, a := range answers {
		if a.Status == outOfRange {
			ranged[a.Command] = true
		} else if a.Status != invalidOpcode || a.Command == "read" || a.Command == "write" {
			t.Errorf("%s of %d blocks at %d: %s", a.Command, a.Blocks, a.SLBA, a.Text)
		}
	}
	if len(answers) < 8*4 || !ranged["read"] || !ranged["write"] {
		t.Errorf("%d answers; out of range are %v", len(answers), ranged)
	}
	t.Logf("LBA Out of Range: %v", keys(ranged))
}

// TestOutsideOfTheRange: a guest names blocks that are its neighbours', and gets LBA Out of Range. Nothing beside its range has changed, and
// its own blocks neither.
func TestOutsideOfTheRange(t *testing.T) {
	h := open(t)
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			s := h.subject(t, kind)
			fill(t, s.d)
			before, own := s.neighbours(t), digest(s.d.read(t, subjectAt, subjectSize))
			h.outside(t, s.m.device(0))
			if s.neighbours(t) != before {
				t.Error("bytes beside the range have changed")
			}
			if digest(s.d.read(t, subjectAt, subjectSize)) != own {
				t.Error("bytes of the range have changed")
			}
			// The guest does get at what is its own, up to the last block.
			h.verify(t, s.m.device(0), fmt.Sprintf("--span %d --bs 512,4k,64k --qd 16 --jobs 2 --runtime 1s", subjectSize))
			if s.neighbours(t) != before {
				t.Error("bytes beside the range have changed under a load")
			}
			if digest(s.d.read(t, subjectAt+subjectSize-512, 512)) == digest(make([]byte, 512)) {
				t.Error("the last block was not written")
			}
		})
	}
}

// TestBytes: what a guest wrote the host's kernel reads, and the other way round, at both ends of the range.
func TestBytes(t *testing.T) {
	h := open(t)
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			s := h.subject(t, kind)
			const piece = 1 << 20
			ends := []int{0, subjectSize - piece}
			var files, sums []string
			for _, at := range ends {
				file, sum := h.random(t, piece)
				h.Run(t, fmt.Sprintf("guestdrv write %s --file %s --offset %d", s.m.device(0), file, at))
				sums = append(sums, sum)
			}
			s.toHost(t)
			for i, at := range ends {
				if h.sum(t, s.d.block(), subjectAt+at, piece) != sums[i] {
					t.Errorf("the host does not read what the guest wrote at %d", at)
				}
				file, _ := h.random(t, piece)
				h.Run(t, fmt.Sprintf("dd if=%s of=%s bs=64k seek=%d oflag=direct conv=notrunc", file, s.d.block(), (subjectAt+at)>>16))
				files = append(files, file)
			}
			s.toGuest(t)
			for i, at := range ends {
				h.Run(t, fmt.Sprintf("guestdrv read %s --offset %d --length %d | cmp - %s", s.m.device(0), at, piece, files[i]))
			}
		})
	}
}

// TestNoCopy: the addresses that QEMU's device is given for data are those of the guest's own pages: nothing is copied on the way. Behind VFIO the
// device's addresses are hostmed's choice, and the IOMMU says which pages they are. Under a load hostmed's counters say the same of each command.
func TestNoCopy(t *testing.T) {
	h := open(t)
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			s := h.subject(t, kind)
			before := s.m.counters(t)
			pages, last, translated := h.dma(t, s.m.device(0))
			if kind == "vfio" {
				last = physical(t, last, translated)
			}
			if want := append(slices.Clone(pages), pages...); !slices.Equal(last, want) {
				t.Errorf("the device's DMA targets are %#x, and the guest's pages %#x", last, pages)
			}
			s.notCopied(t, before)
		})
	}
}

// notCopied puts a load on the range and looks at hostmed's counters, also while it goes on: each command of the guest's is one of the device's, and moves
// data with no copy. Since before, nothing was copied; behind VFIO, nothing once the guest's memory was pinned, which a busy machine may take seconds for.
func (s *subject) notCopied(t *testing.T, before map[string]uint64) {
	t.Helper()
	idle := s.m.counters(t)
	var busy map[string]uint64
	gone := numbers(t, s.m.saysAfter(t, "client disconnected", func() {
		load := s.h.start(t, fmt.Sprintf("guestdrv bench %s --json --rw randrw --bs 4k --qd 16 --jobs 2 --runtime 4s", s.m.device(0)))
		for busy = idle; !load.ended(); {
			last := busy
			if busy = s.m.counters(t); busy["mapped"] > last["mapped"] && busy["copied"] == last["copied"] {
				break
			}
		}
		if f := parseFigures(t, load.wait()); f.Errors != 0 || f.IOPS == 0 {
			t.Errorf("%+v", f)
		}
	}))
	after := s.m.counters(t)
	commands := gone["reads"] + gone["writes"]
	mapped, copied := after["mapped"]-idle["mapped"], after["copied"]-idle["copied"]
	if mapped+copied != commands || commands == 0 {
		t.Errorf("%d commands of the guest's, and of the device's %d that move data with no copy, %d that are copied", commands, mapped, copied)
	}
	if busy["mapped"] <= idle["mapped"] || busy["mapped"] > after["mapped"] {
		t.Errorf("mapped is %d before the load, %d during, %d after it", idle["mapped"], busy["mapped"], after["mapped"])
	}
	if after["copied"] != busy["copied"] || s.kind != "vfio" && after["copied"] != before["copied"] {
		t.Errorf("%d commands were copied, %d before a point in the load, %d before all this", after["copied"], busy["copied"], before["copied"])
	}
	t.Logf("%d commands of the guest's; hostmed: %v", commands, after)
}

// dma has a guest write and read, and returns the pages of its memory, those that the device was given for the last write and the last read, and what
// an IOMMU translated meanwhile.
func (h *host) dma(t *testing.T, device string) (pages, last []uint64, translated []translation) {
	t.Helper()
	lines := h.traced(t, "pci_nvme_map_addr vtd_dmar_translate", func() {
		if err := json.Unmarshal([]byte(h.Run(t, guestCommand+" dma "+device)), &pages); err != nil {
			t.Fatal(err)
		}
	})
	var targets []uint64
	for _, l := range lines {
		if _, rest, ok := strings.Cut(l, "vtd_dmar_translate "); ok {
			var tr translation
			_, rest, _ = strings.Cut(rest, "iova ")
			if n, _ := fmt.Sscanf(rest, "0x%x -> gpa 0x%x mask 0x%x", &tr.iova, &tr.gpa, &tr.mask); n == 3 {
				translated = append(translated, tr)
			}
		}
		if _, rest, ok := strings.Cut(l, "pci_nvme_map_addr addr "); ok {
			var iova, size uint64
			if n, _ := fmt.Sscanf(rest, "0x%x len %d", &iova, &size); n == 2 {
				for end := iova + size; iova < end; iova += 4096 - iova%4096 {
					targets = append(targets, iova&^4095)
				}
			}
		}
	}
	// The last write and the last read, and nothing behind them: what a device of hostmed's does first, it may have done with copies.
	if len(targets) < 2*len(pages) {
		t.Fatalf("the device was given %d pages for data", len(targets))
	}
	t.Logf("the device was given %d pages for data", len(targets))
	return pages, targets[len(targets)-2*len(pages):], translated
}

// translation is what the IOMMU made of an address: mask is the size of the page less one.
type translation struct{ iova, gpa, mask uint64 }

// physical returns the physical pages behind IOVAs.
func physical(t *testing.T, iovas []uint64, translated []translation) (pages []uint64) {
	t.Helper()
	for _, iova := range iovas {
		i := slices.IndexFunc(translated, func(tr translation) bool { return iova&^tr.mask == tr.iova&^tr.mask })
		if i < 0 {
			t.Fatalf("the device was given %#x, which the IOMMU did not translate (%d that it did)", iova, len(translated))
		}
		tr := translated[i]
		pages = append(pages, tr.gpa&^tr.mask|iova&tr.mask)
	}
	return pages
}
