package trace

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
)

// Kernel is what this kernel and this process have for tracing.
type Kernel struct {
	Release string
	Arch    string

	BTF     string   // where the kernel's types are; "": nowhere
	Modules []string // modules with types of their own
	Tracefs string   // where it is mounted; "private" if it can be had without; "": not at all
	// Lockdown is none, integrity or confidentiality; "" where the kernel does not say.
	Lockdown string
	// Unprivileged is kernel.unprivileged_bpf_disabled: 0, 1 or 2; -1 where it cannot be read.
	Unprivileged int

	Have    []string // capabilities, of those that tracing needs
	Missing []string
	Driver  string // why there is no NVMe driver; "": there is one
	Devices []Device

	// Hooks are all that there are, Attached if they could be: each was attached for a moment.
	Hooks []Hook
	// Refused is why no hook could be tried; "": they were.
	Refused  string
	Commands []Command
}

// Command is what follows for one of nvmetrace's commands.
type Command struct {
	Name  string
	Works bool   // as a whole
	Needs []Part // parts of the kernel; none: it needs nothing of it
	Why   string // what does not work, why, and what helps
}

// commands by what each needs and what each can use: without the latter it does less.
var commands = []struct {
	name        string
	needs, uses []Part
}{
	{"top", []Part{NVMe}, []Part{Block}},
	{"latency", []Part{NVMe}, []Part{Block}},
	{"snoop", []Part{NVMe}, nil},
	{"export", []Part{NVMe}, []Part{Block, KVM}},
	{"path", nil, []Part{NVMe}},
	{"doorbells", nil, []Part{KVM}},
	{"doctor", nil, nil},
	{"replay", nil, nil},
}

// Probe finds out what works here. It attaches each hook for a moment, and changes nothing.
func Probe() *Kernel {
	k := &Kernel{
		Release: release(), Arch: runtime.GOARCH, Modules: btfModules(), Lockdown: lockdown(), Unprivileged: unprivileged(), Driver: noDriver(),
	}
	const kernelTypes = "/sys/kernel/btf/vmlinux"
	if _, err := os.Stat(kernelTypes); err == nil {
		k.BTF = kernelTypes
	}
	k.Have, k.Missing = caps()
	var err error
	if k.Devices, err = Devices(); err != nil {
		k.Devices = nil
	}
	fs, fsErr := openTracefs()
	if fsErr == nil {
		defer fs.Close()
		if k.Tracefs = fs.dir; fs.own != nil {
			k.Tracefs = "private"
		}
	}
	if k.Hooks, err = tryAll(fs, fsErr); err != nil {
		k.Refused = firstLine(err)
	}
	for _, c := range commands {
		k.Commands = append(k.Commands, k.command(c.name, c.needs, c.uses))
	}
	return k
}

// command says what follows for one.
func (k *Kernel) command(name string, needs, uses []Part) Command {
	c := Command{Name: name, Works: true, Needs: needs}
	var why []string
	for _, p := range needs {
		if err := k.missing(p); err != nil {
			c.Works = false
			why = append(why, err.Error())
		}
	}
	if c.Works {
		for _, p := range uses {
			if err := k.missing(p); err != nil {
				why = append(why, fmt.Sprintf("without %s: %s", partName[p], reason(err)))
			}
		}
	}
	c.Why = strings.Join(why, "; ")
	return c
}

func (k *Kernel) missing(p Part) error {
	if k.Refused != "" {
		return errors.New(k.Refused)
	}
	return missing(k.Hooks, p)
}

// reason is what comes after "X cannot be traced: hook: ".
func reason(err error) string {
	s := err.Error()
	if _, after, ok := strings.Cut(s, " cannot be traced: "); ok {
		return after
	}
	return s
}

// tryAll attaches all hooks and detaches them.
func tryAll(fs *tracefs, fsErr error) (hooks []Hook, err error) {
	if err := rlimit.RemoveMemlock(); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, err
	}
	spec, err := bpf.LoadTrace()
	if err != nil {
		return nil, err
	}
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") && name != bpf.TraceMapEvents && name != bpf.TraceMapCounters {
			m.MaxEntries = 1 // nothing is to be counted
		}
	}
	t := new(Tracer)
	defer func() { err = errors.Join(err, t.Close()) }()
	l := &loader{cache: btf.NewCache(), spec: spec, tracer: t, fs: fs, fsErr: fsErr}
	if err := l.offsets(); err != nil {
		return nil, err
	}
	if err := l.loadMaps(); err != nil {
		return nil, err
	}
	for _, p := range places {
		hooks = append(hooks, l.attach(&p))
	}
	return hooks, nil
}
