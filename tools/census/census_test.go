package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

// kept are rules that a run need not use, each with the reason why it is there all the same.
var kept = map[string]string{
	"always/clock_gettime":   "the vDSO asks the kernel where the clock source is not the TSC, as in some virtual machines",
	"always/getrandom":       "a vDSO that has it is Linux 6.11, and it asks the kernel on a new thread",
	"always/prctl":           "memory is named on kernels with CONFIG_ANON_VMA_NAME; Enter asks where there is no /proc",
	"always/restart_syscall": "ptrace stands in the way of stopping; guestdrv/sandbox's TestStopAndContinue dies without it",
}

// elsewhere are tables whose users need a machine of their own.
var elsewhere = map[string]string{
	"libc":        "binaries that are linked with cgo are for tests: guestdrv/sandbox's own, under the race detector",
	"mapping":     "no program here maps memory after the lock; guestdrv/sandbox's tests do",
	"vfio":        "needs an IOMMU: tools/vmlab/box",
	"file writes": "needs a PCI function: tools/vmlab/box",
	"ublk":        "needs ublk: tools/vmlab/box",
}

type rig struct {
	t      *testing.T
	bin    map[string]string
	dir    string
	device string
	used   map[string]int
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, bin: map[string]string{}, dir: t.TempDir(), used: map[string]int{}}
	for _, name := range []string{"hostmed", "guestdrv", "census"} {
		b, err := process.Binary(t.Context(), name, "", r.dir)
		if err != nil {
			t.Fatal(err)
		}
		r.bin[name] = b
	}
	socket := filepath.Join(r.dir, "s")
	h, err := process.StartHostmed(t.Context(), r.bin["hostmed"], nil, "--socket", socket, "--namespace", "mem:size=8MiB", "--namespace", "null:size=1GiB",
		"--namespace", "fault:drop@read@first=1,over=mem:size=1MiB")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Stop(); err != nil {
			t.Errorf("%v\n%s", err, h.Log())
		}
	})
	r.device = "vfio-user:" + socket
	return r
}

