package events

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestNoRing(t *testing.T) {
	for name, spoil := range map[string]func(b []byte) []byte{
		"empty":                func([]byte) []byte { return nil },
		"short":                func(b []byte) []byte { return b[:headerSize-1] },
		"header only":          func(b []byte) []byte { return b[:headerSize] },
		"one record short":     func(b []byte) []byte { return b[:len(b)-RecordSize] },
		"another magic":        func(b []byte) []byte { b[0]++; return b },
		"another version":      func(b []byte) []byte { b[8]++; return b },
		"another record size":  func(b []byte) []byte { b[12] = 64; return b },
		"no records":           func(b []byte) []byte { binary.LittleEndian.PutUint32(b[16:], 0); return b },
		"no power of two":      func(b []byte) []byte { binary.LittleEndian.PutUint32(b[16:], MinRecords-1); return b },
		"too few records":      func(b []byte) []byte { binary.LittleEndian.PutUint32(b[16:], MinRecords/2); return b },
		"too many records":     func(b []byte) []byte { binary.LittleEndian.PutUint32(b[16:], MaxRecords*2); return b },
		"nothing ahead":        func(b []byte) []byte { binary.LittleEndian.PutUint32(b[20:], 0); return b },
		"all of it ahead":      func(b []byte) []byte { binary.LittleEndian.PutUint32(b[20:], MinRecords); return b },
		"more ahead than fits": func(b []byte) []byte { binary.LittleEndian.PutUint32(b[20:], math.MaxUint32); return b },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ring")
			w, err := Create(path, Config{Records: MinRecords})
			if err != nil {
				t.Fatal(err)
			}
			w.Close()
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, spoil(b), 0o600); err != nil {
				t.Fatal(err)
			}
			if r, err := Open(path); !errors.Is(err, ErrFormat) {
				t.Errorf("%v, %v", r, err)
			}
		})
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrFormat) {
		t.Errorf("a directory: %v", err)
	}
	if _, err := Open(filepath.Join(t.TempDir(), "nothing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Map(-1); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	if _, err := Map(p[0]); !errors.Is(err, ErrFormat) {
		t.Errorf("a pipe: %v", err)
	}
}

// What the ring said when it was opened counts, whatever the header says later.
func TestHeaderIsReadOnce(t *testing.T) {
	w, r := ring(t, Config{Heap: true, Records: MinRecords})
	all := words(w.mem)
	for i := range all[:writtenWord] {
		all[i] = math.MaxUint64
	}
	for range 3 * MinRecords {
		w.Post(1, 2, 3, 4, 5)
	}
	w.Flush()
	out := make([]Record, 2*MinRecords)
	if n, err := r.Read(out); n != MinRecords-Ahead || err != nil {
		t.Errorf("%d records: %v", n, err)
	}
}

func TestImpossiblePositions(t *testing.T) {
	w, r := ring(t, Config{Heap: true, Records: MinRecords})
	out := make([]Record, 10)
	w.Post(1, 2, 3, 4, 5)
	w.Flush()
	if n, err := r.Read(out); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	store(w.written, math.MaxUint64) // far ahead: all but the last ones are lost
	if n, err := r.Read(out); n != 10 || err != nil || r.Lost() != math.MaxUint64-(MinRecords-Ahead)-1 {
		t.Errorf("%d records, %d lost: %v", n, r.Lost(), err)
	}
	store(w.written, 3)
	for range 2 {
		if n, err := r.Read(out); n != 0 || !errors.Is(err, ErrProducer) {
			t.Errorf("%d records: %v", n, err)
		}
	}
}

// The file is taken away under the reader.
func TestShrunkRing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ring")
	w, err := Create(path, Config{Records: MinRecords})
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for range 500 {
		w.Post(1, 2, 3, 4, 5)
	}
	w.Close()
	var fault *shm.FaultError
	if err := os.Truncate(path, headerSize); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]Record, 10)); n != 0 || !errors.As(err, &fault) {
		t.Errorf("%d records: %v", n, err)
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Skip(); !errors.As(err, &fault) {
		t.Errorf("Skip: %v", err)
	}
}

func FuzzReader(f *testing.F) {
	w, err := New(Config{Heap: true, Records: MinRecords})
	if err != nil {
		f.Fatal(err)
	}
	for i := range int64(1500) {
		w.Fetch(i, 2, 3, 4, 5, 6, 7)
	}
	w.Flush()
	seed, _ := w.mem.Bytes(0, 2*headerSize)
	f.Add(seed[:256], seed[headerSize:], uint64(2000))
	f.Add([]byte{}, []byte{0xff, 1}, uint64(0))
	f.Fuzz(func(t *testing.T, header, content []byte, later uint64) {
		mem := shm.NewHeap(headerSize + MinRecords*RecordSize)
		_ = mem.Write(0, header[:min(len(header), headerSize)])
		_ = mem.Write(headerSize, content[:min(len(content), MinRecords*RecordSize)])
		r, err := NewReader(mem)
		if err != nil {
			return
		}
		out := make([]Record, 300)
		for range 10 {
			n, err := r.Read(out)
			if n < 0 || n > len(out) {
				t.Fatalf("%d records: %v", n, err)
			}
			for i := range out[:n] {
				_ = out[i].Kind.String()
			}
			store(r.written, later)
		}
	})
}
