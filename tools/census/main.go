// Command census runs a program and prints which rules of the sandbox it uses: those of guestdrv/sandbox that let a system call through, or answer it,
// after the program has shut the box. It is for the test that finds rules that nobody uses, here and in virtual machines.
//
//	census guestdrv identify vfio-user:/run/vm1.sock     one JSON object on stdout; the program's own stdout goes to stderr
//	census corners                                       no program: what the Go runtime does in its less usual moments, inside the box
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/tools/internal/systrace"
)

// Report is what census prints.
type Report struct {
	Exit  int            `json:"exit"` // the program's; 128 and the signal if one ended it
	Shut  int            `json:"shut"` // processes that shut the box
	Used  map[string]int `json:"used"` // calls by rule, as "table/system call"
	Other []string       `json:"other,omitempty"`
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: census PROGRAM [ARGUMENT...] | census corners")
		os.Exit(2)
	}
	if os.Args[1] == "corners" {
		corners()
		return
	}
	r, err := run(os.Args[1], os.Args[2:]...)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(r)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "census:", err)
		os.Exit(1)
	}
}

// rule is a rule with its name in the report.
type rule struct {
	name  string
	match func(uint64, [6]uint64) bool
}

func rules() ([]rule, error) {
	var list []rule
	for _, t := range sandbox.Tables() {
		for _, r := range t.Rules {
			m, err := r.Matcher()
			if err != nil {
				return nil, err
			}
			list = append(list, rule{t.Name + "/" + r.Name, m})
		}
	}
	return list, nil
}

func run(program string, args ...string) (*Report, error) {
	list, err := rules()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stderr, os.Stderr
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	defer close(signals)
	defer signal.Stop(signals)
	r := &Report{Used: map[string]int{}}
	res, err := systrace.Run(cmd, signals, func(c systrace.Call) {
		known := false
		for _, x := range list {
			if x.match(c.Nr, c.Args) {
				r.Used[x.name]++
				known = true
			}
		}
		if !known {
			r.Other = append(r.Other, fmt.Sprintf("system call %d with %#x", c.Nr, c.Args))
		}
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(r.Other)
	r.Other, r.Shut, r.Exit = slices.Compact(r.Other), res.Shut, res.Status.ExitStatus()
	if res.Status.Signaled() {
		r.Exit = 128 + int(res.Status.Signal())
	}
	return r, nil
}
