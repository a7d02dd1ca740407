package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type checkCmd struct {
	JSON bool `name:"json" help:"Print one JSON object. See above for its fields."`
}

// Help is what stands below the flags.
func (checkCmd) Help() string { return checkHelp }

const checkHelp = `What this kernel and this process have for tracing, hook by hook, and what follows for each command. Each hook is attached for a moment; nothing is changed.

The exit code is 0 if any of the commands that trace the kernel can work at least in part, and 1 otherwise.

Examples

    nvmetrace check
    nvmetrace check --json | jq '.hooks[] | select(.attached | not)'

The fields of --json

  works          whether the exit code is 0
  kernel, arch   its release, and the processor
  btf, modules   where the kernel's types are (empty: nowhere), and which modules have their own
  tracefs        where it is mounted; private: it can be had without; empty: not at all
  lockdown       none, integrity or confidentiality; empty: the kernel does not say
  unprivileged_bpf_disabled   0, 1 or 2; -1: unknown
  capabilities   {have,missing} of those that tracing needs
  no_driver      why there is no nvme driver; empty: there is one
  devices        the NVMe devices that there are
  hooks          [{name,part,needed,attached,how,why,without}] how is tp_btf, tracepoint, raw_tp or fentry; without: what is then missing
  refused        why no hook could be tried; empty: they were
  commands       [{name,works,why}] works is yes, in part, disks only or no`

// checkJSON is what --json prints.
type checkJSON struct {
	Works        bool          `json:"works"`
	Kernel       string        `json:"kernel"`
	Arch         string        `json:"arch"`
	BTF          string        `json:"btf"`
	Modules      []string      `json:"modules"`
	Tracefs      string        `json:"tracefs"`
	Lockdown     string        `json:"lockdown"`
	Unprivileged int           `json:"unprivileged_bpf_disabled"`
	Capabilities capsJSON      `json:"capabilities"`
	NoDriver     string        `json:"no_driver"`
	Devices      []string      `json:"devices"`
	Hooks        []hookJSON    `json:"hooks"`
	Refused      string        `json:"refused"`
	Commands     []commandJSON `json:"commands"`
}

type capsJSON struct {
	Have    []string `json:"have"`
	Missing []string `json:"missing"`
}

type hookJSON struct {
	Name     string `json:"name"`
	Part     string `json:"part"`
	Needed   bool   `json:"needed"`
	Attached bool   `json:"attached"`
	How      string `json:"how,omitempty"`
	Why      string `json:"why,omitempty"`
	Without  string `json:"without,omitempty"`
}

type commandJSON struct {
	Name  string `json:"name"`
	Works string `json:"works"`
	Why   string `json:"why,omitempty"`
}

// probe is trace.Probe; a test puts its own here.
var probe = trace.Probe

// errNothing is what check ends with where nothing can be traced.
var errNothing = errors.New("nothing can be traced here: the table says why, and what helps")

// Run prints what there is.
func (c *checkCmd) Run(out *cli.Output) error {
	k := probe()
	var err error
	if c.JSON {
		e := json.NewEncoder(out.Stdout)
		e.SetIndent("", "  ")
		err = e.Encode(toCheckJSON(k))
	} else {
		_, err = fmt.Fprint(out.Stdout, checkText(k))
	}
	if err == nil && !anything(k) {
		return errNothing
	}
	return err
}

// anything says whether some part of the kernel can be traced: all hooks that it needs are there.
func anything(k *trace.Kernel) bool {
	works := map[trace.Part]bool{}
	for _, h := range k.Hooks {
		if _, seen := works[h.Part]; !seen {
			works[h.Part] = true
		}
		if h.Needed && !h.Attached {
			works[h.Part] = false
		}
	}
	return k.Refused == "" && (works[trace.NVMe] || works[trace.Block] || works[trace.KVM])
}

