package sandbox

import (
	"fmt"
	"runtime"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
)

// Matcher returns a function that says whether the rule is for a system call: by the very filter that the rule becomes, in an interpreter. It is
// for tests that look at what a program does.
func (r Rule) Matcher() (func(nr uint64, args [6]uint64) bool, error) {
	match := r.Args
	if match == nil {
		match = seccomp.MatchAll{}
	}
	prog := seccomp.Program{
		RuleSets: []seccomp.RuleSet{{Rules: seccomp.NewSyscallRules().Add(r.Nr, match), Action: seccomp.Allow}},
		Options:  seccomp.ProgramOptions{DefaultAction: seccomp.KillProcess, BadArchAction: seccomp.KillProcess},
	}
	code, _, err := prog.Build()
	if err != nil {
		return nil, fmt.Errorf("sandbox: compile the rule for %s: %w", r.Name, err)
	}
	p, err := bpf.Compile(code, false)
	if err != nil {
		return nil, fmt.Errorf("sandbox: compile the rule for %s: %w", r.Name, err)
	}
	arch := uint32(linux.AUDIT_ARCH_X86_64)
	if runtime.GOARCH == "arm64" {
		arch = linux.AUDIT_ARCH_AARCH64
	}
	return func(nr uint64, args [6]uint64) bool {
		if nr != uint64(r.Nr) {
			return false
		}
		data := linux.SeccompData{Nr: int32(nr), Arch: arch, Args: args}
		verdict, err := bpf.Exec[bpf.NativeEndian](p, seccomp.DataAsBPFInput(&data, make([]byte, data.SizeBytes())))
		return err == nil && verdict == uint32(linux.SECCOMP_RET_ALLOW)
	}, nil
}
