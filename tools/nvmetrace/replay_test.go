package main

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// record writes a file by snoop --write: three seconds of reads and writes, a failed Identify, a timeout and a reset.
func record(t *testing.T) (file string, events int) {
	t.Helper()
	f := newFake()
	f.use(t)
	r := rand.New(rand.NewPCG(1, 2))
	for s := range 3 {
		at := time.Duration(s) * time.Second
		f.add(load(r, at, 100, read, 100*time.Microsecond)...)
		f.add(load(r, at, 10, write, 5*time.Millisecond)...)
		events += 220
	}
	id := admin(nvme.AdminIdentify, 0, 1)
	id.Status, id.Time = uint16(nvme.StatusInvalidField), 3e9
	f.add(id, trace.Event{Kind: trace.Timeout, QID: 1, CID: 3, Opcode: read, Time: 3e9}, trace.Event{Kind: trace.Reset, Time: 3e9})
	events += 3
	f.lost.Ring = 9
	file = filepath.Join(t.TempDir(), "record")
	code, stdout, stderr := run(t, "snoop", "--write", file, "--count", "663")
	if code != 0 || stdout != "" || !strings.Contains(stderr, "663 events in "+file+"; LOST: 9 events found no room") {
		t.Fatalf("exit %d: %s%s", code, stdout, stderr)
	}
	return file, events
}

func TestReplayAsSnoop(t *testing.T) {
	file, events := record(t)
	code, stdout, stderr := run(t, "replay", file, "--starts")
	if code != 0 || !strings.Contains(stderr, "LOST: 9 events") || !strings.HasPrefix(stderr, "nvmetrace: "+file+": of ") || strings.Count(stderr, "\n") != 2 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	if n := strings.Count(stdout, "\n"); n != events+1 {
		t.Errorf("%d lines of %d events", n, events)
	}
	has(t, stdout, "TIME s", "> READ nsid=1", "IDENTIFY", "TIMEOUT of READ", "RESET of the controller")
	_, stdout, _ = run(t, "replay", file, "--opcode", "write", "--min-latency", "20ms", "--json")
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); {
		var e eventJSON
		if err := d.Decode(&e); err != nil {
			t.Fatal(err)
		}
		if e.Kind == "end" && (e.Command != "Write" || e.Latency < 20e6) {
			t.Errorf("%+v", e)
		}
	}
	_, stdout, _ = run(t, "replay", file, "--admin")
	if n := strings.Count(stdout, "\n"); n != 3 { // head, Identify, reset
		t.Errorf("%s", stdout)
	}
}

func TestReplayAsLatency(t *testing.T) {
	file, _ := record(t)
	svg := filepath.Join(t.TempDir(), "x.svg")
	code, stdout, stderr := run(t, "replay", file, "--as", "latency", "--plot", svg, "--step", "500ms", "--heat")
	if code != 0 || !strings.Contains(stderr, "drew "+svg) {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	has(t, stdout, "|100us", "0.5 s", "3.0 s", file, "nvme0 Read 300", "nvme0 Write 30", "nvme0 Identify 1 250 us", "nvme0 Read: 300 commands")
	code, stdout, _ = run(t, "replay", file, "--as", "latency", "--json", "--by", "queue", "--queue", "1")
	var j latencyJSON
	if err := json.Unmarshal([]byte(stdout), &j); err != nil || code != 0 || len(j.Groups) != 1 || j.Groups[0].Count != 165 || j.Time != nil {
		t.Errorf("%v, exit %d: %s", err, code, stdout)
	}
}

func TestReplayAsTop(t *testing.T) {
	file, _ := record(t)
	_, stdout, _ := run(t, "replay", file, "--as", "top", "--interval", "1s", "--json")
	var frames []topJSON
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); {
		var j topJSON
		if err := d.Decode(&j); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		frames = append(frames, j)
	}
	if len(frames) != 4 || frames[0].Seconds != 1 {
		t.Fatalf("%d frames: %s", len(frames), stdout)
	}
	var all uint64
	for _, f := range frames {
		for _, d := range f.Devices {
			all += d.Commands
		}
	}
	if all != 331 {
		t.Errorf("%d commands in all", all)
	}
	code, stdout, _ := run(t, "replay", file, "--as", "top")
	if code != 0 {
		t.Error(code)
	}
	has(t, stdout, "nvme0 ", "admin queue", "queue 1", "queue 2")
}

// TestReplayOfDamagedFiles: what is cut off is told and shown as far as it goes; what is no record is one line.
func TestReplayOfDamagedFiles(t *testing.T) {
	file, events := record(t)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cut := file + "-cut"
	if err := os.WriteFile(cut, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := run(t, "replay", cut, "--starts")
	if n := strings.Count(stdout, "\n"); code != 0 || n < events/4 || n > events || !strings.Contains(stderr, "cut off") {
		t.Errorf("exit %d, %d lines: %s", code, n, stderr)
	}
	for name, content := range map[string]string{"text": "hello world", "empty": "", "header": string(b[:40])} {
		if err := os.WriteFile(cut, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		code, stdout, stderr := run(t, "replay", cut)
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, cut) {
			t.Errorf("%s: exit %d, %q, %q", name, code, stdout, stderr)
		}
	}
}

// TestReplayIsBounded: a record that claims to be of ten thousand years is not gone through second by second.
func TestReplayIsBounded(t *testing.T) {
	file := filepath.Join(t.TempDir(), "record")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := trace.NewWriter(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1 << 62} {
		if err := w.Event(trace.Event{Kind: trace.End, Opcode: read, QID: 1, Time: at}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := run(t, "replay", file, "--as", "latency", "--heat")
	if code != 1 || !strings.Contains(stderr, "nothing happens for") || strings.Count(stderr, "\n") != 2 {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if code, _, stderr := run(t, "replay", file, "--as", "top"); code != 0 {
		t.Errorf("exit %d: %s", code, stderr)
	}
}
