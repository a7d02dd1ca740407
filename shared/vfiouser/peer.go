package vfiouser

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// peerOf returns who listens on the other end of a unix socket. SO_PEERCRED gives 0 for a process that is not in this one's PID namespace or one
// below, as a server is for a driver in a sandbox. Then /proc is asked, which may belong to a namespace above, and its number is what other
// paths in /proc want (Linux 6.5; before, the number stays 0).
func peerOf(socket int) (unix.Ucred, error) {
	cred, err := unix.GetsockoptUcred(socket, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return unix.Ucred{}, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	if cred.Pid == 0 {
		cred.Pid = peerByPIDFD(socket)
	}
	return *cred, nil
}

func peerByPIDFD(socket int) int32 {
	fd, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(fd) }()
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0
	}
	return pidOf(string(info))
}

// pidOf finds the process in a pidfd's fdinfo, pidfd_open(2). It is 0 if that is not in /proc's namespace, -1 if it has ended.
func pidOf(info string) int32 {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.ParseInt(strings.TrimSpace(value), 10, 32)
			if err != nil || pid < 0 {
				return 0
			}
			return int32(pid)
		}
	}
	return 0
}
