package backend

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// alterable returns a spec of each kind, and of a file on each kind of file system that is served in a way of its own.
func alterable(t *testing.T) map[string]string {
	specs := map[string]string{"null": "null:size=1MiB", "mem": "mem:size=1MiB", "file": "file:" + filepath.Join(t.TempDir(), "disk") + ",size=1MiB"}
	if dir, err := os.MkdirTemp("/dev/shm", "shadowbell-alter-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		specs["file in memory"] = "file:" + filepath.Join(dir, "disk") + ",size=1MiB"
	}
	return specs
}

func TestFormat(t *testing.T) {
	for name, spec := range alterable(t) {
		t.Run(name, func(t *testing.T) {
			b, err := Open(spec)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			a := b.(Alterable)
			was := b.Info()
			want := bytes.Repeat([]byte{0xa5}, 4096)
			transfer(t, b, OpWrite, 8192, want)
			for _, lba := range []uint32{4096, 512, 65536} {
				if err := a.Format(lba); err != nil {
					t.Fatal(err)
				}
				i := b.Info()
				if i.LBASize() != uint64(lba) || i.Size() != 1<<20 || i.UUID != was.UUID || i.NGUID != was.NGUID {
					t.Errorf("after a format with %d-byte blocks: %+v", lba, i)
				}
				got := bytes.Repeat([]byte{1}, 65536)
				transfer(t, b, OpRead, 0, got)
				if name != "null" && !bytes.Equal(got, make([]byte, 65536)) {
					t.Error("it does not read as zeroes")
				}
				transfer(t, b, OpWrite, 0, bytes.Repeat([]byte{0xa5}, 65536))
			}
			for _, lba := range []uint32{0, 256, 1000, 131072} {
				if err := a.Format(lba); err == nil || b.Info().LBASize() != 65536 {
					t.Errorf("block size %d: %v", lba, err)
				}
			}
		})
	}
}

// transfer does a request that must succeed, through a queue of its own.
func transfer(t *testing.T, b Backend, op Op, off uint64, data []byte) {
	t.Helper()
	mem := shm.NewHeap(len(data))
	p, err := mem.Bytes(0, uint64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	copy(p, data)
	q, err := b.NewQueue()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	r := &Request{Op: op, Off: off, Len: uint64(len(data)), Vec: []Seg{{Base: &p[0], Len: uint64(len(p))}}}
	done := make([]*Request, 1)
	for n := q.Submit([]*Request{r}, done); n == 0; {
		n = q.Reap(done)
	}
	if !r.Status.OK() {
		t.Fatalf("%v at %d: %v", op, off, r.Status)
	}
	copy(data, p)
}

func TestResize(t *testing.T) {
	for name, spec := range alterable(t) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(spec, ",size=1MiB"), "file:")
		if !ok {
			continue
		}
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			b, err := Open("file:" + path)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			a := b.(Alterable)
			was := b.Info()
			if a.Resized() {
				t.Error("resized, it says, and nobody did")
			}
			if err := os.Truncate(path, 4<<20); err != nil {
				t.Fatal(err)
			}
			if !a.Resized() {
				t.Error("it does not see that the file has grown")
			}
			if err := a.Resize(); err != nil {
				t.Fatal(err)
			}
			if i := b.Info(); i.Size() != 4<<20 || i.UUID != was.UUID || a.Resized() {
				t.Errorf("%+v", i)
			}
			want := bytes.Repeat([]byte{0x5a}, 4096)
			transfer(t, b, OpWrite, 3<<20, want)
			got := make([]byte, 4096)
			transfer(t, b, OpRead, 3<<20, got)
			if !bytes.Equal(got, want) {
				t.Error("the new part does not keep data")
			}
			if err := os.Truncate(path, 1000); err != nil {
				t.Fatal(err)
			}
			if err := a.Resize(); err == nil || !strings.Contains(err.Error(), "multiple") || b.Info().Size() != 4<<20 {
				t.Errorf("a size that is no multiple: %v", err)
			}
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
			if err := a.Resize(); err == nil || b.Info().Size() != 4<<20 {
				t.Errorf("nothing left: %v", err)
			}
		})
	}
}
