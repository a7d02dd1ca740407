package backend

import (
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/shared/events"
)

// TestMediumOf: whoever follows a request of a namespace finds it on its medium.
func TestMediumOf(t *testing.T) {
	open := func(spec string) Backend {
		b, err := Open(spec)
		return opened(t)(b, err)
	}
	x := plainFacts
	x.disk, x.name, x.start, x.logical, x.physical = "nvme3n1", "nvme3n1p2", 1<<20, 512, 512
	block := opened(t)(blockOverFile(t, 1<<20, Spec{Kind: KindBlock, LBA: 4096, NoPin: true}, x))
	char := openFake(t, newFakeChar(), Spec{Offset: 8192})
	char.name = "nvme1n1"
	vfio, err := vfioOf(t, Spec{Offset: 1 << 20, Size: 1 << 20, NSID: 1}, 1<<20, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer vfio.Close()
	path := filepath.Join(t.TempDir(), "disk")
	for _, c := range []struct {
		b    Backend
		want events.Medium
	}{
		{open("null:size=1MiB,lba=4096"), events.Medium{Kind: "null", Shift: 12}},
		{open("mem:size=1MiB"), events.Medium{Kind: "mem", Shift: 9}},
		{open("file:" + path + ",size=1MiB"), events.Medium{Kind: "file", Shift: 9}},
		{open("fault:delay=1ms@read@first=1,over=mem:size=1MiB"), events.Medium{Kind: "mem", Shift: 9}},
		{block, events.Medium{Kind: "block", Disk: "nvme3n1", Base: 1 << 20, Shift: 9}},
		{char, events.Medium{Kind: "nvme", Disk: "nvme1n1", NSID: 7, Base: 8192, Shift: 9}},
		{vfio.vfio, events.Medium{Kind: "vfio", PCI: vfio.spec.Path, NSID: 1, Base: 1 << 20, Shift: 12}},
	} {
		c.want.Name = c.b.Info().Name
		if got := MediumOf(c.b); got != c.want || got.Name == "" {
			t.Errorf("%+v, want %+v", got, c.want)
		}
	}
}
