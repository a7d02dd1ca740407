package inproc_test

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// TestMain wants nothing left of all that the tests opened: no goroutine, no descriptor, no mapping of shared memory.
func TestMain(m *testing.M) {
	// Parallel tests wait for deadlines to pass most of the time.
	_ = flag.Set("test.parallel", "6")
	warm()
	before := descriptors()
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		for name, n := range descriptors() {
			if n > before[name] {
				fmt.Fprintf(os.Stderr, "descriptors left: %d of %s\n", n-before[name], name)
				code = 1
			}
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		for line := range strings.Lines(string(maps)) {
			if strings.Contains(line, "memfd:") {
				fmt.Fprintf(os.Stderr, "mapping left: %s", line)
				code = 1
			}
		}
	}
	os.Exit(code)
}

// warm makes the runtime open what it opens once.
func warm() {
	r, w, err := os.Pipe()
	if err == nil {
		r.Close()
		w.Close()
	}
	runtime.GC()
}

// descriptors counts the open descriptors by what they are.
func descriptors() map[string]int {
	n := map[string]int{}
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, e := range dir {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // not the one of ReadDir
			kind, _, _ := strings.Cut(name, ":")
			n[kind]++
		}
	}
	return n
}
