package state

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type value struct {
	Count uint64
	Names []string
}

func open(t *testing.T, dir string) Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestSaveAndLoad(t *testing.T) {
	for name, s := range map[string]Store{"directory": open(t, filepath.Join(t.TempDir(), "state")), "memory": NewMemory()} {
		t.Run(name, func(t *testing.T) {
			v := value{Count: 7}
			if found, err := s.Load("a", &v); found || err != nil || v.Count != 7 {
				t.Fatalf("an empty store: %v %v %+v", found, err, v)
			}
			for _, want := range []value{{1 << 63, []string{"x"}}, {2, nil}} {
				if err := s.Save("a", want); err != nil {
					t.Fatal(err)
				}
				var got value
				if found, err := s.Load("a", &got); !found || err != nil || got.Count != want.Count || len(got.Names) != len(want.Names) {
					t.Errorf("%v %v %+v, want %+v", found, err, got, want)
				}
			}
			if found, err := s.Load("b", &v); found || err != nil {
				t.Errorf("another key: %v %v", found, err)
			}
			if err := s.Save("a", func() {}); err == nil {
				t.Error("a function was saved")
			}
			var got value
			if found, err := s.Load("a", &got); !found || err != nil || got.Count != 2 {
				t.Errorf("after a save that failed: %v %v %+v", found, err, got)
			}
		})
	}
}

func TestSurvivesReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.Save("ctrl-SB01", value{Count: 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "another hostmed") {
		t.Errorf("a second user: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var v value
	if found, err := open(t, dir).Load("ctrl-SB01", &v); !found || err != nil || v.Count != 3 {
		t.Errorf("%v %v %+v", found, err, v)
	}
}

func TestKeys(t *testing.T) {
	outside := t.TempDir()
	for name, s := range map[string]Store{"directory": open(t, filepath.Join(outside, "in")), "memory": NewMemory()} {
		for _, key := range []string{"", ".", "..", ".lock", "../x", "a/b", "/etc/passwd", "a\x00b", "a b", "ä", "a\\b", strings.Repeat("x", maxKey+1)} {
			if err := s.Save(key, 1); err == nil {
				t.Errorf("%s: key %q was taken", name, key)
			}
			if _, err := s.Load(key, new(int)); err == nil {
				t.Errorf("%s: key %q was looked for", name, key)
			}
		}
		for _, key := range []string{"a", "A.b-c_9", strings.Repeat("x", maxKey)} {
			if err := s.Save(key, 1); err != nil {
				t.Errorf("%s: key %q: %v", name, key, err)
			}
		}
	}
	if es, err := os.ReadDir(outside); err != nil || len(es) != 1 {
		t.Errorf("outside of the directory there is %v, %v", es, err)
	}
}

// What cannot be read is moved away and named; the next value takes its place.
func TestCorruptFile(t *testing.T) {
	good := `{"version":1,"key":"k","data":{"Count":1}}`
	for name, put := range map[string]func(path string) error{
		"cut":             func(p string) error { return os.WriteFile(p, []byte(good[:20]), 0o600) },
		"empty":           func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"garbage behind":  func(p string) error { return os.WriteFile(p, []byte(good+"x"), 0o600) },
		"another type":    func(p string) error { return os.WriteFile(p, []byte(`{"version":1,"key":"k","data":[1]}`), 0o600) },
		"another version": func(p string) error { return os.WriteFile(p, []byte(`{"version":2,"key":"k","data":{}}`), 0o600) },
		"another key":     func(p string) error { return os.WriteFile(p, []byte(`{"version":1,"key":"x","data":{}}`), 0o600) },
		"too large":       func(p string) error { return os.WriteFile(p, make([]byte, maxFileSize+1), 0o600) },
		"directory":       func(p string) error { return os.Mkdir(p, 0o700) },
		"symlink":         func(p string) error { return os.Symlink("/etc/hostname", p) },
		"fifo":            func(p string) error { return unix.Mkfifo(p, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			path := filepath.Join(dir, "k.json")
			if err := put(path); err != nil {
				t.Fatal(err)
			}
			var v value
			found, err := s.Load("k", &v)
			var c *CorruptError
			if found || !errors.As(err, &c) || c.Path != path || c.Moved != filepath.Join(dir, "k.corrupt") {
				t.Fatalf("%v %v", found, err)
			}
			if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.Moved) {
				t.Errorf("the error does not say what to do: %v", err)
			}
			if _, err := os.Lstat(c.Moved); err != nil {
				t.Error(err)
			}
			if found, err := s.Load("k", &v); found || err != nil {
				t.Errorf("the second time: %v %v", found, err)
			}
			if err := s.Save("k", value{Count: 9}); err != nil {
				t.Fatal(err)
			}
			if found, err := s.Load("k", &v); !found || err != nil || v.Count != 9 {
				t.Errorf("%v %v %+v", found, err, v)
			}
		})
	}
}

// A temporary file that a crash left is in nobody's way.
func TestStaleTemporary(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "k.json.tmp"), []byte("half"), 0o400); err != nil {
		t.Fatal(err)
	}
	if err := s.Save("k", 5); err != nil {
		t.Fatal(err)
	}
	var v int
	if found, err := s.Load("k", &v); !found || err != nil || v != 5 {
		t.Errorf("%v %v %d", found, err, v)
	}
	if _, err := os.Lstat(filepath.Join(dir, "k.json.tmp")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary file is left: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(dir, "no", "dir"), file} {
		if _, err := Open(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestConcurrentSaves(t *testing.T) {
	s := open(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 5 {
				if err := s.Save("k", value{Count: uint64(i)}); err != nil {
					t.Error(err)
				}
				var v value
				if found, err := s.Load("k", &v); !found || err != nil || v.Count > 7 {
					t.Errorf("%v %v %+v", found, err, v)
				}
			}
		})
	}
	wg.Wait()
}
