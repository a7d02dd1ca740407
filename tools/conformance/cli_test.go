package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/conformance/suite"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// serve runs a controller until the end of the test and returns its name as a device.
func serve(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	m, err := hostmed.New(hostmed.Config{Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}}}})
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	return "vfio-user:" + socket
}

// command runs the program and returns its exit code and what it wrote.
func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	dir := t.TempDir()
	files := make([]*os.File, 2)
	for i, name := range []string{"stdout", "stderr"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	p := cli.Program{Name: "conformance", Description: description, Grammar: &grammar{}, Commands: true}
	code = p.Run(args, &cli.Output{Stdout: files[0], Stderr: files[1]})
	read := func(f *os.File) string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	return code, read(files[0]), read(files[1])
}

func TestTheThreeOutputs(t *testing.T) {
	device := serve(t)
	code, out, _ := command(t, "run", device, "--filter", "admin.identify.*")
	if code != cli.OK || !strings.Contains(out, " passed, 0 failed, ") || !strings.Contains(out, "OACS.Namespace Management is 0") {
		t.Errorf("table: exit %d\n%s", code, out)
	}
	code, out, _ = command(t, "run", device, "--filter", "admin.identify.cns-0[01].*", "--tap")
	if code != cli.OK || !strings.HasPrefix(out, "TAP version 13\nok 1 - admin.identify.cns-01.version\n") || !strings.Contains(out, "# SKIP ") {
		t.Errorf("TAP: exit %d\n%s", code, out)
	}
	var last string
	for line := range strings.Lines(out) {
		last = line
	}
	if n := strings.Count(out, "\nok ") + strings.Count(out, "\nnot ok "); last != "1.."+itoa(n)+"\n" {
		t.Errorf("TAP of %d cases ends with %q", n, last)
	}
	code, out, _ = command(t, "run", device, "--filter", "reg.*", "--json")
	var j struct {
		Device                  string
		Passed, Failed, Skipped int
		Cases                   []resultJSON
	}
	if err := json.Unmarshal([]byte(out), &j); err != nil || code != cli.OK {
		t.Fatalf("JSON: exit %d, %v\n%s", code, err, out)
	}
	if j.Device != device || j.Failed != 0 || j.Passed+j.Skipped != len(j.Cases) || j.Cases[0].ID == "" || j.Cases[0].Demands == "" || j.Cases[0].By == "" || !j.Cases[0].Required {
		t.Errorf("%+v", j)
	}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

// TestNothingIsWrittenUnasked: cases that write are skipped unless a namespace or --destructive is named.
func TestNothingIsWrittenUnasked(t *testing.T) {
	device := serve(t)
	_, out, _ := command(t, "run", device, "--filter", "io.write.last")
	if !strings.Contains(out, "0 passed, 0 failed, 1 skipped") || !strings.Contains(out, "--destructive") {
		t.Errorf("without a word:\n%s", out)
	}
	for _, flags := range [][]string{{"--destructive"}, {"--nsid", "1"}} {
		_, out, _ = command(t, append([]string{"run", device, "--filter", "io.write.last"}, flags...)...)
		if !strings.Contains(out, "1 passed") {
			t.Errorf("with %v:\n%s", flags, out)
		}
	}
}

func TestUsage(t *testing.T) {
	for want, args := range map[string][]string{
		"no device":                  {"run"},
		"unknown kind":               {"run", "nvme0"},
		"start the other side first": {"run", "vfio-user:/nonexistent/socket"},
		"no such case":               {"run", "vfio-user:/nonexistent/socket", "--filter", "nothing.*"},
		"syntax error":               {"run", "vfio-user:/nonexistent/socket", "--filter", "[a"},
		"no such PCI function":       {"run", "sysfs:0000:ff:1f.7"},
		"want one such as":           {"run", "sysfs:disk"},
	} {
		code, _, stderr := command(t, args...)
		if code != cli.Usage || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%v: exit %d, %q, want %q", args, code, stderr, want)
		}
	}
	device := serve(t)
	if code, _, stderr := command(t, "run", device, "--nsid", "7"); code != cli.Usage || !strings.Contains(stderr, "namespace 7: the namespace cannot be tested with: no such active namespace") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	code, out, _ := command(t, "run", "--list", "--filter", "state.*")
	if code != cli.OK || !strings.Contains(out, "state.enable.timeout") || strings.Contains(out, "io.read") {
		t.Errorf("--list: exit %d\n%s", code, out)
	}
}

// TestAFailureIsSeen: a failed case is in each output, with what was seen, and makes the exit code 1.
func TestAFailureIsSeen(t *testing.T) {
	cases, err := suite.Cases("reg.cap.mqes")
	if err != nil {
		t.Fatal(err)
	}
	failed := suite.Result{Case: cases[0], Outcome: suite.Failed, Seen: "MQES is 0"}
	for name, p := range map[string]func(*strings.Builder) printer{
		"table": func(b *strings.Builder) printer { return &table{w: b} },
		"TAP":   func(b *strings.Builder) printer { return &tap{w: b} },
		"JSON":  func(b *strings.Builder) printer { return &object{w: b} },
	} {
		var b strings.Builder
		out := p(&b)
		out.result(failed)
		if err := out.end([]suite.Result{failed}, 0); err != nil {
			t.Error(err)
		}
		for _, want := range []string{"reg.cap.mqes", "MQES is 0", cases[0].Text} {
			if !strings.Contains(b.String(), want) {
				t.Errorf("%s has no %q:\n%s", name, want, b.String())
			}
		}
	}
}
