package sandbox

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A program that drives queues must run to its end in the box.
func TestWorkloadRuns(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			path := testBinary + "." + name
			l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = errors.Join(unix.Close(l), os.Remove(path)) }()
			if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: path}), unix.Listen(l, 1), os.Chmod(path, 0o666)); err != nil {
				t.Fatal(err)
			}
			c := start(t, who, "work", path)
			// The socket is connected before Enter and echoes after it.
			peer, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Close(peer) }()
			buf := make([]byte, 64)
			for {
				n, err := unix.Read(peer, buf)
				if n <= 0 || err != nil {
					break
				}
				if _, err := unix.Write(peer, buf[:n]); err != nil {
					t.Error(err)
				}
			}
			ws := c.wait(t)
			if out := c.out.String(); ws != 0 || !strings.HasSuffix(out, "done\n") {
				t.Errorf("ended with %v\n%s%s", ws, out, c.err.String())
			}
		})
	}
}

// work is what roleWork holds open.
type work struct {
	conn, ev *os.File
	socket   int // conn's
	pr, pw   *os.File
	file     *os.File
	pair     [2]int
	stat     *os.File
	memfd    int
	sigs     chan os.Signal
}

func roleWork(path string) {
	Reexec(Options{})
	w := openWork(path)
	// Threads from before: each must find the filter on itself.
	const old = 8
	var parked sync.WaitGroup
	release := make(chan struct{})
	results := make(chan error, old+2)
	parked.Add(old + 2)
	// One that sits in a system call during Enter, and one that spins.
	blocked := must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	go func() {
		runtime.LockOSThread()
		parked.Done()
		_, err := unix.Read(blocked[0], make([]byte, 1))
		results <- errors.Join(err, threadIsShut())
	}()
	var stop atomic.Bool
	go func() {
		runtime.LockOSThread()
		parked.Done()
		for !stop.Load() {
		}
		results <- threadIsShut()
	}()
	for range old {
		go func() {
			runtime.LockOSThread()
			parked.Done()
			<-release
			results <- threadIsShut()
		}()
	}
	parked.Wait()

	enterAll(Policy{MapFDs: []int{w.memfd}, Uses: []Use{
		VFIOUser(w.socket), VFIOUser(w.pair[0]), VFIOUser(w.pair[1]), FileWrites(int(w.file.Fd())),
	}})
	close(release)
	stop.Store(true)
	must(unix.Write(blocked[1], []byte("x")))
	for range old + 2 {
		_ = must(0, <-results)
	}
	for _, step := range []struct {
		name string
		do   func(*work) error
	}{
		{"threads", workThreads}, {"timers and GC", workTimersGC}, {"pipe", workPipe}, {"socket", workSocket}, {"eventfd", workEventFD}, {"fds over a socket", workNoNewFDs},
		{"file", workFile}, {"mapping", workMapping}, {"polling", workPoll}, {"time", workTime}, {"signals", workSignals}, {"faults", workFaults}, {"statistics", workStats},
	} {
		if err := step.do(w); err != nil {
			die(step.name+":", err)
		}
		fmt.Println(step.name)
	}
	fmt.Println("done")
}

func openWork(path string) *work {
	w := &work{sigs: make(chan os.Signal, 1)}
	fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))
	_ = must(0, unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
	w.conn, w.socket = os.NewFile(uintptr(fd), "conn"), fd
	w.ev = os.NewFile(uintptr(must(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))), "eventfd")
	w.pr, w.pw, _ = os.Pipe()
	w.file = os.NewFile(uintptr(must(unix.MemfdCreate("file", unix.MFD_CLOEXEC))), "file")
	w.pair = must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	w.stat = must(os.Open("/proc/self/stat"))
	w.memfd = must(unix.MemfdCreate("dma", unix.MFD_CLOEXEC))
	_ = must(0, unix.Ftruncate(w.memfd, 1<<20))
	return w
}

func threadIsShut() error {
	mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	if err != nil || mode != unix.SECCOMP_MODE_FILTER {
		return fmt.Errorf("seccomp mode %d on thread %d: %v", mode, unix.Gettid(), err)
	}
	nnp, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil || nnp != 1 {
		return fmt.Errorf("no_new_privs %d on thread %d: %v", nnp, unix.Gettid(), err)
	}
	return nil
}

// workThreads starts and ends pinned threads, and goroutines by the thousand.
func workThreads(*work) error {
	const n = 64
	results := make(chan error, n)
	together := make(chan struct{})
	var up sync.WaitGroup
	up.Add(n)
	for i := range n {
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			up.Done()
			<-together
			var cpus unix.CPUSet
			cpus.Set(i % 2)
			err := threadIsShut()
			if aerr := unix.SchedSetaffinity(0, &cpus); aerr != nil && !errors.Is(aerr, unix.EINVAL) {
				err = aerr // EINVAL: this machine has one CPU
			}
			results <- errors.Join(err, unix.SchedGetaffinity(0, &cpus))
		}()
	}
	up.Wait()
	close(together)
	var err error
	for range n {
		err = errors.Join(err, <-results)
	}
	var wg sync.WaitGroup
	for range 5000 {
		wg.Go(runtime.Gosched)
	}
	wg.Wait()
	return err
}

func workTimersGC(*work) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var keep [][]byte
	for range 20 {
		<-tick.C
		for range 50 {
			keep = append(keep, make([]byte, 64<<10))
		}
		if len(keep) > 200 {
			keep = nil
		}
		runtime.GC()
	}
	debug.FreeOSMemory()
	runtime.SetDefaultGOMAXPROCS()
	return nil
}

