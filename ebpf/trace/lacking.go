package trace

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// capability names what opening needs.
var capabilities = []struct {
	name string
	bit  int
}{{"CAP_BPF", unix.CAP_BPF}, {"CAP_PERFMON", unix.CAP_PERFMON}, {"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN}}

// effective returns this thread's effective capabilities.
func effective() (uint64, error) {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		return 0, fmt.Errorf("capget: %w", err)
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective), nil
}

// caps returns what the process has of the capabilities that tracing needs, and what it lacks. CAP_SYS_ADMIN stands for the others.
func caps() (have, missing []string) {
	set, err := effective()
	if err != nil {
		return nil, nil
	}
	admin := set>>unix.CAP_SYS_ADMIN&1 == 1
	for _, c := range capabilities {
		switch {
		case set>>c.bit&1 == 1:
			have = append(have, c.name)
		case c.bit != unix.CAP_SYS_ADMIN && !admin:
			missing = append(missing, c.name)
		}
	}
	return have, missing
}

// remedyCaps gives the process the capabilities that are missing.
func remedyCaps() string {
	program, err := os.Executable()
	if err != nil {
		program = "FILE"
	}
	return "run as root, or: setcap cap_bpf,cap_perfmon+ep " + program
}

// lacking explains a refusal by the kernel; "" if the error is no refusal.
func lacking(err error) string {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return ""
	}
	if lockdown() == confidentiality {
		return "the kernel's lockdown=confidentiality lets BPF read nothing: boot with lockdown=integrity or none"
	}
	if _, missing := caps(); len(missing) > 0 {
		return strings.Join(missing, " and ") + " missing: " + remedyCaps()
	}
	return ""
}

// explain says in one line why a program is not attached.
func explain(cache *btf.Cache, p *place, c candidate, err error) string {
	if why := lacking(err); why != "" {
		return why
	}
	if p.part == NVMe {
		if why := noDriver(); why != "" {
			return why
		}
	}
	if p.part == KVM {
		if _, err := os.Stat("/sys/module/kvm"); err != nil {
			return "the kernel has no KVM: modprobe kvm-intel or kvm-amd"
		}
	}
	if c.how == Tracepoint || c.how == RawTP {
		if errors.Is(err, os.ErrNotExist) {
			return "this kernel has no such tracepoint"
		}
		return firstLine(err)
	}
	has, btfErr := hasType(cache, p.typeName())
	switch {
	case btfErr != nil:
		return "the kernel has no BTF (CONFIG_DEBUG_INFO_BTF): " + firstLine(btfErr)
	case !has && c.how == Fentry:
		return "this kernel has no such function, or it is inlined"
	case !has:
		return "this kernel has no types for it"
	case c.how == Fentry && !errors.Is(err, unix.EINVAL):
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EOPNOTSUPP) {
			return "this kernel cannot attach to functions (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS)"
		}
	}
	if set, err := effective(); err == nil && set>>unix.CAP_SYS_ADMIN&1 == 0 && len(btfModules()) > 0 {
		return "its types may be in a module, where only CAP_SYS_ADMIN finds them: run as root"
	}
	return firstLine(err)
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// noDriver says why there is no NVMe driver; "" if there is one.
func noDriver() string {
	if _, err := os.Stat("/sys/module/nvme_core"); err == nil {
		return ""
	}
	switch kernelConfig("CONFIG_BLK_DEV_NVME") {
	case "n":
		return "this kernel is built without the nvme driver (CONFIG_BLK_DEV_NVME): trace on a machine that has NVMe devices"
	case "y":
		return ""
	}
	return "the nvme driver is not loaded: modprobe nvme"
}

// kernelConfig returns y, m, n or a value of the running kernel's configuration; "" if that is nowhere to be found.
func kernelConfig(name string) string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	release := unix.ByteSliceToString(u.Release[:])
	for _, path := range []string{"/proc/config.gz", "/boot/config-" + release, "/lib/modules/" + release + "/config"} {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		defer f.Close()
		var r io.Reader = f
		if strings.HasSuffix(path, ".gz") {
			if r, err = gzip.NewReader(f); err != nil {
				continue
			}
		}
		return configValue(r, name)
	}
	return ""
}

func configValue(r io.Reader, name string) string {
	for s := bufio.NewScanner(r); s.Scan(); {
		if s.Text() == "# "+name+" is not set" {
			return "n"
		}
		if v, ok := strings.CutPrefix(s.Text(), name+"="); ok {
			return v
		}
	}
	return "n" // an option whose conditions are not met has no line
}

const confidentiality = "confidentiality"

// lockdown returns none, integrity or confidentiality; "" where securityfs is not mounted or the kernel has no lockdown.
func lockdown() string {
	b, err := os.ReadFile("/sys/kernel/security/lockdown")
	if err != nil {
		f, mountErr := detached("securityfs")
		if mountErr != nil {
			return ""
		}
		defer f.Close()
		if b, err = os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/lockdown", f.Fd())); err != nil {
			return ""
		}
	}
	return selected(string(b))
}

// selected returns the word in brackets.
func selected(s string) string {
	_, s, _ = strings.Cut(s, "[")
	s, _, ok := strings.Cut(s, "]")
	if !ok {
		return ""
	}
	return s
}

// btfModules are the modules that the kernel has types of.
func btfModules() []string {
	entries, err := os.ReadDir(filepath.Join(sysfs, "kernel/btf"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if e.Name() != "vmlinux" {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names
}
