package events

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kinds of memory that the same tests run on: the race detector sees only the heap.
func onEachKind(t *testing.T, f func(t *testing.T, c Config)) {
	t.Run("heap", func(t *testing.T) { f(t, Config{Heap: true}) })
	t.Run("memfd", func(t *testing.T) { f(t, Config{}) })
}

// ring returns both ends of a ring.
func ring(t testing.TB, c Config) (*Writer, *Reader) {
	t.Helper()
	w, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	var r *Reader
	if c.Heap {
		r, err = NewReader(w.mem)
	} else if r, err = Map(w.FD()); err == nil {
		t.Cleanup(func() { r.Close() })
	}
	if err != nil {
		t.Fatal(err)
	}
	return w, r
}