func workPipe(w *work) error {
	go func() { _, _ = w.pw.Write(make([]byte, 1<<20)) }()
	buf := make([]byte, 4096)
	for n := 0; n < 1<<20; {
		k, err := w.pr.Read(buf)
		if err != nil {
			return err
		}
		n += k
	}
	return errors.Join(w.pr.Close(), w.pw.Close())
}

func workSocket(w *work) error {
	raw, err := w.conn.SyscallConn()
	if err != nil {
		return err
	}
	for i := range 100 {
		msg := fmt.Sprintf("message %d", i)
		var ioErr error
		if err := raw.Write(func(fd uintptr) bool {
			ioErr = unix.Sendmsg(int(fd), []byte(msg), nil, nil, unix.MSG_NOSIGNAL)
			return !errors.Is(ioErr, unix.EAGAIN)
		}); err != nil || ioErr != nil {
			return errors.Join(err, ioErr)
		}
		buf := make([]byte, 64)
		var n int
		if err := raw.Read(func(fd uintptr) bool {
			n, _, _, _, ioErr = unix.Recvmsg(int(fd), buf, nil, unix.MSG_CMSG_CLOEXEC)
			return !errors.Is(ioErr, unix.EAGAIN)
		}); err != nil || ioErr != nil || string(buf[:n]) != msg {
			return fmt.Errorf("%q came back as %q: %v %v", msg, buf[:n], err, ioErr)
		}
		if _, err := w.conn.Write([]byte("x")); err != nil {
			return err
		}
		if err := w.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := w.conn.Read(buf); err != nil {
			return err
		}
	}
	return w.conn.Close()
}

func workEventFD(w *work) error {
	for range 50 {
		go func() {
			time.Sleep(100 * time.Microsecond)
			_, _ = w.ev.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
		}()
		if _, err := w.ev.Read(make([]byte, 8)); err != nil {
			return err
		}
	}
	return nil
}

// workNoNewFDs: an fd that is sent over an open socket finds no free number.
func workNoNewFDs(w *work) error {
	if err := unix.Sendmsg(w.pair[0], []byte("x"), unix.UnixRights(1), nil, 0); err != nil {
		return err
	}
	oob := make([]byte, 64)
	_, n, flags, _, err := unix.Recvmsg(w.pair[1], make([]byte, 8), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil || flags&unix.MSG_CTRUNC == 0 || n != 0 {
		return fmt.Errorf("an fd came through: %d bytes, flags %#x, %v", n, flags, err)
	}
	return nil
}

func workFile(w *work) error {
	b := make([]byte, 1<<16)
	if _, err := rand.Read(b); err != nil {
		return err
	}
	if _, err := w.file.Write(b); err != nil {
		return err
	}
	if _, err := w.file.WriteAt(b[:100], 1<<20); err != nil {
		return err
	}
	got := make([]byte, len(b))
	if _, err := w.file.ReadAt(got, 0); err != nil || !slices.Equal(got, b) {
		return fmt.Errorf("read back: %w", err)
	}
	return w.file.Close()
}

func workMapping(w *work) error {
	b, err := unix.Mmap(w.memfd, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	b[0] = 1
	return unix.Munmap(b)
}

func workPoll(w *work) error {
	fds := []unix.PollFd{{Fd: int32(w.pair[0]), Events: unix.POLLIN}}
	for _, wait := range []func() (int, error){
		func() (int, error) { return unix.Poll(fds, 1) },
		func() (int, error) { return unix.Ppoll(fds, &unix.Timespec{Nsec: 1000}, nil) },
	} {
		n, err := wait()
		for errors.Is(err, unix.EINTR) { // the runtime's preemption
			n, err = wait()
		}
		if err != nil || n != 0 {
			return fmt.Errorf("poll: %d, %w", n, err)
		}
	}
	// What a progress bar asks; the answer does not matter, to live does.
	_, _ = unix.IoctlGetWinsize(1, unix.TIOCGWINSZ)
	_, _ = unix.IoctlGetTermios(1, unix.TCGETS)
	return nil
}

func workTime(*work) error {
	time.Sleep(time.Millisecond)
	if time.Now().Local().Format(time.RFC3339) == "" {
		return errors.New("no time")
	}
	return nil
}

func workSignals(w *work) error {
	signal.Notify(w.sigs, unix.SIGUSR1)
	defer signal.Stop(w.sigs)
	if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
		return err
	}
	<-w.sigs
	return nil
}

// workFaults: what a peer does that shrinks its memory file, and a plain nil pointer.
func workFaults(w *work) (err error) {
	caught := 0
	fault := func(f func()) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if recover() != nil {
				caught++
			}
		}()
		f()
	}
	fault(func() { var p *work; p.memfd = 1 })
	b, err := unix.Mmap(w.memfd, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	fault(func() { b[1<<20] = 1 }) // past the end of the file
	if caught != 2 {
		return fmt.Errorf("%d of 2 faults caught", caught)
	}
	return unix.Munmap(b)
}

func workStats(w *work) error {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return err
	}
	b := make([]byte, 4096)
	n, err := syscall.Pread(int(w.stat.Fd()), b, 0)
	if err != nil || !strings.Contains(string(b[:n]), "(sandbox.test)") {
		return fmt.Errorf("stat by an fd from before: %q, %w", b[:n], err)
	}
	return nil
}
