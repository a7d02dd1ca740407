package sandbox

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/bpf"
)

func tables() map[string][]Rule {
	m := map[string][]Rule{"base": baseRules(1), "libc": libcRules()}
	for _, u := range Uses() {
		m[u.Name] = u.Rules
	}
	return m
}

// Each table is sorted, no call stands twice, and each has its reason.
func TestRulesTable(t *testing.T) {
	for table, rules := range tables() {
		byNr, byName := map[uintptr]string{}, map[string]bool{}
		if !slices.IsSortedFunc(rules, func(a, b Rule) int { return strings.Compare(a.Name, b.Name) }) {
			t.Errorf("%s is not sorted", table)
		}
		for _, r := range rules {
			if r.Name == "" || r.Name != strings.ToLower(r.Name) {
				t.Errorf("%s: name %q", table, r.Name)
			}
			if len(r.Why) < len("sockets") {
				t.Errorf("%s has no reason", r.Name)
			}
			if (r.Args != nil) != (r.Limit != "") {
				t.Errorf("%s: arguments %v, in words %q", r.Name, r.Args, r.Limit)
			}
			if (r.Args != nil || r.Errno != 0) && len(strings.Fields(r.Why)) < 4 {
				t.Errorf("%s looks at arguments but does not say why: %q", r.Name, r.Why)
			}
			if old, ok := byNr[r.Nr]; ok || byName[r.Name] {
				t.Errorf("%s stands twice (%d, %s)", r.Name, r.Nr, old)
			}
			byNr[r.Nr], byName[r.Name] = r.Name, true
		}
	}
}

// What must never be let through, by name, so that a new row cannot slip in.
func TestRulesNeverAllow(t *testing.T) {
	never := []string{
		"open", "openat", "openat2", "creat", "socket", "socketpair", "connect", "accept", "accept4", "bind", "listen", "execve", "execveat", "fork", "vfork",
		"ptrace", "process_vm_readv", "process_vm_writev", "keyctl", "add_key", "request_key", "bpf", "io_uring_setup", "io_uring_enter", "io_uring_register",
		"userfaultfd", "memfd_create", "dup", "dup2", "dup3", "pipe", "pipe2", "eventfd2", "epoll_create1", "unshare", "setns", "mount", "pivot_root", "chroot",
		"copy_file_range", "sendfile", "splice", "tee", "vmsplice", "perf_event_open", "pidfd_open", "pidfd_getfd", "tkill", "rt_sigqueueinfo", "prlimit64", "setrlimit", "seccomp", "arch_prctl", "pkey_mprotect", "mremap",
	}
	exceptions := map[string][]string{"server": {"accept4"}, "ublk": {"io_uring_enter"}}
	for table, rules := range tables() {
		for _, r := range rules {
			if slices.Contains(never, r.Name) && r.Errno == 0 && !slices.Contains(exceptions[table], r.Name) {
				t.Errorf("%s lets %s through", table, r.Name)
			}
		}
	}
	for _, name := range []string{"clone", "close", "fcntl", "futex", "ioctl", "kill", "madvise", "mmap", "prctl", "sched_setaffinity", "tgkill"} {
		i := slices.IndexFunc(baseRules(1), func(r Rule) bool { return r.Name == name })
		if i < 0 || baseRules(1)[i].Args == nil {
			t.Errorf("%s is let through with any arguments", name)
		}
	}
}

// The filter must fit: BPF_MAXINSNS is 4096.
func TestFilterCompiles(t *testing.T) {
	for _, p := range []Policy{{}, {Action: ActionErrno}, {Action: ActionTrap}, {MapFDs: []int{3, 4, 5, 6, 7}}, {Uses: Uses()}, {Uses: []Use{FileWrites(), Ublk(3, 4, 5, 6)}}} {
		for _, cgo := range []bool{false, true} {
			f, err := p.compile(1, cgo)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := bpf.Compile(f.code, true); err != nil {
				t.Error(err)
			}
			n := 0
			for _, r := range baseRules(1) {
				if r.Errno == 0 {
					n++
				}
			}
			if f.calls < n {
				t.Errorf("%d calls in the filter, %d in the table", f.calls, n)
			}
		}
	}
}

func TestLandlockRules(t *testing.T) {
	for abi, want := range map[int]unix.LandlockRulesetAttr{
		1:  {Handled_access_fs: 1<<13 - 1},
		2:  {Handled_access_fs: 1<<14 - 1},
		3:  {Handled_access_fs: 1<<15 - 1},
		4:  {Handled_access_fs: 1<<15 - 1, Handled_access_net: 3},
		5:  {Handled_access_fs: 1<<16 - 1, Handled_access_net: 3},
		6:  {Handled_access_fs: 1<<16 - 1, Handled_access_net: 3, Scoped: 1},
		7:  {Handled_access_fs: 1<<16 - 1, Handled_access_net: 3, Scoped: 1},
		9:  {Handled_access_fs: 1<<17 - 1, Handled_access_net: 3, Scoped: 1},
		10: {Handled_access_fs: 1<<17 - 1, Handled_access_net: 15, Scoped: 1},
		99: {Handled_access_fs: 1<<17 - 1, Handled_access_net: 15, Scoped: 1},
	} {
		if got, _ := landlockRules(abi, false); got != want {
			t.Errorf("ABI %d: %+v, want %+v", abi, got, want)
		}
	}
	if got, _ := landlockRules(6, true); got.Scoped != 3 {
		t.Errorf("scoped %#x with the erratum fixed", got.Scoped)
	}
}

func TestParsers(t *testing.T) {
	st, err := parseThreadStatus([]byte("Name:\tx\nCapInh:\t0000000000000001\nCapPrm:\t0000000000000002\nCapEff:\t0\nCapBnd:\t8\nCapAmb:\t0000000000000004\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\n"))
	if want := (threadStatus{caps: 7, bounding: 8, noNewPrivs: 1, seccomp: 2, filters: 3}); err != nil || st != want {
		t.Errorf("%+v, %v", st, err)
	}
	for _, bad := range []string{"", "NoNewPrivs:\t1\n", "NoNewPrivs: x\nSeccomp: 2\n", "NoNewPrivs: 1\nSeccomp: 2\nCapEff: zz\n"} {
		if _, err := parseThreadStatus([]byte(bad)); err == nil {
			t.Errorf("%q is a status", bad)
		}
	}
	ids, err := parseIDMap([]byte("         0       1000          1\n         1     100000      65536\n"))
	if err != nil || len(ids) != 2 || ids[1].ContainerID != 1 || ids[1].HostID != 1 || ids[1].Size != 65536 {
		t.Errorf("%v, %v", ids, err)
	}
	for _, bad := range []string{"", "0 0\n", "0 0 0\n", "-1 0 1\n", "a b c\n"} {
		if _, err := parseIDMap([]byte(bad)); err == nil {
			t.Errorf("%q is an id map", bad)
		}
	}
	set := nsSet{"user": "user:[1]", "mnt": "mnt:[2]"}
	if got := parseNSSet(set.String()); len(got) != 2 || got["mnt"] != "mnt:[2]" {
		t.Errorf("%v", got)
	}
}
