package sandbox

import "golang.org/x/sys/unix"

// archRules are the calls that only this architecture has, sorted by name.
func archRules() []Rule {
	return []Rule{
		{Name: "epoll_wait", Nr: unix.SYS_EPOLL_WAIT, Why: "x/sys: an epoll set of the program's own"},
		{Name: "poll", Nr: unix.SYS_POLL, Why: "x/sys: waiting for an event fd or a socket with a deadline"},
	}
}
