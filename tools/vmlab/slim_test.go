package vmlab

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestSlim: fio without its engines for networks names only what is left, and runs with nothing else at hand.
func TestSlim(t *testing.T) {
	lab := Open(t)
	dir := t.TempDir()
	program := filepath.Join(dir, "fio")
	if err := slimFile(filepath.Join(lab.root(), guestFio), program, guestFioWithout); err != nil {
		t.Fatal(err)
	}
	libraries, err := needed(program)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []string{"libaio.so.1t64", "libc.so.6"} {
		if !slices.Contains(libraries, l) {
			t.Errorf("%s is gone: %v", l, libraries)
		}
	}
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.ImportedSymbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range symbols {
		if slices.Contains(guestFioWithout, s.Library) {
			t.Errorf("%s of %s is still looked for", s.Name, s.Library)
		}
	}
	all := closure{root: lab.root(), have: map[string]bool{}, instead: map[string]string{guestFio: program}}
	all.link = func(name, target string) error { return os.Symlink(target, filepath.Join(dir, filepath.Base(name))) }
	all.file = func(name, from string) error {
		if name == guestFio {
			return nil
		}
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, filepath.Base(name)), b, 0o755)
	}
	if err := all.add(guestFio); err != nil {
		t.Fatal(err)
	}
	for name := range all.have {
		if strings.Contains(name, "libceph") {
			t.Errorf("%s came along", name)
		}
	}
	cmd := exec.Command(filepath.Join(dir, loader), "--library-path", dir, program, "--name=x", "--filename=data", "--size=64k", "--rw=randwrite",
		"--bs=4k", "--ioengine=libaio", "--iodepth=4", "--verify=crc32c", "--minimal")
	cmd.Dir = dir // where fio leaves the state of its verify
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSlimRefuses(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe") // static: needs nothing
	if err != nil {
		t.Fatal(err)
	}
	if out, err := slim(self, guestFioWithout); err != nil || !bytes.Equal(out, self) {
		t.Errorf("a program that needs none of the libraries: %v", err)
	}
	if _, err := slim([]byte("#!/bin/sh\n"), guestFioWithout); err == nil {
		t.Error("a script was taken")
	}
}
