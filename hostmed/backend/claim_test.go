package backend

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeDisks is a host with a disk of 1 GiB: nvme0n1, partitions p1 at 1 MiB and p2 at 101 MiB, of 100 MiB each; and nvme1n1, of 1 GiB, without any.
type fakeDisks struct {
	diskHost
	t    *testing.T
	used map[string]string // by name, what for
	busy map[string]bool   // what somebody of the host has claimed
}

func newFakeDisks(t *testing.T) *fakeDisks {
	f := &fakeDisks{t: t, used: map[string]string{}, busy: map[string]bool{}}
	dir := t.TempDir()
	f.sys, f.dev, f.locks = filepath.Join(dir, "sys"), filepath.Join(dir, "dev"), filepath.Join(dir, "run")
	disk := func(name, dev string, parts ...[2]int) {
		f.put(name+"/size", fmt.Sprint(1<<30>>9))
		f.put(name+"/dev", dev)
		for i, p := range parts {
			f.partition(name, dev, i, p)
		}
	}
	disk("nvme0n1", "259:1", [2]int{1, 100}, [2]int{101, 100})
	disk("nvme1n1", "259:2")
	f.diskHost.uses = func(names ...string) (out []string, err error) {
		for _, n := range names {
			if u := f.used[n]; u != "" {
				out = append(out, n+" is "+u)
			}
		}
		return out, nil
	}
	f.diskHost.open = f.claimed(f.dev)
	return f
}

