// Package uring is a small binding to io_uring: rings are set up, entries
// prepared, submitted in batches and reaped, files and buffers registered, and an
// eventfd signalled for the owner to sleep on. SQE128, CQE32 and URING_CMD, which NVMe
// passthrough needs, are ordinary parts of it.
//
// It does not schedule: a Ring belongs to one goroutine at a time, whoever submits
// reaps too, and how long memory must live is the caller's affair (see SQE). It
// does not keep results apart either; UserData is the caller's.
//
// It works from kernel 5.10 on. What came later is asked for only if the kernel has it, and is an
// error only where nothing else will do.
//
// IORING_CQ_EVENTFD_DISABLED is left alone on purpose: the kernel reads that flag after its
// store to the CQ tail without a barrier in between, so an owner that clears it, looks at
// the tail and sleeps can miss its wake-up.
package uring

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Config says what kind of ring New makes.
type Config struct {
	Entries   uint32 // size of the submission ring; rounded up to a power of two. 0: 128
	CQEntries uint32 // size of the completion ring. 0: the kernel's choice, twice Entries

	SQE128 bool // 128-byte entries (5.19)
	CQE32  bool // 32-byte completions (5.19); use ReapWide
	IOPoll bool // completions are polled for; O_DIRECT on a device with poll queues only

	SQPoll   bool   // a kernel thread submits
	SQIdle   uint32 // milliseconds without work before that thread sleeps. 0: the kernel's choice
	SQCPU    int    // the thread's CPU if SQPinned
	SQPinned bool
	Disabled bool // starts disabled; Enable makes the caller's thread the ring's only issuer

	// Hints, dropped on kernels that do not have them.

	// CoopTaskrun lets completions wait for the owner's next call instead of interrupting it (5.19).
	// Reap makes that call when the kernel says that there is something.
	CoopTaskrun bool
	// SingleIssuer promises that only the thread that made (or enabled) the ring enters it (6.0).
	SingleIssuer bool
	// DeferTaskrun is CoopTaskrun for a single issuer, without any work elsewhere (6.1).
	DeferTaskrun bool
}

// Ring is an io_uring. It must be used by one goroutine at a time.
type Ring struct {
	fd       int
	evfd     int // -1: none yet
	features uint32
	polled   bool // IOPoll: only an enter finds completions
	cqe32    bool
	sqShift  uint8 // log2 of an entry's size

	rings   []byte // both rings: FeatSingleMmap
	entries []byte // the SQEs

	// Written by the kernel: sqHead, sqFlags, cqTail; by us: sqTail, cqHead.
	// Each pairs with an acquire or a release on the kernel's side.
	sqHead, sqTail, sqFlags *atomic.Uint32
	cqHead, cqTail          *atomic.Uint32

	tail              uint32 // prepared up to here; sqTail is what the kernel has been told
	sqMask, sqEntries uint32
	head              uint32 // reaped up to here
	cqMask, cqEntries uint32
	cqes              []CQE
	wide              []WideCQE
	ops               *probe
	sqPoll            bool
	wait              timespec // of SubmitAndWaitFor, which must not be on a stack
}

// Error is a refusal by the kernel, with the remedy.
type Error struct {
	Op     string // what was asked for
	Errno  unix.Errno
	Remedy string
}

func (e *Error) Error() string {
	if e.Remedy == "" {
		return fmt.Sprintf("%s: %v", e.Op, e.Errno)
	}
	return fmt.Sprintf("%s: %v: %s", e.Op, e.Errno, e.Remedy)
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }

