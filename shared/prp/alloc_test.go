package prp

import (
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

var lengths = []struct {
	name   string
	length uint32
}{
	{"1page", PageSize},
	{"2pages", 2 * PageSize},
	{"256pages", 256 * PageSize},
	{"1024pages", 1024 * PageSize},
}

func built(t testing.TB, length uint32) (nvme.Command, ListPage) {
	t.Helper()
	list := listMemory(0, 3*PageSize)
	var cmd nvme.Command
	if err := Build(&cmd, 0x10000, length, PageSize, list); err != nil {
		t.Fatal(err)
	}
	return cmd, list
}

func TestNoAllocation(t *testing.T) {
	for _, tt := range lengths {
		cmd, list := built(t, tt.length)
		var mem Reader = list
		var w Walker
		out := make([]Extent, 0, 4)
		check := func(name string, f func()) {
			t.Run(name+"/"+tt.name, func(t *testing.T) {
				if n := testing.AllocsPerRun(200, f); n != 0 {
					t.Errorf("%v allocations", n)
				}
			})
		}
		check("Build", func() { _ = Build(&cmd, 0x10000, tt.length, PageSize, list) })
		check("Walker", func() { out, _ = w.Walk(cmd.PRP1, cmd.PRP2, tt.length, PageSize, 1024, mem, out[:0]) })
		if !raceDetector {
			check("Walk", func() { out, _ = Walk(cmd.PRP1, cmd.PRP2, tt.length, PageSize, 1024, mem, out[:0]) })
		}
	}
}

func BenchmarkBuild(b *testing.B) {
	for _, tt := range lengths {
		b.Run(tt.name, func(b *testing.B) {
			cmd, list := built(b, tt.length)
			for b.Loop() {
				if err := Build(&cmd, 0x10000, tt.length, PageSize, list); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWalk(b *testing.B) {
	for _, tt := range lengths {
		cmd, list := built(b, tt.length)
		var mem Reader = list
		out := make([]Extent, 0, 4)
		b.Run(tt.name, func(b *testing.B) {
			for b.Loop() {
				out, _ = Walk(cmd.PRP1, cmd.PRP2, tt.length, PageSize, 1024, mem, out[:0])
			}
		})
		b.Run(tt.name+"/Walker", func(b *testing.B) {
			var w Walker
			for b.Loop() {
				out, _ = w.Walk(cmd.PRP1, cmd.PRP2, tt.length, PageSize, 1024, mem, out[:0])
			}
		})
	}
}
