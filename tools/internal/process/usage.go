// Package process starts hostmed for the tools that need one beside them, and reads what a process costs from
// /proc: CPU time and memory. It knows nothing of NVMe.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of times in /proc/PID/stat: USER_HZ, 100 on every Linux that Go runs on.
const tick = time.Second / 100

// CPUClock reads the CPU time of a process through a descriptor that is opened once, so that
// it also works where nothing can be opened any more.
type CPUClock struct {
	fd  int
	buf [1024]byte
}

// OpenCPUClock opens the clock of process pid.
func OpenCPUClock(pid int) (*CPUClock, error) {
	if pid <= 0 {
		return nil, errors.New("the peer's process is not known")
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/stat", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return &CPUClock{fd: fd}, nil
}

// Read returns the user and system time of all threads so far, to 10 ms; false once the process is gone.
func (c *CPUClock) Read() (time.Duration, bool) {
	n, err := unix.Pread(c.fd, c.buf[:], 0)
	if err != nil {
		return 0, false
	}
	return parseStat(c.buf[:n])
}

// Close gives the descriptor back.
func (c *CPUClock) Close() error { return unix.Close(c.fd) }

// parseStat finds utime and stime, fields 14 and 15 of proc_pid_stat(5).
func parseStat(b []byte) (time.Duration, bool) {
	// Field 2 is the program's name in parentheses and may contain anything.
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return 0, false
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 13 {
		return 0, false
	}
	u, err1 := strconv.ParseUint(f[11], 10, 63)
	s, err2 := strconv.ParseUint(f[12], 10, 63)
	if err1 != nil || err2 != nil {
		return 0, false
	}
	return time.Duration(u+s) * tick, true
}

// ThreadTime returns the CPU time of the threads that process pid has now, to the nanosecond.
func ThreadTime(pid int) (time.Duration, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, t := range tasks {
		b, err := os.ReadFile(dir + "/" + t.Name() + "/schedstat")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has just ended
		}
		if err != nil {
			return 0, err
		}
		ns, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(ns, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("schedstat of thread %s: %w", t.Name(), err)
		}
		sum += time.Duration(n)
	}
	return sum, nil
}

// Memory is what a process holds in RAM, in bytes. Shared is the part of Resident that is shared memory, such as its clients'.
type Memory struct {
	Resident, Shared uint64
}

// ReadMemory reads the memory of process pid.
func ReadMemory(pid int) (Memory, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Memory{}, err
	}
	var m Memory
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		var to *uint64
		switch key {
		case "VmRSS":
			to = &m.Resident
		case "RssShmem":
			to = &m.Shared
		default:
			continue
		}
		kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 54)
		if err != nil {
			return Memory{}, fmt.Errorf("/proc/%d/status: %s %q", pid, key, value)
		}
		*to = kb << 10
	}
	if m.Resident == 0 {
		return Memory{}, fmt.Errorf("/proc/%d/status has no VmRSS: the process has ended", pid)
	}
	return m, nil
}
