package events

import "testing"

func BenchmarkPut(b *testing.B) {
	for _, size := range []struct {
		name string
		n    uint32
	}{{"2MiB", 1 << 16}, {"8MiB", 1 << 18}} {
		w, _ := ring(b, Config{Records: size.n})
		b.Run("fetch/"+size.name, func(b *testing.B) {
			for i := range b.N {
				if w.Fetch(1, 2, uint16(i), 4, 5, 6, 7); i%16 == 15 {
					w.Flush()
				}
			}
		})
	}
}

func BenchmarkNow(b *testing.B) {
	c := NewClock()
	for b.Loop() {
		c.Now()
	}
}

// Reading, with as many records as there are.
func BenchmarkRead(b *testing.B) {
	w, r := ring(b, Config{})
	out := make([]Record, 1024)
	for b.Loop() {
		for range len(out) {
			w.Post(1, 2, 3, 4, 5)
		}
		w.Flush()
		if n, err := r.Read(out); n != len(out) || err != nil {
			b.Fatal(n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(out)), "ns/record")
}
