package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/uring"
)

// try is something that a program tries in a box with uses, and what must come of it.
type try struct {
	name string
	do   func() error
	want error // EPERM: the filter
}

// A server's box: clients of its own socket come in, so many and no more, and it is a server of nothing else and a client of nobody.
func roleServer(path string) {
	Reexec(Options{})
	prepareAttacks()
	listener := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))
	_ = must(0, errors.Join(unix.Bind(listener, &unix.SockaddrUnix{Name: path}), unix.Listen(listener, 8)))
	fresh := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)) // opened before, used by nobody
	for range 4 {
		must(dial(path)) // waits to be accepted; stays open
	}
	enterAll(Policy{Action: ActionErrno, Uses: []Use{Listener(listener, 2)}})

	accept := func(fd int, flags uintptr) func() error {
		return func() error {
			n, _, no := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, flags, 0, 0)
			if no != 0 {
				return no
			}
			heldPair[0] = int(n)
			return nil
		}
	}
	rights := func() error {
		// Over a connection that a server must not send messages on.
		return unix.Sendmsg(heldPair[0], []byte("x"), unix.UnixRights(1), nil, 0)
	}
	tryAll([]try{
		{"accept on another socket", accept(heldListener, acceptFlags), unix.EPERM},
		{"accept across exec", accept(listener, unix.SOCK_NONBLOCK), unix.EPERM},
		{"accept", accept(listener, acceptFlags), nil},
		{"accept a second", accept(listener, acceptFlags), nil},
		{"accept one too many", accept(listener, acceptFlags), unix.EMFILE},
		{"pass an fd", rights, unix.EPERM},
		{"receive an fd", call(unix.SYS_RECVMSG, uintptr(heldPair[0])), unix.EPERM},
		{"listen once more", func() error { return unix.Listen(fresh, 1) }, unix.EPERM},
		{"bind", func() error { return unix.Bind(fresh, &unix.SockaddrUnix{Name: "@x"}) }, unix.EPERM},
		{"connect to itself", func() error { return unix.Connect(fresh, &unix.SockaddrUnix{Name: path}) }, unix.EPERM},
		{"a socket", func() error { return fdErr(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)) }, unix.EPERM},
		{"close", func() error { return unix.Close(heldPair[0]) }, nil},
		{"accept again", accept(listener, acceptFlags), nil},
		{"accept one too many again", accept(listener, acceptFlags), unix.EMFILE},
	})
}

