package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

// memory is a namespace on the heap. Like the real one it refuses what is not full blocks.
type memory struct {
	mu        sync.Mutex
	data      []byte
	blockSize int
	flushes   int
	failAt    int64 // every access of this offset fails; -1: none
}

var errBroken = errors.New("broken")

func (m *memory) access(p []byte, off int64, move func(at []byte)) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(p)%m.blockSize != 0 || off%int64(m.blockSize) != 0 || off < 0 || off+int64(len(p)) > int64(len(m.data)) {
		return 0, errors.New("not full blocks of the namespace")
	}
	if m.failAt >= off && m.failAt < off+int64(len(p)) {
		return 0, errBroken
	}
	move(m.data[off:])
	return len(p), nil
}

func (m *memory) ReadAtContext(_ context.Context, p []byte, off int64) (int, error) {
	return m.access(p, off, func(at []byte) { copy(p, at) })
}

func (m *memory) WriteAtContext(_ context.Context, p []byte, off int64) (int, error) {
	return m.access(p, off, func(at []byte) { copy(at, p) })
}

func (m *memory) Flush(context.Context) error { m.flushes++; return nil }
func (m *memory) Size() int64                 { return int64(len(m.data)) }
func (m *memory) BlockSize() int              { return m.blockSize }

func newMemory(blocks, blockSize int) *memory {
	m := &memory{data: make([]byte, blocks*blockSize), blockSize: blockSize, failAt: -1}
	for i := range m.data {
		m.data[i] = byte(i*31 + i>>8)
	}
	return m
}

func buffers(n, size int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = bytes.Repeat([]byte{0xAA}, size)
	}
	return out
}

func ignore(int64) {}

// TestCopyIsExact: whatever the range, exactly its bytes are read, and exactly its bytes are changed.
func TestCopyIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bs := rapid.SampledFrom([]int{512, 4096}).Draw(t, "block")
		m := newMemory(40, bs)
		bufs := buffers(rapid.IntRange(1, 4).Draw(t, "buffers"), bs*rapid.IntRange(1, 5).Draw(t, "blocks of a buffer"))
		off := rapid.Int64Range(0, m.Size()).Draw(t, "offset")
		length := rapid.Int64Range(0, m.Size()-off).Draw(t, "length")

		var got bytes.Buffer
		told := int64(0)
		if err := readRange(context.Background(), m, &got, off, length, bufs, func(n int64) { told += n }); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), m.data[off:off+length]) || told != length {
			t.Fatalf("read %d bytes from %d: %d came, %d were told of", length, off, got.Len(), told)
		}

		want := bytes.Clone(m.data)
		fresh := bytes.Repeat([]byte("fresh"), int(length)/5+1)[:length]
		copy(want[off:], fresh)
		limit := length
		var in io.Reader = bytes.NewReader(fresh)
		if rapid.Bool().Draw(t, "until the input ends") {
			limit = -1
		}
		if rapid.Bool().Draw(t, "byte by byte") {
			in = iotest.OneByteReader(in)
		}
		told = 0
		if err := writeRange(context.Background(), m, in, off, limit, bufs, func(n int64) { told += n }); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.data, want) || told != length || m.flushes != 1 {
			t.Fatalf("write of %d bytes at %d: wrong contents, or %d told of, or %d flushes", length, off, told, m.flushes)
		}
	})
}

func TestReadToTheEnd(t *testing.T) {
	m := newMemory(10, 512)
	var got bytes.Buffer
	if err := readRange(context.Background(), m, &got, 100, -1, buffers(2, 1024), ignore); err != nil || !bytes.Equal(got.Bytes(), m.data[100:]) {
		t.Errorf("%d bytes, %v", got.Len(), err)
	}
}

func TestCopyErrors(t *testing.T) {
	ctx := context.Background()
	input := func(n int) io.Reader { return bytes.NewReader(make([]byte, n)) }
	for name, c := range map[string]struct {
		run  func(*memory) error
		says string
	}{
		"read fails": {func(m *memory) error {
			m.failAt = 3000
			return readRange(ctx, m, io.Discard, 0, -1, buffers(3, 512), ignore)
		}, "reading at offset 2560: broken"},
		"write fails": {func(m *memory) error {
			m.failAt = 3000
			return writeRange(ctx, m, input(5120), 0, -1, buffers(3, 512), ignore)
		}, "writing at offset 2560: broken"},
		"the rest of the last block cannot be read": {func(m *memory) error {
			m.failAt = 600
			return writeRange(ctx, m, input(600), 0, -1, buffers(1, 1024), ignore)
		}, "the block at offset 512"},
		"input is too short": {func(m *memory) error { return writeRange(ctx, m, input(10), 0, 20, buffers(2, 512), ignore) }, "ended after 10 bytes, 20 were"},
		"input is too long":  {func(m *memory) error { return writeRange(ctx, m, input(5121), 0, -1, buffers(2, 512), ignore) }, "the namespace ends at 5 KiB"},
		"input fails": {func(m *memory) error {
			return writeRange(ctx, m, iotest.ErrReader(errBroken), 0, -1, buffers(2, 512), ignore)
		}, "reading the input: broken"},
		"output fails": {func(m *memory) error { return readRange(ctx, m, brokenWriter{}, 0, -1, buffers(2, 512), ignore) }, "broken"},
	} {
		m := newMemory(10, 512)
		if err := c.run(m); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want %q", name, err, c.says)
		}
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func TestCopyEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m := newMemory(10, 512)
	if err := readRange(ctx, m, io.Discard, 0, -1, buffers(2, 512), ignore); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	if err := writeRange(ctx, m, bytes.NewReader(m.data), 0, -1, buffers(2, 512), ignore); !errors.Is(err, context.Canceled) || m.flushes != 0 {
		t.Errorf("write: %v, %d flushes", err, m.flushes)
	}
}
