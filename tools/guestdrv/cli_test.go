package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

// patience is longer than anything takes that works, on a busy machine.
const patience = time.Minute

// The tests in this file run both programs as users do.
var hostmedBin, guestdrvBin string

func TestMain(m *testing.M) { os.Exit(withBinaries(m)) }

func withBinaries(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shadowbell-cli-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	hostmedBin, err = process.Binary(context.Background(), "hostmed", "", dir)
	if err == nil {
		guestdrvBin, err = process.Binary(context.Background(), "guestdrv", "", dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// serve starts hostmed with a null, a memory and a file namespace, and returns the device.
func serve(t *testing.T, args ...string) (device string, h *process.Daemon) {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	args = append([]string{"--socket", socket, "--namespace", "null:size=1GiB", "--namespace", "mem:size=4MiB",
		"--namespace", "file:" + filepath.Join(dir, "disk") + ",size=4MiB,lba=4096"}, args...)
	h, err := process.StartHostmed(t.Context(), hostmedBin, nil, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Stop(); err != nil {
			t.Errorf("%v\n%s", err, h.Log())
		}
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there after the end (%v)", err)
		}
	})
	return "vfio-user:" + socket, h
}

// guest runs guestdrv and returns its exit code.
func guest(t *testing.T, stdin []byte, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, guestdrvBin, args...)
	var o, e bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("guestdrv %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

func TestWriteAndReadBack(t *testing.T) {
	device, _ := serve(t)
	data := bytes.Repeat([]byte("shadowbell"), 123_457) // 1.2 MB, no multiple of a block
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, nsid := range []string{"2", "3"} {
		code, _, stderr := guest(t, nil, "write", device, "--nsid", nsid, "--offset", "1000", "--file", file, "--sandbox-report")
		if code != 0 || !strings.Contains(stderr, "seccomp: ") || !strings.Contains(stderr, "guestdrv: wrote 1234570 bytes") {
			t.Fatalf("exit %d: %s", code, stderr)
		}
		back := file + "-" + nsid
		code, _, stderr = guest(t, nil, "read", device, "--nsid", nsid, "--offset", "1000", "--length", fmt.Sprint(len(data)), "--file", back)
		if code != 0 {
			t.Fatalf("exit %d: %s", code, stderr)
		}
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
			t.Errorf("namespace %s: what was read back differs (%v)", nsid, err)
		}
		// By stdin and stdout, into the middle of it.
		if code, _, stderr = guest(t, []byte("hello"), "write", device, "--nsid", nsid, "--offset", "5000", "-q"); code != 0 || strings.Contains(stderr, "wrote") {
			t.Fatalf("exit %d: %s", code, stderr)
		}
		code, stdout, _ := guest(t, nil, "read", device, "--nsid", nsid, "--offset", "4998", "--length", "9", "-q")
		if want := string(data[3998:4000]) + "hello" + string(data[4005:4007]); code != 0 || stdout != want {
			t.Errorf("namespace %s: exit %d, %q, want %q", nsid, code, stdout, want)
		}
	}
}

func TestIdentify(t *testing.T) {
	device, _ := serve(t)
	code, stdout, stderr := guest(t, nil, "identify", device)
	if code != 0 || !strings.Contains(stdout, "NVME Identify Namespace 3:") || !strings.Contains(stdout, "lbads:12") {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	code, stdout, stderr = guest(t, nil, "identify", device, "--json")
	if code != 0 || !json.Valid([]byte(stdout)) {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
}

func TestBench(t *testing.T) {
	for _, c := range []struct{ mode, flags, doorbells string }{
		{"shadow", "--nsid 1 --idle 100ms", "shadow"},
		{"shadow", "--nsid 1 --doorbells 2014 --jobs 2", "shadow"},
		{"shadow", "--nsid 1 --doorbells mmio --poll", "mmio"},
		{"shadow", "--nsid 2 --rw randrw --bs 512,4k,64k --verify --jobs 2 --qd 8", "shadow"},
		{"trap", "--nsid 3 --rw randrw --bs 4k,16k --verify", "mmio"},
		{"mmap", "--nsid 2 --rw write --verify", "mmap"},
	} {
		device, _ := serve(t, "--doorbells", c.mode)
		args := append([]string{"bench", device, "--json", "--runtime", "300ms", "--jobs", "1"}, strings.Fields(c.flags)...)
		code, stdout, stderr := guest(t, nil, args...)
		var r load.Result
		if err := json.Unmarshal([]byte(stdout), &r); err != nil || code != 0 {
			t.Errorf("%s %s: exit %d, %v: %s%s", c.mode, c.flags, code, err, stdout, stderr)
			continue
		}
		if r.IOPS <= 0 || r.Errors != 0 || r.VerifyErrors != 0 || r.Doorbells != c.doorbells || r.CPU.Host == nil || r.Seconds < 0.3 || r.Seconds > 30 {
			t.Errorf("%s %s: %s", c.mode, c.flags, stdout)
		}
		if strings.Contains(c.flags, "idle") && (r.Idle == nil || r.Idle.Host == nil) {
			t.Errorf("%s %s: nothing about idling: %s", c.mode, c.flags, stdout)
		}
	}
}

// TestBenchRecords: --events has what the sandboxed process did, command by command.
func TestBenchRecords(t *testing.T) {
	device, _ := serve(t)
	path := filepath.Join(t.TempDir(), "events")
	args := []string{"bench", device, "--json", "--runtime", "200ms", "--jobs", "1", "--rate", "2000", "--events", path, "--events-size", "4MiB"}
	code, stdout, stderr := guest(t, nil, args...)
	var result load.Result
	if err := json.Unmarshal([]byte(stdout), &result); err != nil || code != 0 {
		t.Fatalf("exit %d, %v: %s%s", code, err, stdout, stderr)
	}
	r, err := events.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if i := r.Info(); !strings.HasPrefix("guestdrv "+device, i.Name) || i.Records != 1<<17 {
		t.Errorf("%+v", i)
	}
	var published, reaped uint64
	out := make([]events.Record, 1000)
	for n := 1; n > 0; {
		if n, err = r.Read(out); err != nil || r.Lost() > 0 {
			t.Fatalf("%d lost, %v", r.Lost(), err)
		}
		for _, x := range out[:n] {
			switch x.Kind {
			case events.Publish:
				published++
			case events.Reap:
				reaped++
			}
			if x.Key.Controller() != 1 || x.Kind == events.Publish && (x.Blocks != 8 || x.NSID != 1) {
				t.Errorf("%+v", x)
			}
		}
	}
	if published == 0 || published != reaped || float64(reaped) < result.IOPS*result.Seconds*0.9 {
		t.Errorf("%d published, %d reaped, and %.0f by the table", published, reaped, result.IOPS*result.Seconds)
	}
	if code, _, stderr := guest(t, nil, args...); code != 2 || !strings.Contains(stderr, "it exists: remove it") {
		t.Errorf("once more: exit %d: %s", code, stderr)
	}
}

// TestVerifySeesANullDevice: a device that keeps nothing does not pass.
func TestVerifySeesANullDevice(t *testing.T) {
	device, _ := serve(t)
	code, stdout, stderr := guest(t, nil, "bench", device, "--nsid", "1", "--rw", "randrw", "--verify", "--span", "1MiB", "--jobs", "1", "--runtime", "50ms")
	if code != 1 || !strings.Contains(stdout, "the read brought nothing") || !strings.Contains(stderr, "blocks were not what they had to be") {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
}

// untilWritten waits until a load that writes has filled some of a sparse file.
func untilWritten(t *testing.T, file string) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		var st syscall.Stat_t
		if err := syscall.Stat(file, &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks >= 256 {
			return
		}
		if time.Since(begin) > patience {
			t.Fatalf("%s has %d blocks: the load does not begin", file, st.Blocks)
		}
	}
}

// TestInterruptPrintsWhatThereIs: SIGINT ends a measurement early, through the process that waits outside of the sandbox.
func TestInterruptPrintsWhatThereIs(t *testing.T) {
	device, _ := serve(t)
	cmd := exec.CommandContext(t.Context(), guestdrvBin, "bench", device, "--nsid", "3", "--rw", "randwrite", "--runtime", "300s", "--jobs", "1", "--json")
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	untilWritten(t, filepath.Join(filepath.Dir(strings.TrimPrefix(device, "vfio-user:")), "disk"))
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, e.String())
	}
	var r load.Result
	if err := json.Unmarshal(o.Bytes(), &r); err != nil || !r.Interrupted || r.IOPS <= 0 || r.Seconds > 200 {
		t.Errorf("%v: %s", err, o.String())
	}
}

// TestDeadHostEndsTheLoad: when hostmed dies the load ends in time, with an error.
func TestDeadHostEndsTheLoad(t *testing.T) {
	dir := t.TempDir()
	h, err := process.StartHostmed(t.Context(), hostmedBin, nil, "--socket", dir+"/s", "--namespace", "file:"+dir+"/disk,size=4MiB")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), guestdrvBin, "bench", "vfio-user:"+dir+"/s", "--rw", "randwrite", "--runtime", "300s", "--jobs", "2")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	untilWritten(t, dir+"/disk")
	begin := time.Now()
	_ = syscall.Kill(h.PID(), syscall.SIGKILL)
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(stderr.String(), "gone") || time.Since(begin) > patience {
		t.Errorf("exit %d after %v: %s", code, time.Since(begin), stderr.String())
	}
	if err := h.Stop(); err == nil {
		t.Error("hostmed was not killed")
	}
}