func dial(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// A box with a ring: what the ring takes is what it was restricted to, and other rings are out of reach.
func roleRing(arg string) {
	Reexec(Options{})
	file := must(unix.MemfdCreate("file", unix.MFD_CLOEXEC))
	free := must(uring.New(uring.Config{Entries: 4}))
	if arg == "free" {
		must(Enter(Policy{Uses: []Use{Ublk(free.FD())}}))
		return
	}
	r := must(uring.New(uring.Config{Entries: 4, Disabled: true}))
	if arg == "disabled" {
		must(Enter(Policy{Uses: []Use{Ublk(r.FD())}}))
		return
	}
	_ = must(0, errors.Join(r.RegisterFiles([]int{file}), r.Restrict(uring.Restrictions{Ops: []uint8{uring.OpWrite}, RegisteredFilesOnly: true}), r.Enable()))
	enterAll(Policy{Action: ActionErrno, Uses: []Use{Ublk(r.FD())}})

	buf := []byte("x")
	path := append([]byte("/etc/passwd"), 0)
	submit := func(prep func(*uring.SQE)) func() error {
		return func() error {
			s := r.GetSQE()
			prep(s)
			if _, err := r.SubmitAndWait(1); err != nil {
				return err
			}
			var out [1]uring.CQE
			if n := r.Reap(out[:]); n != 1 {
				return fmt.Errorf("%d completions", n)
			}
			if no := out[0].Errno(); no != 0 {
				return no
			}
			return nil
		}
	}
	// Operations by number, io_uring_enter(2): what the ring could do that seccomp does not see.
	op := func(n uint8) func() error {
		return submit(func(s *uring.SQE) {
			s.PrepWrite(unix.AT_FDCWD, &path[0], 0, 0) // the path where an opening operation has it
			s.Opcode = n
		})
	}
	ring := uintptr(r.FD())
	tryAll([]try{
		{"the one operation", submit(func(s *uring.SQE) { s.PrepWrite(0, &buf[0], 1, 0); s.Flags = uring.SQEFixedFile }), nil},
		{"a file that is not registered", submit(func(s *uring.SQE) { s.PrepWrite(file, &buf[0], 1, 0) }), unix.EACCES},
		{"openat", op(18), unix.EACCES},
		{"openat2", op(28), unix.EACCES},
		{"close", op(19), unix.EACCES},
		{"connect", op(16), unix.EACCES},
		{"accept", op(13), unix.EACCES},
		{"sendmsg", op(9), unix.EACCES},
		{"socket", op(45), unix.EACCES},
		{"read", op(uring.OpRead), unix.EACCES},
		{"splice", op(30), unix.EACCES},
		{"unlinkat", op(36), unix.EACCES},
		{"files_update", op(20), unix.EACCES},
		{"msg_ring", op(40), unix.EACCES},
		{"uring_cmd", op(uring.OpURingCmd), unix.EACCES},
		{"register more files", call(unix.SYS_IO_URING_REGISTER, ring, 2), unix.EPERM},
		{"another ring", call(unix.SYS_IO_URING_ENTER, uintptr(free.FD())), unix.EPERM},
		{"a ring by its registered number", call(unix.SYS_IO_URING_ENTER, ring, 0, 0, 1<<4), unix.EPERM},
		{"a new ring", call(unix.SYS_IO_URING_SETUP, 4), unix.EPERM},
	})
}

// A box with a device behind VFIO and a file of sysfs: two memfds stand for them, and the kernel answers ENOTTY to what gets through.
func roleDevice(string) {
	Reexec(Options{})
	prepareAttacks()
	device, config := must(unix.MemfdCreate("device", unix.MFD_CLOEXEC)), must(unix.MemfdCreate("config", unix.MFD_CLOEXEC))
	enterAll(Policy{Action: ActionErrno, Uses: []Use{VFIODevice(device), FileWrites(config), VFIOUser(heldPair[0])}})
	ioctl := func(fd int, request uintptr) func() error { return call(unix.SYS_IOCTL, uintptr(fd), request) }
	pwrite := func(fd int) func() error {
		return func() error { return fdErr(unix.Pwrite(fd, []byte("x"), 4)) }
	}
	tryAll([]try{
		{"reset", ioctl(device, vfioDeviceReset), unix.ENOTTY},
		{"reset, upper half", ioctl(device, vfioDeviceReset|1<<32), unix.EPERM},
		{"reset of another file", ioctl(config, vfioDeviceReset), unix.EPERM},
		{"interrupts", ioctl(device, 0x3b6e), unix.EPERM},
		{"region info", ioctl(device, 0x3b6c), unix.EPERM},
		{"hot reset of others, or memory for the device", ioctl(device, 0x3b71), unix.EPERM},
		{"feature: migration", ioctl(device, 0x3b75), unix.EPERM},
		{"attach to another IOMMU", ioctl(device, 0x3b77), unix.EPERM},
		{"the terminal's ioctl", ioctl(device, unix.TCSETS), unix.EPERM},
		{"map the device", func() error {
			return mapErr(unix.Mmap(device, 0, 4096, unix.PROT_READ, unix.MAP_SHARED))
		}, unix.EPERM},
		{"write to the device", pwrite(device), nil},
		{"write to sysfs", pwrite(config), nil},
		{"write to another file", pwrite(heldFile), unix.EPERM},
		{"a message to the device", func() error { return unix.Sendmsg(heldPair[0], []byte("x"), nil, nil, 0) }, nil},
		{"a message to another", func() error { return unix.Sendmsg(heldPair[1], []byte("x"), nil, nil, 0) }, unix.EPERM},
	})
}

// tryAll prints what came of each try that must not be.
func tryAll(tries []try) {
	wrong := map[string]string{}
	for _, x := range tries {
		if err := x.do(); !errors.Is(err, x.want) {
			wrong[x.name] = fmt.Sprintf("%v, not %v", err, x.want)
		}
	}
	_ = must(0, json.NewEncoder(os.Stdout).Encode(wrong))
}

func TestUsesLetNothingElseThrough(t *testing.T) {
	for name, who := range users() {
		dir, err := os.MkdirTemp(filepath.Dir(testBinary), "serve-") // t.TempDir is below directories that only this user may enter
		if err := errors.Join(err, os.Chmod(dir, 0o777)); err != nil {
			t.Fatal(err)
		}
		for _, role := range []string{"server", "ring", "device"} {
			t.Run(role+" "+name, func(t *testing.T) {
				wrong := map[string]string{}
				if err := json.Unmarshal([]byte(run(t, who, role, dir+"/socket")), &wrong); err != nil {
					t.Fatal(err)
				}
				for what, how := range wrong {
					t.Errorf("%s: %s", what, how)
				}
			})
		}
	}
}

// A ring that can do everything is not let into the box.
func TestFreeRingIsRefused(t *testing.T) {
	for _, how := range []string{"free", "disabled"} {
		c := start(t, nil, "ring", how)
		if ws := c.wait(t); ws.ExitStatus() != 3 || !strings.Contains(c.err.String(), "is not restricted (io_uring does not pass through seccomp") {
			t.Errorf("%s: %v: %s", how, ws, c.err.String())
		}
	}
}
