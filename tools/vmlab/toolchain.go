package vmlab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// toolchainVersion is recipeVersion for the toolchain.
const toolchainVersion = 1

// toolchainPackages compile programs for the kernel. The compiler's release is in the names: another would write other code.
var toolchainPackages = []string{"clang-19", "llvm-19", "libbpf-dev"}

// Toolchain is Debian's clang with llvm-strip and libbpf's headers, unpacked like QEMU and run by its own loader: one version, whatever the machine
// has, so that objects are the same wherever they are made.
type Toolchain struct{ dir string }

// OpenToolchain makes the toolchain if need be, with a line on log for each step, beside the labs in the cache.
func OpenToolchain(ctx context.Context, log io.Writer) (*Toolchain, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("the pinned clang needs an x86-64 machine, this is %s", runtime.GOARCH)
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	t := &Toolchain{filepath.Join(cache, "clang-"+toolchainKey())}
	return t, inCache(ctx, t.dir, log, func(ctx context.Context) error { return t.make(ctx, log) })
}

func toolchainKey() string {
	sum := sha256.Sum256(fmt.Append(nil, toolchainVersion, suite, toolchainPackages, clangDir))
	return hex.EncodeToString(sum[:])[:16]
}

// make builds it beside its place and renames it. The lock is held.
func (t *Toolchain) make(ctx context.Context, log io.Writer) error {
	tmp := t.dir + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	begin := time.Now()
	b := &build{ctx: ctx, dir: tmp, root: filepath.Join(tmp, "root")}
	for _, step := range []func() error{
		b.lists,
		func() error { return b.fetch("tools", toolchainPackages...) },
		func() error { return b.extract("tools", b.root) },
		func() error { return os.RemoveAll(b.apt("")) },
		func() error { return t.wrap(tmp) },
		func() error { return os.Rename(tmp, t.dir) },
	} {
		if err := step(); err != nil {
			return errors.Join(fmt.Errorf("set-up of clang: %w", err), os.RemoveAll(tmp))
		}
	}
	fmt.Fprintf(log, "vmlab: clang ready after %.1f s\n", time.Since(begin).Seconds())
	return nil
}

const clangDir = "usr/lib/llvm-19"

// wrap writes a script for each program, for tools that want the path of one: by the final place of the tree.
func (t *Toolchain) wrap(tmp string) error {
	for name, real := range map[string]string{"clang": "clang", "llvm-strip": "llvm-objcopy"} {
		cmd := program(filepath.Join(t.dir, "root"), filepath.Join(clangDir, "bin", real))
		at := len(cmd.Args) - 2 // the name that it goes by, before its path
		cmd.Args[at] = name
		script := "#!/bin/sh\nexec '" + strings.Join(cmd.Args, "' '") + "' \"$@\"\n"
		if err := os.WriteFile(filepath.Join(tmp, name), []byte(script), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Clang is the path of the compiler.
func (t *Toolchain) Clang() string { return filepath.Join(t.dir, "clang") }

// Strip is the path of llvm-strip.
func (t *Toolchain) Strip() string { return filepath.Join(t.dir, "llvm-strip") }

// Include is where <bpf/bpf_helpers.h> is.
func (t *Toolchain) Include() string { return filepath.Join(t.dir, "root/usr/include") }
