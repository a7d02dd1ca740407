package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// TestGeneratedIsCurrent compiles anew and compares with what is committed: byte for byte, since the compiler is pinned.
func TestGeneratedIsCurrent(t *testing.T) {
	ci := os.Getenv("CI") == "true"
	if testing.Short() && !ci {
		t.Skip("fetches a compiler: not with -short")
	}
	if runtime.GOARCH != "amd64" && !ci {
		t.Skip("the pinned clang needs an x86-64 machine")
	}
	dir := filepath.Join("..", "..", "ebpf", "bpf")
	out := t.TempDir()
	if err := generate(t.Context(), dir, out, os.Stderr); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(out)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 { // Go and an object for each architecture
		t.Fatalf("generated %v", files)
	}
	for _, f := range files {
		want, err := os.ReadFile(filepath.Join(out, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, f.Name())); err != nil || !bytes.Equal(got, want) {
			t.Errorf("ebpf/bpf/%s is not what its C compiles to: make gen, and commit (%v)", f.Name(), err)
		}
	}
}
