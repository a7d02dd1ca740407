package main

import (
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/shadowbell/shadowbell/ebpf/trace"
)

func parse(t *testing.T, args string) (*grammar, error) {
	t.Helper()
	g := &grammar{}
	p, err := kong.New(g, kong.Name("nvmetrace"), kong.Exit(func(int) {}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Parse(strings.Fields(args))
	return g, err
}

func TestFilters(t *testing.T) {
	type cmd struct {
		dev, qid uint16
		op       uint8
	}
	for _, c := range []struct {
		args     string
		yes, not []cmd
	}{
		{"", []cmd{{0, 0, 6}, {5, 9, 0x99}}, nil},
		{"--device nvme1 --device /dev/nvme12", []cmd{{1, 0, 6}, {12, 1, 2}}, []cmd{{0, 1, 2}, {2, 1, 2}}},
		{"--device nvme1,nvme2 --queue 1,3", []cmd{{1, 1, 2}, {2, 3, 2}}, []cmd{{1, 0, 2}, {1, 2, 2}, {3, 1, 2}}},
		// A name is of one command set, a number of both.
		{"--opcode read", []cmd{{0, 1, 2}}, []cmd{{0, 0, 2}, {0, 1, 1}}},
		{"--opcode get-log-page,Write", []cmd{{0, 0, 2}, {0, 1, 1}}, []cmd{{0, 1, 2}, {0, 0, 1}}},
		{"--opcode 0x02", []cmd{{0, 0, 2}, {0, 1, 2}}, []cmd{{0, 1, 1}}},
		{"--opcode discard", []cmd{{0, 1, 9}}, []cmd{{0, 0, 9}}},
	} {
		g, err := parse(t, "top "+c.args)
		if err != nil {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		for _, x := range c.yes {
			if !g.Top.match(x.dev, x.qid, x.op) {
				t.Errorf("%s leaves %+v out", c.args, x)
			}
		}
		for _, x := range c.not {
			if g.Top.match(x.dev, x.qid, x.op) {
				t.Errorf("%s lets %+v in", c.args, x)
			}
		}
	}
}

func TestEventFilters(t *testing.T) {
	g, err := parse(t, "snoop --opcode write --min-latency 1ms --queue 2")
	if err != nil {
		t.Fatal(err)
	}
	at := func(kind trace.Kind, qid uint16, op uint8, took time.Duration) *trace.Event {
		return &trace.Event{Kind: kind, QID: qid, Opcode: op, Latency: int64(took)}
	}
	for e, want := range map[*trace.Event]bool{
		at(trace.End, 2, write, time.Millisecond):     true,
		at(trace.End, 2, write, 999*time.Microsecond): false,
		at(trace.End, 2, read, time.Second):           false,
		at(trace.End, 1, write, time.Second):          false,
		at(trace.Start, 2, write, 0):                  false,
		at(trace.Timeout, 2, read, 0):                 true,
		at(trace.Timeout, 1, read, 0):                 false,
	} {
		if got := g.Snoop.matchEvent(e); got != want {
			t.Errorf("%+v: %v", *e, got)
		}
	}
}

func TestFlagsThatAreWrong(t *testing.T) {
	for args, says := range map[string]string{
		"hop":                            "hop",
		"top --device sda":               "write it as nvme0",
		"top --device nvme":              "write it as nvme0",
		"top --device nvme99999":         "write it as nvme0",
		"top --device nvme0n1":           "name its device, nvme0",
		"top --queue 65536":              "65536",
		"top --opcode reed":              "is no command",
		"top --opcode 256":               "is no command",
		"top --interval 0s":              "needs some time",
		"top --interval 1ms":             "at least 10ms",
		"top --duration=-1s":             "negative",
		"latency --by colour":            "must be one of",
		"latency --plot x.pdf":           ".svg or .png",
		"latency --heat --json":          "choose one",
		"latency --step 1ms":             "at least 10ms",
		"snoop --min-latency=-1s":        "negative",
		"snoop --write f --json":         "a record is not JSON",
		"replay":                         "<file>",
		"replay f --as hop":              "must be one of",
		"doorbells":                      "--control=PATH",
		"export --listen 9777":           "127.0.0.1:9777",
		"doorbells --vm 1 --interval 0s": "needs some time",
	} {
		_, err := parse(t, args)
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want one line that says %q", args, err, says)
		}
	}
}

// TestErrorsAreOneLine: what the user can put right is one line that names it, and exit 2.
func TestErrorsAreOneLine(t *testing.T) {
	newFake().use(t)
	for args, says := range map[string]string{
		"top --control /no/such/socket":       "start hostmed with --control /no/such/socket",
		"doorbells --control /no/such/socket": "start hostmed with --control",
		"export --listen 127.0.0.1:99999":     "--listen",
		"latency --plot /no/such/dir/x.svg":   "/no/such/dir",
		"snoop --write /no/such/dir/x":        "/no/such/dir",
		"snoop --write /etc/passwd":           "is there already",
		"replay /no/such/file":                "/no/such/file",
		"top --opcode reed":                   "see nvmetrace top --help",
	} {
		code, stdout, stderr := run(t, strings.Fields(args)...)
		if code != 2 || stdout != "" || !strings.HasPrefix(stderr, "nvmetrace: ") || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, says) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q; want exit 2 and one line that says %q", args, code, stdout, stderr, says)
		}
	}
}

// TestHelp: each command explains itself, with examples, and nothing is wider than a terminal has room for.
func TestHelp(t *testing.T) {
	for _, name := range []string{"top", "latency", "snoop", "replay", "doorbells", "export", "check"} {
		code, stdout, stderr := run(t, name, "--help")
		if code != 0 || stderr != "" || !strings.Contains(stdout, "Example") {
			t.Errorf("%s: exit %d, %s%s", name, code, stdout, stderr)
		}
	}
	if code, stdout, _ := run(t); code != 0 || !strings.Contains(stdout, "doorbells") {
		t.Errorf("exit %d: %s", code, stdout)
	}
}