// New makes a ring. The error is an *Error that names the obstacle and the remedy, on one line.
func New(cfg Config) (*Ring, error) {
	if cfg.Entries == 0 {
		cfg.Entries = 128
	}
	p, fd, err := cfg.setup(setup)
	if err != nil {
		return nil, err
	}
	r := &Ring{
		fd: fd, evfd: -1, features: p.features,
		polled: cfg.IOPoll, cqe32: cfg.CQE32, sqPoll: cfg.SQPoll,
		sqShift: 6,
	}
	if cfg.SQE128 {
		r.sqShift = 7
	}
	if p.features&FeatSingleMmap == 0 || p.features&FeatNoDrop == 0 {
		unix.Close(fd)
		return nil, &Error{Op: "io_uring", Errno: unix.ENOSYS, Remedy: "this kernel's is too old; use Linux 5.10 or later"}
	}
	cqe := uint32(bits.Len32(16) - 1)
	if cfg.CQE32 {
		cqe++
	}
	size := max(p.sqOff.array+p.sqEntries*4, p.cqOff.cqes+p.cqEntries<<cqe)
	r.rings, err = unix.Mmap(fd, offSQRing, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err == nil {
		r.entries, err = unix.Mmap(fd, offSQEs, int(p.sqEntries)<<r.sqShift, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mapping an io_uring: %w", err), r.Close())
	}
	r.attach(p)
	r.ops = new(probe)
	if errno := registerProbe(fd, r.ops); errno != 0 {
		return nil, errors.Join(fmt.Errorf("probing an io_uring: %w", errno), r.Close())
	}
	return r, nil
}

// setup makes the ring by call, leaving out hints that the kernel does not know, newest first.
func (cfg *Config) setup(call func(uint32, *params) (int, unix.Errno)) (*params, int, error) {
	p := params{sqThreadIdle: cfg.SQIdle, sqThreadCPU: uint32(cfg.SQCPU), cqEntries: cfg.CQEntries}
	must := uint32(setupClamp)
	set := func(on bool, flags uint32) {
		if on {
			must |= flags
		}
	}
	set(cfg.SQE128, setupSQE128)
	set(cfg.CQE32, setupCQE32)
	set(cfg.IOPoll, setupIOPoll)
	set(cfg.SQPoll, setupSQPoll)
	set(cfg.SQPoll && cfg.SQPinned, setupSQAff)
	set(cfg.CQEntries != 0, setupCQSize)
	set(cfg.Disabled, setupRDisabled)

	hints := []uint32{setupSubmitAll, 0, 0, 0} // in the order in which kernels got them
	if !cfg.SQPoll {
		if cfg.CoopTaskrun || cfg.DeferTaskrun {
			hints[1] = setupCoopTaskrun | setupTaskrunFlag
		}
		if cfg.DeferTaskrun {
			hints[3] = setupDeferTaskrun
		}
	}
	if cfg.SingleIssuer || hints[3] != 0 {
		hints[2] = setupSingleIssuer
	}
	for n := len(hints); ; n-- {
		p.flags = must
		for _, h := range hints[:n] {
			p.flags |= h
		}
		try := p
		fd, errno := call(cfg.Entries, &try)
		if errno == 0 {
			return &try, fd, nil
		}
		if errno != unix.EINVAL || n == 0 {
			disabled, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
			return nil, -1, explainSetup(errno, strings.TrimSpace(string(disabled)), cfg)
		}
	}
}

func explainSetup(errno unix.Errno, disabled string, cfg *Config) error {
	e := &Error{Op: "io_uring_setup", Errno: errno}
	const calls = "io_uring_setup, io_uring_enter and io_uring_register"
	switch errno {
	case unix.ENOSYS:
		e.Remedy = "this kernel has no io_uring, or a seccomp filter hides it: use Linux 5.10 or later with CONFIG_IO_URING, or allow " + calls + " in the container's seccomp profile"
	case unix.EPERM, unix.EACCES:
		switch disabled {
		case "2":
			e.Remedy = "kernel.io_uring_disabled is 2: set it to 0 (sysctl -w kernel.io_uring_disabled=0)"
		case "1":
			e.Remedy = "kernel.io_uring_disabled is 1: set it to 0, put the user in the group of kernel.io_uring_group, or give it CAP_SYS_ADMIN"
		default:
			e.Remedy = "a seccomp filter or security module forbids it: allow " + calls + " (Docker: --security-opt seccomp=PROFILE)"
			if cfg.SQPoll {
				e.Remedy += "; before Linux 5.11 SQPoll needs CAP_SYS_ADMIN"
			}
		}
	case unix.ENOMEM:
		e.Remedy = "not enough memory, or before Linux 5.12 not enough lockable memory: " + raiseMemlock()
	case unix.EMFILE:
		e.Remedy = "too many open files: raise RLIMIT_NOFILE (ulimit -n)"
	case unix.EINVAL:
		var what []string
		for _, f := range []struct {
			on   bool
			name string
		}{
			{cfg.SQE128, "SQE128 (5.19)"}, {cfg.CQE32, "CQE32 (5.19)"}, {cfg.IOPoll, "IOPoll"}, {cfg.SQPoll, "SQPoll"},
			{cfg.CQEntries != 0, fmt.Sprintf("%d completion entries", cfg.CQEntries)},
		} {
			if f.on {
				what = append(what, f.name)
			}
		}
		e.Remedy = "this kernel does not take the configuration"
		if what != nil {
			e.Remedy += ": " + strings.Join(what, ", ")
		}
	}
	return e
}

func raiseMemlock() string {
	s := "raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) or give CAP_IPC_LOCK"
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim) == nil && lim.Cur != unix.RLIM_INFINITY {
		s += fmt.Sprintf("; it is %d KiB", lim.Cur>>10)
	}
	return s
}

// Features returns what the kernel said it has, as Feat bits.
func (r *Ring) Features() uint32 { return r.features }

// Supports reports whether the kernel has operation op.
func (r *Ring) Supports(op uint8) bool {
	return op <= r.ops.lastOp && r.ops.ops[op].flags&probeOpSupported != 0
}

// FD returns the ring's own descriptor. It stays the ring's.
func (r *Ring) FD() int { return r.fd }

// Enable starts a ring that was made with Disabled and makes the calling thread its issuer.
func (r *Ring) Enable() error {
	if errno := registerNothing(r.fd, regEnableRings); errno != 0 {
		return &Error{Op: "enabling an io_uring", Errno: errno}
	}
	return nil
}

// Close gives the ring back. It does not wait: nothing may be in flight, for the kernel would go
// on using the memory of what is.
func (r *Ring) Close() error {
	var errs []error
	for _, m := range []*[]byte{&r.rings, &r.entries} {
		if *m != nil {
			errs = append(errs, unix.Munmap(*m))
			*m = nil
		}
	}
	for _, fd := range []*int{&r.fd, &r.evfd} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	return errors.Join(errs...)
}