// TestErrorsAreOneLine: what the user can put right is one line that names it, and exit 2.
func TestErrorsAreOneLine(t *testing.T) {
	device, _ := serve(t)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for args, says := range map[string]string{
		"identify":                                   "<device>",
		"identify vfio-user:/no/such/socket":         "/no/such/socket",
		"identify vfio-user:" + plain:                plain,
		"identify nvme0":                             "vfio-user:PATH",
		"hop " + device:                              "hop",
		"bench DEVICE --bs 700":                      "blocks of 512 B",
		"bench DEVICE --nsid 9":                      "namespace 9",
		"bench DEVICE --nsid 2 --span 1TiB":          "namespace 2 has 4 MiB",
		"bench DEVICE --bs 2MiB":                     "at most 1 MiB",
		"bench DEVICE --jobs 100":                    "queue",
		"read DEVICE --offset 1TiB":                  "beyond the end of namespace 1",
		"read DEVICE --nsid 9":                       "namespace 9",
		"read DEVICE --file /no/such/file":           "/no/such/file",
		"read DEVICE --length 1TiB":                  "do not fit",
		"write DEVICE --file /no/such/file":          "/no/such/file",
		"write DEVICE --file /":                      "directory",
		"write DEVICE --nsid 2 --file " + os.Args[0]: "do not fit",
	} {
		code, stdout, stderr := guest(t, nil, strings.Fields(strings.ReplaceAll(args, "DEVICE", device))...)
		if code != 2 || stdout != "" || !strings.HasPrefix(stderr, "guestdrv: ") || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, says) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q; want exit 2 and one line that says %q", args, code, stdout, stderr, says)
		}
	}
}

func TestBusyController(t *testing.T) {
	device, h := serve(t)
	first := exec.CommandContext(t.Context(), guestdrvBin, "bench", device, "--runtime", "300s", "--jobs", "1")
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = first.Process.Signal(syscall.SIGTERM)
		_ = first.Wait()
	}()
	for deadline := time.Now().Add(patience); !strings.Contains(h.Log(), "client connected"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the first client does not connect:\n%s", h.Log())
		}
	}
	code, _, stderr := guest(t, nil, "identify", device)
	if code != 2 || !strings.Contains(stderr, "another client") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("exit %d: %s", code, stderr)
	}
}
