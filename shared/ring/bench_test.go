package ring

import (
	"fmt"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Each benchmark counts entries: ns/op is ns for each entry, on one thread with warm lines.

const benchSize = 256

func BenchmarkPushFetch(b *testing.B) {
	p, c := newSQ(b, shm.NewHeap(benchSize*SQESize), benchSize)
	var cmd nvme.Command
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		p.Push(&cmd)
		c.Fetch(&cmd)
	}
}

func BenchmarkPush(b *testing.B) {
	p, _ := newSQ(b, shm.NewHeap(benchSize*SQESize), benchSize)
	var cmd nvme.Command
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		p.Push(&cmd)
	}
}

func BenchmarkFetch(b *testing.B) {
	_, c := newSQ(b, shm.NewHeap(benchSize*SQESize), benchSize)
	var cmd nvme.Command
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		c.Fetch(&cmd)
	}
}

func BenchmarkPost(b *testing.B) {
	for _, batch := range []int{1, 4, 16, 64} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			p, _ := newCQ(b, shm.NewHeap(benchSize*CQESize), benchSize)
			es := make([]Entry, batch)
			b.ReportAllocs()
			for i := 0; i < b.N; i += batch {
				p.Post(es)
			}
		})
	}
}

func BenchmarkPostNext(b *testing.B) {
	for _, batch := range []int{1, 16} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			p, c := newCQ(b, shm.NewHeap(benchSize*CQESize), benchSize)
			es := make([]Entry, batch)
			b.ReportAllocs()
			for i := 0; i < b.N; i += batch {
				p.Post(es)
				for range batch {
					if _, ok := c.Next(); !ok {
						b.Fatal("a completion is missing")
					}
				}
			}
		})
	}
}