func (f *fakeDisks) put(path, text string) {
	f.t.Helper()
	path = filepath.Join(f.sys, "class/block", path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// partition makes partition i, from 0, at p[0] MiB of a disk, of p[1] MiB.
func (f *fakeDisks) partition(disk, dev string, i int, p [2]int) {
	f.t.Helper()
	name := fmt.Sprintf("%sp%d", disk, i+1)
	at := disk + "/" + name + "/"
	f.put(at+"partition", fmt.Sprint(i+1))
	f.put(at+"start", fmt.Sprint(p[0]<<20>>9))
	f.put(at+"size", fmt.Sprint(p[1]<<20>>9))
	f.put(at+"dev", fmt.Sprintf("%s%d", dev, i+1))
	if err := os.Symlink(filepath.Join(f.sys, "class/block", at), filepath.Join(f.sys, "class/block", name)); err != nil {
		f.t.Fatal(err)
	}
}

// claimed is how a process with its devices in dev claims one.
func (f *fakeDisks) claimed(dev string) func(string) (int, error) {
	return func(path string) (int, error) {
		name := strings.TrimPrefix(path, dev+"/")
		if f.busy[name] {
			return -1, unix.EBUSY
		}
		return unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
}

// process is another hostmed on the same host.
func (f *fakeDisks) process() *diskHost {
	h := f.diskHost
	h.dev += "2"
	h.open = f.claimed(h.dev)
	return &h
}

func claimed(t *testing.T, h *diskHost, disk string, from, to uint64, readOnly bool) *claim {
	t.Helper()
	c, err := h.take(disk, from<<20, to<<20, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.release(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func refusedClaim(t *testing.T, h *diskHost, disk string, from, to uint64, readOnly bool, says string) {
	t.Helper()
	c, err := h.take(disk, from<<20, to<<20, readOnly)
	if err == nil {
		c.release()
		t.Errorf("%d to %d MiB of %s were given", from, to, disk)
	} else if !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%d to %d MiB of %s: %v; want %q", from, to, disk, err, says)
	}
}

func TestClaimsDoNotOverlap(t *testing.T) {
	f := newFakeDisks(t)
	for i, h := range []*diskHost{&f.diskHost, f.process()} {
		if i > 0 {
			f = newFakeDisks(t)
			h = f.process()
		}
		c := claimed(t, &f.diskHost, "nvme1n1", 100, 200, false)
		f.busy["nvme1n1"] = h != &f.diskHost // the second process finds it claimed by the first
		for _, r := range [][2]uint64{{100, 200}, {0, 101}, {199, 300}, {0, 1024}, {150, 151}} {
			refusedClaim(t, h, "nvme1n1", r[0], r[1], false, "has bytes 104857600 to 209715199 of nvme1n1")
			refusedClaim(t, h, "nvme1n1", r[0], r[1], true, "has bytes")
		}
		claimed(t, h, "nvme1n1", 0, 100, false)
		claimed(t, h, "nvme1n1", 200, 300, true)
		claimed(t, h, "nvme1n1", 250, 400, true)
		refusedClaim(t, h, "nvme1n1", 299, 300, false, "in use")
		claimed(t, h, "nvme0n1", 101, 201, false) // another disk
		if err := c.grow("nvme1n1", 100<<20, 201<<20, false); err == nil {
			t.Error("grown into another's range")
		}
		f.busy["nvme1n1"] = false
		for _, name := range c.held {
			if name != "nvme1n1" {
				t.Errorf("held: %s", name)
			}
		}
		if err := c.release(); err != nil {
			t.Fatal(err)
		}
		again := claimed(t, h, "nvme1n1", 150, 200, false)
		if again.release() != nil {
			t.Error("not released")
		}
	}
}

// TestClaimsOfTheHost: what the host has mounted, or claimed, is refused, whole or in part, and what is served is held so that it cannot be.
func TestClaimsOfTheHost(t *testing.T) {
	f := newFakeDisks(t)
	h := &f.diskHost
	f.used["nvme0n1p2"] = "mounted at /srv"
	refusedClaim(t, h, "nvme0n1", 0, 1024, false, "nvme0n1p2 is mounted at /srv")
	refusedClaim(t, h, "nvme0n1", 101, 201, true, "mounted")
	refusedClaim(t, h, "nvme0n1", 90, 102, false, "mounted")
	refusedClaim(t, h, "nvme0n1", 200, 202, false, "mounted")
	if c := claimed(t, h, "nvme0n1", 1, 101, false); len(c.held) != 1 || c.held[0] != "nvme0n1p1" || len(c.warnings) != 0 {
		t.Errorf("held for partition 1: %+v", c)
	}
	if c := claimed(t, h, "nvme0n1", 300, 400, false); len(c.held) != 0 || len(c.warnings) != 1 || !strings.Contains(c.warnings[0], "in no partition") {
		t.Errorf("free space: %+v", c)
	}
	f.used = map[string]string{"nvme0n1": "held by dm-0"}
	refusedClaim(t, h, "nvme0n1", 201, 202, false, "held by dm-0")
	f.used = map[string]string{}
	refusedClaim(t, h, "nvme0n1", 0, 1, false, "partition table")
	refusedClaim(t, h, "nvme0n1", 500, 1024, false, "partition table")
	f.busy["nvme0n1p2"] = true
	refusedClaim(t, h, "nvme0n1", 101, 201, false, "lsof")
	f.busy["nvme0n1p2"] = false
	if c := claimed(t, h, "nvme0n1", 150, 160, false); len(c.held) != 1 || c.held[0] != "nvme0n1p2" {
		t.Errorf("within partition 2: %+v", c)
	}
	// Another hostmed has it claimed for a slice beside.
	f.busy["nvme0n1p2"] = true
	other := claimed(t, f.process(), "nvme0n1", 170, 180, false)
	if len(other.held) != 1 {
		t.Errorf("beside another process's: %+v", other)
	}
	f.busy["nvme1n1"] = false
	if c := claimed(t, h, "nvme1n1", 0, 1024, false); len(c.held) != 1 || c.held[0] != "nvme1n1" {
		t.Errorf("all of a disk: %+v", c)
	}
}

func TestClaimsNeedTheirDirectory(t *testing.T) {
	f := newFakeDisks(t)
	if err := os.WriteFile(f.locks, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refusedClaim(t, &f.diskHost, "nvme1n1", 0, 1, false, "make the directory "+f.locks)
	f.locks += "2"
	refusedClaim(t, &f.diskHost, "nvme9n1", 0, 1, false, "no such file")
	// No node of the device here, as in a container that has only the character device.
	f.diskHost.open = func(string) (int, error) { return -1, unix.ENOENT }
	if c := claimed(t, &f.diskHost, "nvme1n1", 0, 1, false); len(c.warnings) != 1 || len(c.held) != 0 {
		t.Errorf("without a node: %+v", c)
	}
	f.diskHost.open = func(string) (int, error) { return -1, unix.EACCES }
	refusedClaim(t, &f.diskHost, "nvme1n1", 1, 2, false, "as root")
}

// TestClaimsFilesOfLocks: what is in the place of a file for locks, and who may have it.
func TestClaimsFilesOfLocks(t *testing.T) {
	f := newFakeDisks(t)
	if err := os.Mkdir(f.locks, 0o755); err != nil {
		t.Fatal(err)
	}
	victim, path := filepath.Join(t.TempDir(), "victim"), filepath.Join(f.locks, "block-259-2.lock")
	for what, put := range map[string]func() error{
		"is a symbolic link":  func() error { return os.Symlink(victim, path) },
		"is no regular file":  func() error { return unix.Mkfifo(path, 0o600) },
		"is a directory":      func() error { return os.Mkdir(path, 0o700) },
		"the files in it, wr": func() error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		refusedClaim(t, &f.diskHost, "nvme1n1", 0, 1, false, what)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(victim); err == nil {
		t.Error("a symbolic link was followed")
	}
	for _, mode := range []os.FileMode{0o755, 0o775, 0o777, 0o700} {
		if err := os.Chmod(f.locks, mode); err != nil {
			t.Fatal(err)
		}
		claimed(t, &f.diskHost, "nvme1n1", 0, 1, true)
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != mode&0o666 {
			t.Errorf("in a directory of mode %o: %v, %v", mode, st.Mode(), err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestClaimsOfNewPartitions: a partition that is made where a range is served is claimed, and one that is in use already is told of.
func TestClaimsOfNewPartitions(t *testing.T) {
	f := newFakeDisks(t)
	c := claimed(t, &f.diskHost, "nvme0n1", 300, 400, false)
	if len(c.held) != 0 || len(c.warnings) != 1 {
		t.Errorf("in no partition: %+v", c)
	}
	f.partition("nvme0n1", "259:1", 2, [2]int{201, 99})
	if err := c.cover(); err != nil || len(c.held) != 0 {
		t.Errorf("beside it: %+v, %v", c.held, err)
	}
	f.partition("nvme0n1", "259:1", 3, [2]int{399, 10})
	for range 2 {
		if err := c.cover(); err != nil || len(c.held) != 1 || c.held[0] != "nvme0n1p4" {
			t.Errorf("in it: %+v, %v", c.held, err)
		}
	}
	f.partition("nvme0n1", "259:1", 4, [2]int{320, 10})
	f.busy["nvme0n1p5"] = true
	if err := c.cover(); err == nil || !strings.Contains(err.Error(), "nvme0n1p5 is in use") {
		t.Errorf("in use: %v", err)
	}
	all := claimed(t, &f.diskHost, "nvme1n1", 0, 1024, false)
	f.partition("nvme1n1", "259:2", 0, [2]int{1, 10})
	if err := all.cover(); err != nil || len(all.held) != 1 {
		t.Errorf("of a disk that is claimed: %+v, %v", all.held, err)
	}
}

// TestClaimsKeepTheTable: where a partition table is depends on the disk's blocks.
func TestClaimsKeepTheTable(t *testing.T) {
	const size = 1 << 30
	f := newFakeDisks(t)
	for block, free := range map[string][2]uint64{"512": {34 * 512, size - 33*512}, "4096": {6 * 4096, size - 5*4096}, "what": {1 << 20, size - 1<<20}} {
		f.put("nvme0n1/queue/logical_block_size", block)
		for what, x := range map[string]struct {
			from, to uint64
			in       bool
		}{
			"free": {free[0], free[1], false}, "first": {free[0] - 1, free[1], true}, "last": {free[0], free[1] + 1, true},
		} {
			if block == "what" && what != "free" {
				continue
			}
			if in := f.tableIn("nvme0n1", x.from, x.to, size); (in != "") != x.in {
				t.Errorf("blocks of %s, %s: %q", block, what, in)
			}
		}
	}
}

// TestClaimsByTheNode: a node of another device claims nothing.
func TestClaimsByTheNode(t *testing.T) {
	if _, err := openClaim(filepath.Join(t.TempDir(), "sda")); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
	all, err := filepath.Glob(machineSys + "/class/block/*")
	if err != nil || len(all) == 0 {
		t.Fatalf("this machine has no block device: %v", err)
	}
	path := filepath.Join(t.TempDir(), filepath.Base(all[0]))
	if err := unix.Mkfifo(path, 0o600); err != nil { // which an open could wait at
		t.Fatal(err)
	}
	if fd, err := openClaim(path); !errors.Is(err, errWrongNode) {
		t.Errorf("descriptor %d, %v", fd, err)
	}
	f := newFakeDisks(t)
	f.diskHost.open = func(string) (int, error) { return -1, errWrongNode }
	refusedClaim(t, &f.diskHost, "nvme1n1", 0, 1, false, "make it anew")
}

func TestClaimsKnowPartitions(t *testing.T) {
	f := newFakeDisks(t)
	disk, r, err := f.lookUp("nvme0n1p2")
	if err != nil || disk != "nvme0n1" || r != (blockRange{"nvme0n1p2", 101 << 20, 201 << 20}) {
		t.Errorf("%s %+v %v", disk, r, err)
	}
	disk, r, err = f.lookUp("nvme1n1")
	if err != nil || disk != "nvme1n1" || r != (blockRange{"nvme1n1", 0, 1 << 30}) {
		t.Errorf("%s %+v %v", disk, r, err)
	}
}

// A device that has died, and that the kernel opens for a minute, keeps nobody from claiming others, nor from giving them back.
func TestClaimBesideOneThatHangs(t *testing.T) {
	f := newFakeDisks(t)
	begun, release := make(chan bool), make(chan bool)
	open := f.diskHost.open
	f.diskHost.open = func(path string) (int, error) {
		if filepath.Base(path) == "nvme0n1p1" {
			begun <- true
			<-release
			return -1, unix.ENXIO
		}
		return open(path)
	}
	failed := make(chan error)
	go func() {
		_, err := f.take("nvme0n1", 1<<20, 2<<20, false)
		failed <- err
	}()
	<-begun
	for _, disk := range []string{"nvme0n1", "nvme1n1"} {
		c, err := f.take(disk, 101<<20, 102<<20, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.release(); err != nil {
			t.Error(err)
		}
	}
	close(release)
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "nvme0n1p1") {
		t.Error(err)
	}
}
