package sandbox

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
)

// Action is what happens to a system call that no rule lets through.
type Action int

// The actions. Only ActionKill is for production: with the others a program that was taken over may try again.
const (
	ActionKill  Action = iota // SIGSYS for the whole process, which cannot catch it
	ActionErrno               // EPERM
	ActionTrap                // SIGSYS for the thread; the Go runtime crashes with the stack that made the call
)

// String is the word that the report uses.
func (a Action) String() string {
	switch a {
	case ActionKill:
		return "kill"
	case ActionErrno:
		return "EPERM"
	case ActionTrap:
		return "trap"
	}
	return fmt.Sprintf("Action(%d)", int(a))
}

func (a Action) compile() (seccomp.Action, error) {
	switch a {
	case ActionKill:
		return seccomp.KillProcess, nil
	case ActionErrno:
		return seccomp.ReturnError.Code(uint16(unix.EPERM)), nil
	case ActionTrap:
		return seccomp.Trap, nil
	}
	return "", fmt.Errorf("sandbox: unknown action %d", int(a))
}

// filter is a compiled rules table.
type filter struct {
	code   []bpf.Instruction
	calls  int // system calls that are let through, with whatever arguments
	action Action
}

// rules is the whole table of a policy.
func (p *Policy) rules(pid int, cgo bool) []Rule {
	all := [][]Rule{baseRules(pid), mapRules(p.MapFDs), p.Extra}
	for _, u := range p.Uses {
		if len(u.FDs) > 0 {
			all = append(all, u.Rules)
		}
	}
	if cgo {
		all = append(all, libcRules())
	}
	return sortedRules(all...)
}

func (p *Policy) compile(pid int, cgo bool) (*filter, error) {
	refuse, err := p.Action.compile()
	if err != nil {
		return nil, err
	}
	allow := seccomp.NewSyscallRules()
	denied := map[unix.Errno]seccomp.SyscallRules{}
	for _, r := range p.rules(pid, cgo) {
		if r.Name == "" || r.Why == "" {
			return nil, fmt.Errorf("sandbox: the rule for system call %d (%q) has no name or no reason", r.Nr, r.Name)
		}
		match := r.Args
		if match == nil {
			match = seccomp.MatchAll{}
		}
		if r.Errno == 0 {
			allow.Add(r.Nr, match)
			continue
		}
		if _, ok := denied[r.Errno]; !ok {
			denied[r.Errno] = seccomp.NewSyscallRules()
		}
		denied[r.Errno].Add(r.Nr, match)
	}
	sets := []seccomp.RuleSet{{Rules: allow, Action: seccomp.Allow}}
	for _, no := range slices.Sorted(func(yield func(unix.Errno) bool) {
		for no := range denied {
			if !yield(no) {
				return
			}
		}
	}) {
		sets = append(sets, seccomp.RuleSet{Rules: denied[no], Action: seccomp.ReturnError.Code(uint16(no))})
	}
	prog := seccomp.Program{RuleSets: sets, Options: seccomp.ProgramOptions{
		DefaultAction: refuse,
		BadArchAction: seccomp.KillProcess, // 32-bit calls have other numbers; no one makes them by mistake
		HotSyscalls:   []uintptr{unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_READ, unix.SYS_WRITE},
	}}
	code, _, err := prog.Build()
	if err != nil {
		return nil, fmt.Errorf("sandbox: compile the seccomp filter: %w", err)
	}
	return &filter{code: code, calls: allow.Size(), action: p.Action}, nil
}

// install puts the filter on all threads at once (SECCOMP_FILTER_FLAG_TSYNC), and no_new_privs with it.
func (f *filter) install() error {
	err := seccomp.SetFilter(f.code)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return &fault{"seccomp filters", err, "the kernel needs CONFIG_SECCOMP_FILTER"}
	}
	if err != nil {
		return fmt.Errorf("install the seccomp filter: %w", err)
	}
	return nil
}