func toCheckJSON(k *trace.Kernel) checkJSON {
	j := checkJSON{
		Works: anything(k), Kernel: k.Release, Arch: k.Arch, BTF: k.BTF, Modules: list(k.Modules), Tracefs: k.Tracefs, Lockdown: k.Lockdown, Unprivileged: k.Unprivileged,
		Capabilities: capsJSON{list(k.Have), list(k.Missing)}, NoDriver: k.Driver, Devices: deviceNames(k), Refused: k.Refused,
		Hooks: []hookJSON{}, Commands: []commandJSON{},
	}
	for _, h := range k.Hooks {
		j.Hooks = append(j.Hooks, hookJSON{h.Name, string(h.Part), h.Needed, h.Attached, h.How, h.Why, h.Without})
	}
	for _, c := range k.Commands {
		j.Commands = append(j.Commands, commandJSON{c.Name, commandWorks(&c, k), c.Why})
	}
	return j
}

// list is s, and in JSON [] and not null.
func list(s []string) []string { return append([]string{}, s...) }

func deviceNames(k *trace.Kernel) []string {
	names := []string{}
	for _, d := range k.Devices {
		names = append(names, d.Name)
	}
	return names
}

// checkText is k for people.
func checkText(k *trace.Kernel) string {
	var b strings.Builder
	or := func(s, instead string) string {
		if s == "" {
			return instead
		}
		return s
	}
	above := strings.NewReplacer() // what stands in the table already
	if k.Refused != "" {
		above = strings.NewReplacer(k.Refused, "see above")
	} else if k.Driver != "" {
		above = strings.NewReplacer(k.Driver, "see nvme driver")
	}
	facts := text.Table{Left: map[int]bool{1: true}}
	facts.Add("kernel", k.Release+" "+k.Arch)
	facts.Add("BTF", or(k.BTF, "none: the kernel is built without CONFIG_DEBUG_INFO_BTF"))
	facts.Add("tracefs", or(map[string]string{"private": "not mounted; a private mount works"}[k.Tracefs], or(k.Tracefs, "none")))
	facts.Add("lockdown", or(k.Lockdown, "unknown"))
	caps := or(strings.Join(k.Have, ", "), "none")
	if len(k.Missing) > 0 {
		caps += "; missing: " + strings.Join(k.Missing, ", ")
	}
	facts.Add("capabilities", caps)
	facts.Add("nvme driver", or(k.Driver, "there"))
	facts.Add("NVMe devices", or(strings.Join(deviceNames(k), ", "), "none"))
	b.WriteString(facts.String() + "\n")

	if k.Refused != "" {
		fmt.Fprintf(&b, "  no hook could be tried: %s\n\n", k.Refused)
	} else {
		hooks := text.Table{Head: []string{"hook", "how", "why not, and what is missing without it"}, Left: map[int]bool{1: true, 2: true}}
		last := trace.Part("")
		why := ""
		for _, h := range k.Hooks {
			if h.Part != last {
				last, why = h.Part, ""
			}
			switch {
			case h.Attached:
				hooks.Add(h.Name, h.How)
			case h.Why == why:
				hooks.Add(h.Name, "-", "the same; without it: "+h.Without)
			default:
				why = h.Why
				hooks.Add(h.Name, "-", above.Replace(h.Why)+"; without it: "+h.Without)
			}
		}
		b.WriteString(hooks.String() + "\n")
	}
	commands := text.Table{Head: []string{"command", "works", "why not"}, Left: map[int]bool{1: true, 2: true}}
	for _, c := range k.Commands {
		commands.Add(c.Name, commandWorks(&c, k), above.Replace(c.Why))
	}
	b.WriteString(commands.String())
	return b.String()
}

// commandWorks says how much of a command does: yes, in part, disks only or no.
func commandWorks(c *trace.Command, k *trace.Kernel) string {
	switch {
	case !c.Works && insteadDisks(c.Name, k):
		return "disks only"
	case !c.Works:
		return "no"
	case c.Why != "":
		return "in part"
	}
	return "yes"
}

// insteadDisks says whether a command shows the block layer where there is no driver to trace.
func insteadDisks(name string, k *trace.Kernel) bool {
	if name != "top" && name != "latency" && name != "export" {
		return false
	}
	n := 0
	for _, h := range k.Hooks {
		if h.Part != trace.Block || !h.Needed {
			continue
		}
		if !h.Attached {
			return false
		}
		n++
	}
	return n > 0
}
