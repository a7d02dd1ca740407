package faults

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// holdings is what this process holds, hostmed in it.
type holdings struct {
	fds        map[string]int // by what they are
	mapped     int            // mappings of guests' memory
	goroutines int            // of hostmed
}

func held(t *testing.T) holdings {
	t.Helper()
	h := holdings{fds: map[string]int{}}
	const dir = "/proc/self/fd"
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue // that of the directory, for one
		}
		kind, inode, _ := strings.Cut(to, ":[")
		switch {
		case kind == "anon_inode":
			kind = inode // what it is
		case strings.HasPrefix(kind, "/sys/"), strings.HasPrefix(kind, "/dev/"):
			continue // the runtime's
		}
		h.fds[strings.TrimSuffix(kind, "]")]++
	}
	// A worker keeps its ring, with an eventfd, for each file that it ever worked on.
	h.fds["eventfd"] -= h.fds["io_uring"]
	delete(h.fds, "io_uring")
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	h.mapped = bytes.Count(maps, []byte("/memfd:memory-backend-memfd"))
	stacks := make([]byte, 1<<20)
	for _, g := range bytes.Split(stacks[:runtime.Stack(stacks, true)], []byte("\n\n")) {
		if bytes.Contains(g, []byte("shadowbell/hostmed")) {
			h.goroutines++
		}
	}
	return h
}

func (h holdings) String() string {
	return fmt.Sprintf("descriptors %v, %d mappings of guest memory, %d goroutines", h.fds, h.mapped, h.goroutines)
}

// settled waits until everything is as it was.
func settled(t *testing.T, was holdings) {
	t.Helper()
	eventually(t, "hostmed to let go of its guest, until it holds "+was.String(), func() (bool, string) {
		now := held(t)
		return now.String() == was.String(), now.String()
	})
}

// TestKilledGuestLeavesNothing: two guests work on one hostmed, a controller each. One of them gets SIGKILL; hostmed gives back everything
// that it had of it and stays, its neighbour notices nothing, and the next QEMU that comes to the same socket, which is the neighbour's, has in its guest what was acknowledged.
func TestKilledGuestLeavesNothing(t *testing.T) {
	lab := vmlab.Open(t)
	disks := []string{filepath.Join(t.TempDir(), "0"), filepath.Join(t.TempDir(), "1")}
	var config hostmed.Config
	for i, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap} {
		config.Controllers = append(config.Controllers, hostmed.ControllerConfig{Namespaces: []string{"file:" + disks[i] + ",size=64MiB"}, Doorbells: mode})
	}
	sockets := vmlab.Hostmed(t, config)
	var nobody holdings
	eventually(t, "all of hostmed to run", func() (bool, string) {
		before := held(t)
		time.Sleep(200 * time.Millisecond)
		nobody = held(t)
		return nobody.String() == before.String(), nobody.String()
	})

	stays := lab.Boot(t, vmlab.Config{Ports: 1, Devices: []vmlab.Device{vmlab.VFIOUser(sockets[1])}})
	stays.Run(t, fmt.Sprintf("(while [ ! -e /tmp/stop ]; do %s || exit 1; sleep 0.2; done; touch /tmp/well) >/tmp/fio 2>&1 &", verified(stays.Disk(t, 0).Namespace(1))))
	one := held(t)
	t.Logf("nobody: %v", nobody)
	t.Logf("one guest: %v", one)

	c := vmlab.Config{Devices: []vmlab.Device{vmlab.VFIOUser(sockets[0])}}
	acks := withAcks(t, &c)
	vm := lab.Boot(t, c)
	killed := vm.Disk(t, 0).Namespace(1)
	l := startWriter(t, vm, killed, 0)
	vm.Run(t, load(killed)+" >/dev/null 2>&1 &")
	acks.more(t, 50)
	if two := held(t); two.mapped <= one.mapped || two.goroutines <= one.goroutines || two.fds["eventfd"] <= one.fds["eventfd"] {
		t.Errorf("with a second guest: %v", two)
	}
	if err := vm.Close(); err != nil { // SIGKILL
		t.Error(err)
	}
	settled(t, one)
	checkFile(t, disks[0], l, acks.read(t), 20)

	stays.Run(t, "touch /tmp/stop; while pidof fio >/dev/null; do sleep 0.1; done; sleep 0.2; test -e /tmp/well || { cat /tmp/fio; false; }")
	stays.CheckDmesg(t)
	next, err := stays.HotAdd(t.Context(), vmlab.VFIOUser(sockets[0]))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(disks[0])
	if err != nil {
		t.Fatal(err)
	}
	if got := stays.Run(t, "md5sum "+next.Namespace(1)); !strings.HasPrefix(got, fmt.Sprintf("%x", md5.Sum(want))) {
		t.Error("the next guest reads other data than is in the file")
	}
	stays.Run(t, verified(next.Namespace(1)))
	stays.CheckDmesg(t)
	if err := stays.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
	if err := stays.Close(); err != nil {
		t.Error(err)
	}
	settled(t, nobody)
}
