package sandbox

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// threadStatus is what /proc/<pid>/task/<tid>/status says of the box; proc_pid_status(5).
type threadStatus struct {
	caps       uint64 // union of the inheritable, permitted, effective and ambient sets
	bounding   uint64
	noNewPrivs int
	seccomp    int // 2: filter
	filters    int // -1: a kernel that does not count them
}

func parseThreadStatus(b []byte) (threadStatus, error) {
	st := threadStatus{noNewPrivs: -1, seccomp: -1, filters: -1}
	for line := range strings.Lines(string(b)) {
		key, val, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		val = strings.TrimSpace(val)
		var err error
		switch key {
		case "CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd":
			var set uint64
			if set, err = strconv.ParseUint(val, 16, 64); key == "CapBnd" {
				st.bounding = set
			} else {
				st.caps |= set
			}
		case "NoNewPrivs":
			st.noNewPrivs, err = strconv.Atoi(val)
		case "Seccomp":
			st.seccomp, err = strconv.Atoi(val)
		case "Seccomp_filters":
			st.filters, err = strconv.Atoi(val)
		}
		if err != nil {
			return st, fmt.Errorf("thread status %q: %w", strings.TrimSpace(line), err)
		}
	}
	if st.noNewPrivs < 0 || st.seccomp < 0 {
		return st, errors.New("thread status without NoNewPrivs or Seccomp")
	}
	return st, nil
}

// threadProbe holds the status file of every thread open, so that they can be read when nothing can be opened any more. A thread that
// starts later has everything from the one that started it.
type threadProbe struct {
	fds []int
}

func openThreadProbe() (*threadProbe, error) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, &fault{"threads cannot be listed", err, "mount /proc"}
	}
	p := &threadProbe{}
	for _, t := range tasks {
		fd, err := unix.Open("/proc/self/task/"+t.Name()+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			p.close()
			return nil, fmt.Errorf("status of thread %s: %w", t.Name(), err)
		}
		p.fds = append(p.fds, fd)
	}
	return p, nil
}

func (p *threadProbe) close() {
	for _, fd := range p.fds {
		_ = unix.Close(fd)
	}
	p.fds = nil
}

// read gives the status of every thread that still lives.
func (p *threadProbe) read() ([]threadStatus, error) {
	var all []threadStatus
	buf := make([]byte, 16<<10)
	for _, fd := range p.fds {
		n, err := unix.Pread(fd, buf, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("thread status: %w", err)
		}
		st, err := parseThreadStatus(buf[:n])
		if err != nil {
			return nil, err
		}
		all = append(all, st)
	}
	if len(all) == 0 {
		return nil, errors.New("no thread has a status")
	}
	return all, nil
}
