package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Each limit stands once, in order, and has its reason.
func TestBoundsTable(t *testing.T) {
	seen := map[int]bool{}
	for _, b := range Bounds() {
		if !strings.HasPrefix(b.Name, "RLIMIT_") || b.Limit == "" || len(strings.Fields(b.Why)) < 4 || seen[b.which] {
			t.Errorf("%+v", b)
		}
		seen[b.which] = true
	}
	if !slices.IsSortedFunc(Bounds(), func(a, b Bound) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("not sorted")
	}
}

func TestLimits(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			out := run(t, who, "limits", "")
			if want := "limits: new fds below 20 only, no core file, files up to 100 bytes"; !strings.Contains(out, want) {
				t.Errorf("no %q in\n%s", want, out)
			}
			wants := map[string]string{
				"Max core file size": "0 0", "Max file size": "100 100", "Max open files": "20 20", "Max locked memory": "0 0",
				"Max msgqueue size": "0 0", "Max pending signals": "64 64",
			}
			if ordinary := who != nil || os.Getuid() != 0; ordinary && kernelAtLeast(5, 14) {
				wants["Max processes"] = "100 100"
			}
			for line, want := range wants {
				_, rest, _ := strings.Cut(out, line)
				if f := strings.Fields(rest); len(f) < 2 || f[0]+" "+f[1] != want {
					t.Errorf("%s: %.60q, want %s", line, rest, want)
				}
			}
		})
	}
}

// roleLimits looks at what the limits say and do.
func roleLimits(string) {
	Reexec(Options{})
	file := os.NewFile(uintptr(must(unix.MemfdCreate("file", unix.MFD_CLOEXEC))), "file")
	limits := must(os.Open("/proc/self/limits"))
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGXFSZ)
	r := must(Enter(Policy{MaxFD: 20, FileSize: 100, Threads: 100, Uses: []Use{FileWrites(int(file.Fd()))}}))
	if _, err := file.WriteAt(make([]byte, 8), 200); !errors.Is(err, unix.EFBIG) {
		die("write past the limit:", err)
	}
	<-c
	fmt.Println(r)
	_, _ = must(os.Stdout.Write(must(io.ReadAll(limits)))), limits.Close()
}

// Memory beyond the limit is refused, and the runtime then ends the process.
func TestMemoryIsBounded(t *testing.T) {
	c := start(t, nil, "memory", "")
	ws := c.wait(t)
	if cgoLinked {
		if ws != 0 {
			t.Errorf("%v: %s", ws, c.err.String())
		}
		return
	}
	if ws.ExitStatus() != 2 || c.out.String() != "refused\n" || !strings.Contains(c.err.String(), "out of memory") {
		t.Errorf("%v: %s%.2000s", ws, c.out.String(), c.err.String())
	}
}

func roleMemory(string) {
	box(Policy{Memory: 96 << 20})
	_, err := unix.Mmap(-1, 0, 128<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if cgoLinked {
		return
	}
	if !errors.Is(err, unix.ENOMEM) {
		die("128 MiB:", err)
	}
	fmt.Println("refused")
	var keep [][]byte
	for range 32 {
		keep = append(keep, make([]byte, 16<<20))
	}
	fmt.Println("have", len(keep))
}

// The machine's root has as many threads as it likes; its ordinary users have not.
func TestThreadsAreBounded(t *testing.T) {
	for name, who := range users() {
		c := start(t, who, "threads", "")
		ws := c.wait(t)
		bounded := (who != nil || os.Getuid() != 0) && kernelAtLeast(5, 14)
		// libc gives up by ways of its own, some of which the box does not let through.
		refused := ws != 0 && (cgoLinked || strings.Contains(c.err.String(), "failed to create new OS thread"))
		if bounded != refused || !bounded && ws != 0 {
			t.Errorf("%s: %v: %.2000s", name, ws, c.err.String())
		}
	}
}

func roleThreads(string) {
	box(Policy{Threads: 40})
	up := make(chan bool)
	for range 60 {
		go func() {
			runtime.LockOSThread()
			up <- true
			select {}
		}()
	}
	for range 60 {
		<-up
	}
}

func TestLimitParsers(t *testing.T) {
	if n, ok := vmData([]byte("Name:\tx\nVmData:\t    1234 kB\n")); n != 1234<<10 || !ok {
		t.Error(n, ok)
	}
	for _, bad := range []string{"", "VmData:\tx kB\n", "VmData:\t-1 kB\n"} {
		if n, ok := vmData([]byte(bad)); ok {
			t.Errorf("%q: %d", bad, n)
		}
	}
	for release, want := range map[string]bool{"5.14.0": true, "5.13.9-rc1": false, "6.1.0-18-amd64": true, "4.19": false, "x": false, "": false} {
		if got := releaseAtLeast(release, 5, 14); got != want {
			t.Errorf("%q: %v", release, got)
		}
	}
}
