// Package dmaguard stops a PCI function when the process that drives it is killed, for functions that neither an IOMMU nor the kernel stops: one that is driven
// through sysfs would go on writing to memory that is somebody else's by then.
//
// A guard is a process of its own, this program started again, which waits for the end of the first. It holds the memory that the function knows until the function is stopped, so
// that there is no moment in between. A guard that is killed together with the process it guards stops nothing: the next driver of the function does, before it takes memory.
package dmaguard

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/pcifn"
)

// name is what a guard is called. Its one argument is the function's address.
const name = "shadowbell-dma-guard"

// Files of a guard, beside stderr.
const (
	ordersFD = 3 + iota // a byte: all is in order; the end: the first process has ended
	readyFD             // gets a byte when the guard watches
	_                   // what it holds
)

const (
	// startLimit is for a guard to be ready.
	startLimit = 20 * time.Second
	// stopLimit is for the kernel to stop a function that VFIO has.
	stopLimit = 5 * time.Second
)

// init makes this process a guard if it was started as one. It is not left to main: a program that forgot it would run twice.
func init() {
	if len(os.Args) != 2 || os.Args[0] != name {
		return
	}
	// The guard outlives what ends the other: the terminal's keys and the service manager's signals are for that alone, and so is the kernel's need for memory.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0)               // for ps
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000\n"), 0) // it may not be allowed to
	os.Exit(guard(os.Args[1], os.NewFile(ordersFD, "orders"), os.NewFile(readyFD, "ready")))
}

func guard(address string, orders, ready *os.File) (exit int) {
	if _, err := ready.Write([]byte{1}); err != nil {
		return 1
	}
	ready.Close()
	var b [1]byte
	if n, _ := io.ReadFull(orders, b[:]); n == 1 {
		return 0
	}
	err := pcifn.StopDMA(address)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s: whoever drove it is gone, and it may go on writing to memory: %v\n", name, address, err)
		exit = 1
	}
	pcifn.AwaitStopped(address, stopLimit)
	if err == nil {
		fmt.Fprintf(os.Stderr, "%s: %s: whoever drove it is gone, and it reaches no memory any more\n", name, address)
	}
	return exit
}

// Guard watches this process.
type Guard struct {
	address string
	cmd     *exec.Cmd
	orders  *os.File
	ended   chan struct{} // closed when the guard has

	mu       sync.Mutex
	released bool
}

// Start starts a guard of the function at a PCI address. It keeps hold open until the function is stopped; the file stays the caller's. lost is called, by
// a goroutine of its own, if the guard ends before Release.
func Start(address string, hold *os.File, lost func(error)) (*Guard, error) {
	g, err := start(address, hold, lost)
	if err != nil {
		return nil, fmt.Errorf("the process that is to stop the device if this one is killed: %w", err)
	}
	return g, nil
}

func start(address string, hold *os.File, lost func(error)) (_ *Guard, err error) {
	theirOrders, orders, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirOrders.Close()
	ready, theirReady, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, orders.Close())
	}
	defer ready.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{name, address}
	cmd.Dir = "/"
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirOrders, theirReady, hold}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirReady.Close()
	if err != nil {
		return nil, errors.Join(err, orders.Close())
	}
	g := &Guard{address: address, cmd: cmd, orders: orders, ended: make(chan struct{})}
	var b [1]byte
	_ = ready.SetReadDeadline(time.Now().Add(startLimit))
	if _, err := io.ReadFull(ready, b[:]); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, errors.Join(fmt.Errorf("it has not begun within %v, or has died: %w", startLimit, err), orders.Close())
	}
	go g.watch(lost)
	return g, nil
}

func (g *Guard) watch(lost func(error)) {
	err := g.cmd.Wait()
	g.mu.Lock()
	released := g.released
	g.mu.Unlock()
	close(g.ended)
	if !released {
		lost(fmt.Errorf("%s: the process that would stop it if this one were killed has ended: %w", g.address, err))
	}
}

// Release ends the guard, which waits for that. stopped says that the function was stopped; otherwise the guard does it. It may be called again.
func (g *Guard) Release(stopped bool) error {
	g.mu.Lock()
	if g.released {
		g.mu.Unlock()
		return nil
	}
	g.released = true
	g.mu.Unlock()
	var err error
	if stopped {
		if _, err = g.orders.Write([]byte{1}); errors.Is(err, unix.EPIPE) {
			err = nil // it has ended, as lost was told
		}
	}
	err = errors.Join(err, g.orders.Close())
	<-g.ended
	return err
}