// census runs a program under census and adds up what it used. while runs beside it, with census's process.
func (r *rig) census(want int, stdin []byte, stderr *os.File, while func(*os.Process), program string, args ...string) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.bin["census"], append([]string{r.bin[program]}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errs
	if stderr != nil {
		cmd.Stderr = stderr
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	if while != nil {
		while(cmd.Process)
	}
	err := cmd.Wait()
	var rep Report
	if jsonErr := json.Unmarshal(out.Bytes(), &rep); err != nil || jsonErr != nil || rep.Exit != want || rep.Shut != 1 || len(rep.Other) > 0 {
		r.t.Errorf("%s %v: %v, %v, %s\n%s", program, args, err, jsonErr, out.Bytes(), errs.Bytes())
	}
	for name, n := range rep.Used {
		r.used[name] += n
	}
}

// Every rule that lets a system call through, or answers it, is used by a real run, or kept for a reason. A rule that nobody uses is a way in that
// nobody needs.
func TestEveryRuleIsUsed(t *testing.T) {
	if testing.Short() {
		t.Skip("a dozen runs under ptrace take 20 s: not with -short")
	}
	r := newRig(t)
	file := filepath.Join(r.dir, "data")
	data := bytes.Repeat([]byte("shadowbell"), 200_001)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	d := r.device
	tty := terminal(t)
	r.census(0, nil, nil, nil, "guestdrv", "identify", d)
	r.census(0, nil, nil, nil, "guestdrv", "identify", d, "--json", "-v")
	r.census(0, nil, nil, nil, "guestdrv", "write", d, "--file", file)
	r.census(0, data, nil, nil, "guestdrv", "write", d)
	r.census(0, nil, nil, nil, "guestdrv", "read", d, "--file", file, "--length", "2M")
	r.census(0, nil, nil, nil, "guestdrv", "read", d, "--length", "1M", "--quiet")
	bench := []string{"bench", d, "--runtime", "300ms", "--jobs"}
	r.census(0, nil, nil, nil, "guestdrv", append(bench, "2", "--rw", "randrw", "--verify", "--bs", "512,4k,64k")...)
	r.census(0, nil, nil, nil, "guestdrv", append(bench, "1", "--nsid", "2", "--doorbells", "mmio", "--qd", "1")...)
	r.census(0, nil, nil, nil, "guestdrv", append(bench, "1", "--nsid", "2", "--poll", "--idle", "50ms", "--cpus", "0")...)
	r.census(0, nil, tty, nil, "guestdrv", append(bench, "1", "--nsid", "2", "--spin", "off")...)
	// A command that is late: Abort, and a reset of the controller.
	r.census(1, nil, nil, nil, "guestdrv", "read", d, "--nsid", "3", "--timeout", "2s", "--file", os.DevNull)
	socket := filepath.Join(r.dir, "nbd")
	r.census(0, nil, nil, func(p *os.Process) {
		nbdClient(t, socket)
		_ = p.Signal(unix.SIGTERM)
	}, "guestdrv", "serve", d, "--nbd", "unix:"+socket)
	r.census(128+int(unix.SIGTERM), nil, nil, nil, "census", "corners")

	for _, table := range sandbox.Tables() {
		if elsewhere[table.Name] != "" {
			continue
		}
		for _, rule := range table.Rules {
			name := table.Name + "/" + rule.Name
			if r.used[name] == 0 && kept[name] == "" {
				t.Errorf("%s: no run uses it (%s)", name, rule.Why)
			}
		}
	}
	for name := range kept {
		if !slices.ContainsFunc(sandbox.Tables(), func(t sandbox.Table) bool {
			return slices.ContainsFunc(t.Rules, func(r sandbox.Rule) bool { return t.Name+"/"+r.Name == name })
		}) {
			t.Errorf("%s is kept and is no rule", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.used)) {
		t.Logf("%7d %s", r.used[name], name)
	}
}

// terminal is one that swallows what is written to it.
func terminal(t *testing.T) *os.File {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw := int(ptmx.Fd())
	if err := unix.IoctlSetPointerInt(raw, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(raw, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, ptmx) // ends with EIO when the other side is closed
	}()
	t.Cleanup(func() {
		_ = tty.Close()
		<-done
		_ = ptmx.Close()
	})
	return tty
}

// nbdClient waits for the server, reads a block, writes it back, and leaves; the simplest handshake there is.
func nbdClient(t *testing.T, socket string) {
	t.Helper()
	var c net.Conn
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var err error
		if c, err = net.Dial("unix", socket); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Error(err)
			return
		}
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	send := func(parts ...any) {
		for _, p := range parts {
			if err := binary.Write(c, binary.BigEndian, p); err != nil {
				t.Error(err)
			}
		}
	}
	get := func(n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Error(err)
		}
		return b
	}
	if hello := get(18); !strings.HasPrefix(string(hello), "NBDMAGICIHAVEOPT") {
		t.Errorf("%q", hello)
	}
	send(uint32(1|2), []byte("IHAVEOPT"), uint32(1), uint32(1), []byte("1")) // fixed newstyle, no zeroes; export name "1"
	get(10)
	const read, write, leave = 0, 1, 2
	send(uint32(0x25609513), uint16(0), uint16(read), uint64(1), uint64(0), uint32(4096))
	data := get(16 + 4096)[16:]
	send(uint32(0x25609513), uint16(1), uint16(write), uint64(2), uint64(0), uint32(4096), data) // FUA
	if reply := get(16); binary.BigEndian.Uint32(reply[4:]) != 0 {
		t.Errorf("write: % x", reply)
	}
	send(uint32(0x25609513), uint16(0), uint16(leave), uint64(3), uint64(0), uint32(0))
}
