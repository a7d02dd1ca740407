package shm_test

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// shrunk returns a region whose peer has taken its memory away.
func shrunk(t testing.TB, size uint64) *shm.Region {
	t.Helper()
	fd := memfd(t, int64(size))
	r, err := shm.Map(fd, 0, size, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if err := r.Zero(0, size); err != nil {
		t.Fatal(err)
	}
	peer, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(peer)
	if err := unix.Ftruncate(peer, 0); err != nil {
		t.Fatal(err)
	}
	return r
}

// sink keeps the compiler from dropping a load.
var sink atomic.Uint64

// accesses are the ways in which this project touches shared memory.
var accesses = []struct {
	name string
	do   func(r *shm.Region)
}{
	{"Read", func(r *shm.Region) { _ = r.Read(8000, make([]byte, 400)) }},
	{"Write", func(r *shm.Region) { _ = r.Write(8000, make([]byte, 400)) }},
	{"Zero", func(r *shm.Region) { _ = r.Zero(0, r.Len()) }},
	{"load 32", func(r *shm.Region) { w, _ := r.Word32(4096); sink.Add(uint64(w.Load())) }},
	{"store 32", func(r *shm.Region) { w, _ := r.Word32(4096); w.Store(1) }},
	{"add 32", func(r *shm.Region) { w, _ := r.Word32(4096); w.Add(1) }},
	{"load 64", func(r *shm.Region) { w, _ := r.Word64(4096); sink.Add(w.Load()) }},
	{"swap 64", func(r *shm.Region) { w, _ := r.Word64(4096); w.CompareAndSwap(0, 1) }},
	{"copy out", func(r *shm.Region) { b, _ := r.Bytes(0, r.Len()); copy(make([]byte, len(b)), b) }},
	{"copy in", func(r *shm.Region) { b, _ := r.Bytes(0, r.Len()); copy(b, make([]byte, len(b))) }},
	{"index", func(r *shm.Region) { b, _ := r.Bytes(0, r.Len()); sink.Add(uint64(b[5000])) }},
}

func TestRule36_FaultBecomesError(t *testing.T) {
	notHeldMore(t)
	for _, a := range accesses {
		t.Run(a.name, func(t *testing.T) {
			r := shrunk(t, 16<<10)
			after := false
			err := shm.Guard(func() {
				a.do(r)
				after = true
			})
			var fault *shm.FaultError
			if !errors.As(err, &fault) || after {
				t.Fatalf("error %v, went on: %v", err, after)
			}
			begin := uintptr(r.Base())
			if fault.Addr < begin || fault.Addr >= begin+uintptr(r.Len()) {
				t.Errorf("fault at %#x, outside the region at %#x", fault.Addr, begin)
			}
			if !strings.Contains(err.Error(), "shrank") {
				t.Errorf("the error does not say what happened: %v", err)
			}
		})
	}
}

// Shrinking to less, and memory beyond the new end only.
func TestRule36_PartialShrink(t *testing.T) {
	notHeldMore(t)
	fd := memfd(t, 16<<10)
	r, err := shm.Map(fd, 0, 16<<10, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := unix.Ftruncate(fd, 8192); err != nil {
		t.Fatal(err)
	}
	if err := shm.Guard(func() { _ = r.Zero(0, 8192) }); err != nil {
		t.Errorf("below the new end: %v", err)
	}
	var fault *shm.FaultError
	err = shm.Guard(func() { _ = r.Zero(0, 8193) })
	if !errors.As(err, &fault) || fault.Addr != uintptr(r.Base())+8192 {
		t.Errorf("at the new end: %v, region at %p", err, r.Base())
	}
}

// What is a bug in our own code stays a panic.
func TestRule36_OtherPanicsGoOn(t *testing.T) {
	var nothing *struct{ a, b uint64 }
	var empty []byte
	five := 5
	mine := errors.New("mine")
	for _, c := range []struct {
		name string
		f    func()
		want func(p any) bool
	}{
		{"nil dereference", func() { sink.Add(nothing.b) }, isRuntimeError("nil pointer")},
		{"index out of range", func() { sink.Add(uint64(empty[five])) }, isRuntimeError("index out of range")},
		{"slice out of range", func() { sink.Add(uint64(len(empty[five:]))) }, isRuntimeError("slice bounds")},
		{"division by zero", func() { sink.Add(uint64(five / len(empty))) }, isRuntimeError("divide by zero")},
		{"own value", func() { panic(mine) }, func(p any) bool { return p == any(mine) }},
		{"nested", func() { _ = shm.Guard(func() { panic("inner") }) }, func(p any) bool { return p == "inner" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer func() {
				if p := recover(); p == nil || !c.want(p) {
					t.Errorf("panic %v", p)
				}
				if debug.SetPanicOnFault(false) {
					t.Error("the guard is still on after a panic")
				}
			}()
			err := shm.Guard(c.f)
			t.Errorf("Guard returned %v", err)
		})
	}
}

func isRuntimeError(text string) func(any) bool {
	return func(p any) bool {
		e, ok := p.(runtime.Error)
		return ok && strings.Contains(e.Error(), text)
	}
}

func TestRule36_GuardsNest(t *testing.T) {
	r := shrunk(t, 4096)
	touch := func() { _ = r.Zero(0, 1) }
	var inner, second error
	outer := shm.Guard(func() {
		inner = shm.Guard(touch)
		if err := shm.Guard(func() {}); err != nil {
			t.Error(err)
		}
		second = shm.Guard(touch)
		touch() // the outer guard still holds
		t.Error("went on after a fault")
	})
	var fault *shm.FaultError
	for _, err := range []error{inner, second, outer} {
		if !errors.As(err, &fault) {
			t.Errorf("%v", err)
		}
	}
	if debug.SetPanicOnFault(false) {
		t.Error("the guard is still on afterwards")
	}
	if err := shm.Guard(func() {}); err != nil {
		t.Error(err)
	}
}

// Goexit, which t.FailNow uses, passes through a guard and leaves it off.
func TestRule36_Goexit(t *testing.T) {
	done := make(chan bool)
	go func() {
		defer func() { done <- debug.SetPanicOnFault(false) }()
		_ = shm.Guard(runtime.Goexit)
	}()
	if <-done {
		t.Error("the guard is still on")
	}
}

// Each goroutine has its own guard; faults on several at once stay apart.
func TestRule36_ManyGoroutines(t *testing.T) {
	bad := shrunk(t, 4096)
	good := shm.NewHeap(4096)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				r := good
				if i%2 == 0 {
					r = bad
				}
				err := shm.Guard(func() {
					w, _ := r.Word32(uint64(i) * 8)
					w.Add(1)
				})
				if (err != nil) != (r == bad) {
					t.Errorf("goroutine %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A peer shrinks and enlarges its memory while we work on it.
func TestRule36_TruncationUnderLoad(t *testing.T) {
	notHeldMore(t)
	const size = 256 << 10
	fd := memfd(t, size)
	r, err := shm.Map(fd, 0, size, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var stop atomic.Bool
	var faults, whole atomic.Uint64
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			private := make([]byte, size)
			for !stop.Load() {
				err := shm.Guard(func() {
					b, _ := r.Bytes(0, size)
					if i == 0 {
						copy(private, b)
					} else {
						copy(b, private)
					}
					w, _ := r.Word64(size - 8)
					w.Add(1)
				})
				if err != nil {
					faults.Add(1)
				} else {
					whole.Add(1)
				}
			}
		})
	}
	deadline := time.Now().Add(10 * time.Second)
	for round := 0; round < 20 || (faults.Load() == 0 || whole.Load() == 0) && time.Now().Before(deadline); round++ {
		if err := unix.Ftruncate(fd, int64(round%5)*4096); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Microsecond)
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Microsecond)
	}
	stop.Store(true)
	wg.Wait()
	if faults.Load() == 0 || whole.Load() == 0 {
		t.Errorf("%d faults, %d rounds without", faults.Load(), whole.Load())
	}
}

// Without the guard the same access ends the process: the guard is what saves it.
func TestRule36_WithoutGuardTheProcessDies(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), roleEnv+"=unguarded", "GOTRACEBACK=none")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("the process lived: %v\n%s", err, out)
	}
	if s := exit.Sys().(syscall.WaitStatus); !strings.Contains(string(out), "SIGBUS") && s.Signal() != syscall.SIGBUS {
		t.Errorf("the process ended otherwise: %v\n%s", err, out)
	}
}

// faultUnguarded is what that process does.
func faultUnguarded() {
	fd, err := unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC)
	if err != nil {
		panic(err)
	}
	if err := unix.Ftruncate(fd, 4096); err != nil {
		panic(err)
	}
	r, err := shm.Map(fd, 0, 4096, true)
	if err != nil {
		panic(err)
	}
	if err := unix.Ftruncate(fd, 0); err != nil {
		panic(err)
	}
	_ = r.Write(0, []byte("x"))
}

func BenchmarkGuard(b *testing.B) {
	for b.Loop() {
		_ = shm.Guard(func() {})
	}
}
