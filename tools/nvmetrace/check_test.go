package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/ebpf/trace"
)

func hooks(nvme, block bool) []trace.Hook {
	why := "this kernel is built without it"
	if nvme {
		why = ""
	}
	return []trace.Hook{
		{Name: "nvme:nvme_setup_cmd", Part: trace.NVMe, Needed: true, Attached: nvme, How: trace.TPBTF, Why: why, Without: "commands"},
		{Name: "nvme:nvme_complete_rq", Part: trace.NVMe, Needed: true, Attached: nvme, How: trace.TPBTF, Why: why, Without: "commands"},
		{Name: "nvme_timeout()", Part: trace.NVMe, Why: "inlined", Without: "timeouts"},
		{Name: "block:block_rq_issue", Part: trace.Block, Needed: true, Attached: block, How: trace.TPBTF, Why: "no"},
		{Name: "kvm:kvm_exit", Part: trace.KVM, Needed: true, Why: "the kernel has no KVM", Without: "exits"},
	}
}

func TestCheck(t *testing.T) {
	commands := func(works bool) []trace.Command {
		c := []trace.Command{{Name: "top", Works: works}, {Name: "snoop", Works: works}, {Name: "doorbells", Works: true, Why: "without KVM: none"}}
		if !works {
			c[0].Why, c[1].Why = "no driver", "no driver"
		}
		return c
	}
	for _, c := range []struct {
		name string
		k    trace.Kernel
		code int
		has  []string
	}{
		{"all", trace.Kernel{Release: "6.12", BTF: "/sys/kernel/btf/vmlinux", Tracefs: "/sys/kernel/tracing", Lockdown: "none", Have: []string{"CAP_BPF"},
			Devices: []trace.Device{{Name: "nvme0"}}, Hooks: hooks(true, true), Commands: commands(true)}, 0,
			[]string{"kernel 6.12", "BTF /sys/kernel", "tracefs /sys", "lockdown none", "capabilities CAP_BPF", "nvme driver there", "NVMe devices nvme0",
				"nvme:nvme_setup_cmd tp_btf", "nvme_timeout() - inlined; without it: timeouts", "block:block_rq_issue tp_btf", "top yes", "snoop yes", "doorbells in part"}},
		{"no driver", trace.Kernel{Tracefs: "private", Driver: "not built in", Hooks: hooks(false, true), Commands: commands(false)}, 0,
			[]string{"BTF none", "a private mount works", "lockdown unknown", "nvme driver not built in", "NVMe devices none", "this kernel is built without it; without it: commands",
				"nvme_complete_rq - the same; without it: commands", "top disks only no driver", "snoop no no driver"}},
		{"nothing", trace.Kernel{Hooks: hooks(false, false), Commands: commands(false)}, 1, []string{"tracefs none", "top no"}},
		{"refused", trace.Kernel{Refused: "CAP_BPF missing: run as root", Missing: []string{"CAP_BPF"}, Commands: commands(false)}, 1,
			[]string{"none; missing: CAP_BPF", "no hook could be tried: CAP_BPF missing: run as root", "top no"}},
	} {
		before := probe
		probe = func() *trace.Kernel { return &c.k }
		code, stdout, stderr := run(t, "check")
		_, asJSON, _ := run(t, "check", "--json")
		probe = before
		if code != c.code || (code != 0) != (stderr != "") || strings.Count(stderr, "\n") > 1 {
			t.Errorf("%s: exit %d: %s", c.name, code, stderr)
		}
		has(t, stdout, c.has...)
		var j checkJSON
		if err := json.Unmarshal([]byte(asJSON), &j); err != nil || j.Works != (c.code == 0) || len(j.Commands) != 3 || strings.Contains(asJSON, "null") {
			t.Errorf("%s: %v: %s", c.name, err, asJSON)
		}
	}
}
