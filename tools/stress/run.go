package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
)

const (
	// lostAfter is how long both sides must have slept, with no event on its way, before a wake-up counts as lost.
	lostAfter = 300 * time.Millisecond
	lookEvery = 10 * time.Millisecond
)

// lostError is a lost wake-up.
type lostError struct {
	row
	sides string
}

func (e *lostError) Error() string {
	return fmt.Sprintf("LOST WAKE-UP after %d commands, %.2f s: SQ %d, CQ %d: both sides sleep, and there is work", e.Commands, e.Seconds, e.SQ, e.CQ)
}

// runAll runs each case for its share of the time and stops at the first that fails. The result holds what was
// run, also with an error.
func runAll(c *cli) (*result, error) {
	usable, err := cpus.Usable()
	if err != nil {
		return nil, err
	}
	res := &result{Mutate: c.Mutate, Processes: c.Processes, Seed: c.Seed, CPUs: []int{-1, -1}}
	if len(usable) >= 2 {
		res.CPUs = []int{usable[0], usable[1]}
	}
	if len(c.Size) == 0 {
		c.Size = sizes
	}
	var cases [][2]uint32
	for _, size := range c.Size {
		cases = append(cases, [2]uint32{size, size})
		if size >= 4 {
			cases = append(cases, [2]uint32{size, size / 2})
		}
	}
	share := time.Duration(c.Seconds * float64(time.Second) / float64(len(cases)))
	for _, x := range cases {
		r, err := runCase(c, x[0], x[1], share, res.CPUs)
		if r != nil {
			res.Rows = append(res.Rows, *r)
		}
		if err != nil {
			res.Failure = err.Error()
			return res, err
		}
	}
	return res, nil
}

// runCase runs one pair of ring sizes for d.
func runCase(c *cli, sq, cq uint32, d time.Duration, cpu []int) (*row, error) {
	mem, err := shm.NewMemfd("stress", memSize)
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	var fds [2]int
	for i := range fds {
		if fds[i], err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("eventfd: %w", err)
		}
		defer unix.Close(fds[i])
	}
	sh, err := newShared(mem, sq, cq, fds[0], fds[1])
	if err != nil {
		return nil, err
	}
	seed := c.Seed + uint64(sq)<<16 + uint64(cq)
	drv, err := newDriver(sh, c.Mutate, seed)
	if err != nil {
		return nil, err
	}
	over := make(chan error, 2)
	if c.Processes {
		cmd, err := startDevice(c, sh, seed, cpu[1])
		if err != nil {
			return nil, err
		}
		go func() { over <- cmd.Wait() }()
	} else {
		dev, err := newDevice(sh, c.Mutate, seed)
		if err != nil {
			return nil, err
		}
		go half(over, cpu[1], dev.run)
	}
	go half(over, cpu[0], drv.run)

	begin := time.Now()
	lost, missing, err := watch(sh, begin, d, over)
	elapsed := time.Since(begin)
	sides := sh.describe() // before the sides are disturbed
	sh.stop.Store(1)
	err = errors.Join(err, signal(sh.kick), signal(sh.irq))
	for range missing {
		err = errors.Join(err, <-over)
	}
	r := sh.row(elapsed)
	switch {
	case lost:
		err = errors.Join(&lostError{*r, sides}, err)
	case err == nil && r.Commands == 0:
		err = fmt.Errorf("SQ %d, CQ %d: not one command in %v", sq, cq, elapsed)
	}
	return r, err
}

// half runs one side on a thread and core of its own; the thread ends with it.
func half(over chan<- error, cpu int, f func() error) {
	if cpu >= 0 {
		if err := cpus.Pin(cpu); err != nil {
			over <- err
			return
		}
	}
	over <- f()
}

// watch returns when d has passed, a wake-up is lost, or a side has ended by itself; missing says how many have not.
func watch(sh *shared, begin time.Time, d time.Duration, over <-chan error) (lost bool, missing int, err error) {
	type state struct{ driver, device uint64 }
	var last state
	since := begin
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-over:
			return false, 1, err
		case <-tick.C:
		}
		now := time.Now()
		s := state{sh.driver[sideEpoch].Load(), sh.device[sideEpoch].Load()}
		both := sh.driver[sideState].Load() == asleep && sh.device[sideState].Load() == asleep
		if !both || s != last || eventOnItsWay(sh) {
			last, since = s, now
		}
		if now.Sub(since) > lostAfter {
			return true, 2, nil
		}
		// Not while it looks as if something were lost.
		if now.Sub(begin) > d && now.Sub(since) < 2*lookEvery {
			return false, 2, nil
		}
	}
}

// eventOnItsWay reports whether a side is about to wake, though its thread has not run yet.
func eventOnItsWay(sh *shared) bool {
	fds := []unix.PollFd{{Fd: int32(sh.kick), Events: unix.POLLIN}, {Fd: int32(sh.irq), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	for err == unix.EINTR { // the runtime's preemption
		n, err = unix.Poll(fds, 0)
	}
	return err != nil || n > 0
}

// What the device's process finds as its descriptors 3, 4 and 5.
const (
	memFD = 3 + iota
	kickFD
	irqFD
)

// startDevice starts this program again as the device.
func startDevice(c *cli, sh *shared, seed uint64, cpu int) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe, "--mutate="+c.Mutate,
		"--seed="+strconv.FormatUint(seed, 10),
		fmt.Sprintf("--device-parent=%d", os.Getpid()),
		fmt.Sprintf("--device-sq=%d", sh.sq), fmt.Sprintf("--device-cq=%d", sh.cq), fmt.Sprintf("--device-cpu=%d", cpu))
	cmd.Stderr = os.Stderr
	for _, fd := range []int{sh.mem.FD(), sh.kick, sh.irq} {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(dup), "shared")
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the device's process: %w", err)
	}
	return cmd, nil
}

// runDeviceProcess is the device's process.
func runDeviceProcess(c *cli) error {
	mem, err := shm.Map(memFD, 0, memSize, true)
	if err != nil {
		return err
	}
	defer mem.Close()
	sh, err := newShared(mem, c.Device.Sq, c.Device.Cq, kickFD, irqFD)
	if err != nil {
		return err
	}
	dev, err := newDevice(sh, c.Mutate, c.Seed)
	if err != nil {
		return err
	}
	// Sleeping it notices when nobody is left to wake it.
	dev.sleeper.stop = func() bool { return sh.stopped() || os.Getppid() != c.Device.Parent }
	over := make(chan error, 1)
	go half(over, c.Device.Cpu, func() error {
		err := dev.run()
		if os.Getppid() != c.Device.Parent && err == nil {
			err = errors.New("the driver's process is gone")
		}
		return err
	})
	return <-over
}
