package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
)

// corners does in the box what the runtime does seldom, and what a run of a second need not show.
func corners() {
	sandbox.Reexec(sandbox.Options{})
	pr, pw, err := os.Pipe()
	if err != nil {
		fatal(err)
	}
	sigs := make(chan os.Signal, 1)
	if _, err := sandbox.Enter(sandbox.Policy{RequireNamespaces: true}); err != nil {
		fatal(err)
	}

	// Threads that end, and goroutines that take turns.
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			time.Sleep(time.Millisecond)
		})
	}
	for range 2000 {
		wg.Go(runtime.Gosched)
	}
	wg.Wait()

	// A heap that grows and is given back, while goroutines that never call anything are preempted by signals.
	var enough atomic.Bool
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for !enough.Load() {
			}
		})
	}
	var keep [][]byte
	for begin, given := time.Now(), 0; given < 3 || time.Since(begin) < 300*time.Millisecond; {
		if keep = append(keep, make([]byte, 1<<20)); len(keep) > 100 {
			keep = nil
			debug.FreeOSMemory()
			given++
		}
	}
	enough.Store(true)
	wg.Wait()
	runtime.SetDefaultGOMAXPROCS() // looks at the CPUs and the cgroup again

	// The poller, with a deadline.
	if err := pr.SetReadDeadline(time.Now().Add(5 * time.Millisecond)); err != nil {
		fatal(err)
	}
	_, _ = pr.Read(make([]byte, 1))
	go func() { time.Sleep(time.Millisecond); _ = pw.Close() }()
	_ = pr.SetReadDeadline(time.Time{})
	_, _ = pr.Read(make([]byte, 1))
	_ = pr.Close()

	// A signal that is taken, and a fault that is caught.
	signal.Notify(sigs, unix.SIGUSR1)
	if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
		fatal(err)
	}
	<-sigs
	func() {
		defer func() { _ = recover() }()
		var p *int
		*p = 1
	}()

	_, _ = rand.Read(make([]byte, 64))
	_ = time.Now().Local().String()
	fmt.Println("done")

	// The end that a program has which does not catch a signal.
	signal.Reset()
	_ = syscall.Kill(os.Getpid(), unix.SIGTERM)
	time.Sleep(time.Minute)
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "census:", err)
	os.Exit(3)
}
