package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/pcifn"
)

// Who has which bytes of the host's disks. A range of a disk is served once, however it is named: as a slice of a character device, a partition, or a whole
// disk; by this process or another. Three things see to that:
//
//   - Locks of byte ranges (open file description locks, which end with the process however it ends) of a file for each disk in lockDir, named by the disk's
//     device number, which is the same in every container. The file is never written. Ranges that are read-only may be
//     had by several.
//   - The kernel's lists of what is mounted, swap, or held by device mapper, md and loop devices: what overlaps is refused.
//   - A claim of the block device, as mount and swapon make (O_EXCL), for as long as the range is served: of the disk, if the range is all of it or there is
//     no partition; else of every partition that it overlaps. Nobody can mount those meanwhile, not in another mount namespace either.
//
// A range that overlaps no partition of a disk that has some is held by nothing but the lock: the host could make a partition there, and mount it.

const lockDir = "/run/shadowbell"

// diskHost is where the kernel shows disks. Tests have their own.
type diskHost struct {
	sys, dev, locks string
	uses            func(names ...string) ([]string, error)
	open            func(path string) (int, error) // claims
}

var disks = diskHost{
	sys: "/sys", dev: "/dev", locks: lockDir, uses: pcifn.BlockUses,
	open: openClaim,
}

// openClaim claims a block device by its node, which must be of the device that the kernel gives that name: a container may have those of another time.
func openClaim(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		var want []byte
		want, err = os.ReadFile(filepath.Join(machineSys, "class/block", filepath.Base(path), "dev"))
		is := fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
		if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFBLK || is != strings.TrimSpace(string(want))) {
			err = fmt.Errorf("%w: it is no node of the block device %s", errWrongNode, strings.TrimSpace(string(want)))
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

var errWrongNode = errors.New("the files in /dev are not those of the kernel's devices")

// blockRange is a partition of a disk, or all of it, in bytes of the disk.
type blockRange struct {
	name     string
	from, to uint64
}

func (r blockRange) overlaps(from, to uint64) bool { return r.from < to && from < r.to }

// lookUp returns the disk that a block device is or is a partition of, and where that is on it.
func (h *diskHost) lookUp(name string) (disk string, r blockRange, err error) {
	at, err := filepath.EvalSymlinks(filepath.Join(h.sys, "class/block", name))
	if err != nil {
		return "", r, errnoOf(err)
	}
	disk = name
	var start uint64
	if _, err := os.Stat(filepath.Join(at, "partition")); err == nil {
		disk = filepath.Base(filepath.Dir(at))
		if start, err = sysNumber(filepath.Join(at, "start")); err != nil {
			return "", r, err
		}
	}
	size, err := sysNumber(filepath.Join(at, "size"))
	if err == nil && (start > 1<<54 || size > 1<<54) {
		err = fmt.Errorf("%s: a size that cannot be", at)
	}
	return disk, blockRange{name, start << 9, (start + size) << 9}, err
}

// partitions are those of a disk that have a size, by where they begin.
func (h *diskHost) partitions(disk string) (list []blockRange, err error) {
	names, err := filepath.Glob(filepath.Join(h.sys, "class/block", disk, "*", "partition"))
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		_, r, err := h.lookUp(filepath.Base(filepath.Dir(n)))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just gone
		}
		if err != nil {
			return nil, err
		}
		if r.to > r.from {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b blockRange) int { return int(min(max(int64(a.from)-int64(b.from), -1), 1)) })
	return list, nil
}

func sysNumber(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// claim is a range that is served.
type claim struct {
	lock     *os.File
	h        *diskHost
	warnings []string
	disk     string

	mu       sync.Mutex // guards what follows, and is taken before that of holdings
	from, to uint64
	held     []string // claimed block devices
}

// take claims bytes from to to of a disk.
func (h *diskHost) take(disk string, from, to uint64, readOnly bool) (_ *claim, err error) {
	c := &claim{h: h, disk: disk, from: from, to: to}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	if c.lock, err = h.lock(disk, from, to, readOnly); err != nil {
		return nil, err
	}
	_, whole, err := h.lookUp(disk)
	if err != nil {
		return nil, err
	}
	parts, err := h.partitions(disk)
	if err != nil {
		return nil, err
	}
	all := from == 0 && to >= whole.to
	names := []string{disk}
	for _, p := range parts {
		if p.overlaps(from, to) {
			names = append(names, p.name)
		}
	}
	uses, err := h.uses(names...)
	switch {
	case err != nil:
		return nil, err
	case len(uses) > 0:
		return nil, fmt.Errorf("the host uses it: %s: end that (umount, swapoff), or serve a range that it is not in", strings.Join(uses, ", "))
	case len(parts) == 0 || all:
		names = names[:1]
	default:
		if what := h.tableIn(disk, from, to, whole.to); what != "" {
			return nil, fmt.Errorf("it has the disk's partition table in it (%s), and the guest would be its master: begin with a partition, or serve the whole disk", what)
		}
		if names = names[1:]; len(names) == 0 {
			c.warnings = append(c.warnings, "this range of "+disk+" is in no partition: nothing keeps the host from making one there and mounting it. Make a partition for it")
		}
	}
	for _, name := range names {
		err := c.hold(name)
		if errors.Is(err, errNoNode) {
			c.warnings = append(c.warnings, err.Error())
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

// tableIn says whether a range has a GPT in it: a block that protects it, the header and 16 KiB of entries, and at the end the last two again (UEFI 2.10 5.3).
func (h *diskHost) tableIn(disk string, from, to, size uint64) string {
	block, err := sysNumber(filepath.Join(h.sys, "class/block", disk, "queue/logical_block_size"))
	if err != nil || block < minLBA || block > maxLBA {
		block = maxLBA
	}
	last := block + 16<<10
	switch first := block + last; {
	case from < first:
		return fmt.Sprintf("the first %d bytes", first)
	case size > last && to > size-last:
		return fmt.Sprintf("the last %d bytes", last)
	}
	return ""
}

// file opens the file of a disk that locks are on.
func (h *diskHost) file(disk, suffix string) (*os.File, error) {
	b, err := os.ReadFile(filepath.Join(h.sys, "class/block", disk, "dev"))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.locks, 0o755); err != nil {
		return nil, h.explain(err)
	}
	path := filepath.Join(h.locks, "block-"+strings.ReplaceAll(strings.TrimSpace(string(b)), ":", "-")+suffix)
	const how = os.O_RDWR | unix.O_NOFOLLOW | unix.O_NONBLOCK
	f, err := os.OpenFile(path, how|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		// Whoever may make such files may have the locks of those that there are.
		var dir fs.FileInfo
		if dir, err = os.Stat(h.locks); err == nil {
			err = f.Chmod(dir.Mode().Perm() & 0o666)
		}
		if err != nil {
			err = h.explain(err)
		}
	case errors.Is(err, fs.ErrExist):
		f, err = h.openLock(path, how)
	default:
		err = h.explain(err)
	}
	if err != nil {
		if f != nil {
			f.Close()
		}
		return nil, err
	}
	return f, nil
}

// openLock opens a file that is there, and is nothing else than one that locks are on.
func (h *diskHost) openLock(path string, how int) (*os.File, error) {
	const remedy = "remove it, when no hostmed runs"
	f, err := os.OpenFile(path, how, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%s is a symbolic link: %s", path, remedy)
	case err != nil:
		return nil, h.explain(err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is no regular file: %s", path, remedy), f.Close())
	}
	return f, nil
}

func (h *diskHost) explain(err error) error {
	return fmt.Errorf("locks for disks of the host: %w: make the directory %s, and the files in it, writable for the user of all hostmeds of this machine, and share it with containers that have one", err, h.locks)
}

// lock locks a range, against all who do so.
func (h *diskHost) lock(disk string, from, to uint64, readOnly bool) (*os.File, error) {
	f, err := h.file(disk, ".lock")
	if err != nil {
		return nil, err
	}
	if err = lockRange(f, disk, from, to, readOnly); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockRange locks a range of what f is the lock file of, beside what f has locked before.
func lockRange(f *os.File, disk string, from, to uint64, readOnly bool) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: int64(from), Len: int64(to - from)}
	if readOnly {
		l.Type = unix.F_RDLCK
	}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	if err != unix.EAGAIN && err != unix.EACCES {
		return err
	}
	if probe := l; unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &probe) == nil && probe.Type != unix.F_UNLCK {
		return fmt.Errorf("in use: another namespace of this hostmed, or of another one, has bytes %d to %d of %s: stop that one, or choose ranges that do not overlap",
			probe.Start, probe.Start+probe.Len-1, disk)
	}
	return errors.New("in use: another namespace of this hostmed, or of another one, had it just now: try again")
}

// grow claims what the range, which began at from, has become larger by.
func (c *claim) grow(disk string, from, to uint64, readOnly bool) error {
	if err := lockRange(c.lock, disk, from, to, readOnly); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.from, c.to = from, to
	return nil
}

// cover claims the partitions that somebody has made in the range since, so that they are not mounted. The error says which could not be: what is in it is
// the guest's and the host's at once.
func (c *claim) cover() error {
	parts, err := c.h.partitions(c.disk)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, p := range parts {
		if c.lock != nil && p.overlaps(c.from, c.to) && !slices.Contains(c.held, p.name) && !slices.Contains(c.held, c.disk) {
			errs = append(errs, c.hold(p.name))
		}
	}
	return errors.Join(errs...)
}

// holdings are the block devices that this process has claimed, or had: several ranges may lie in one.
var holdings = struct {
	mu sync.Mutex
	of map[string]*holding
}{of: map[string]*holding{}}

type holding struct {
	// mu guards the rest, and is held while the device is opened, which takes long for one that has died: others do not wait for that.
	mu    sync.Mutex
	fd    int // -1: another hostmed has it
	mark  *os.File
	users int // 0: the rest means nothing
}

func holdingOf(key string) *holding {
	holdings.mu.Lock()
	defer holdings.mu.Unlock()
	if holdings.of[key] == nil {
		holdings.of[key] = &holding{}
	}
	return holdings.of[key]
}

var errNoNode = errors.New("there is no ")

// hold claims a block device.
func (c *claim) hold(name string) error {
	key := c.h.dev + "/" + name
	x := holdingOf(key)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.users == 0 {
		fd, mark, err := c.h.hold(name)
		if err != nil {
			return err
		}
		if mark == nil {
			return fmt.Errorf("%w%s here: nothing keeps the host from mounting it", errNoNode, key)
		}
		x.fd, x.mark = fd, mark
	}
	x.users++
	c.held = append(c.held, name)
	return nil
}

// letGo takes back what hold has done.
func (x *holding) letGo() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.users--; x.users > 0 {
		return nil
	}
	err := x.mark.Close()
	if x.fd >= 0 {
		err = errors.Join(unix.Close(x.fd), err)
	}
	return err
}

// hold claims a block device: fd is -1 if another hostmed has it, and mark nil if there is none.
func (h *diskHost) hold(name string) (fd int, mark *os.File, err error) {
	if mark, err = h.file(name, ".held"); err != nil {
		return -1, nil, err
	}
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Len: 1}
	for end := time.Now().Add(lockPatience); ; time.Sleep(10 * time.Millisecond) {
		fd, err = h.open(filepath.Join(h.dev, name))
		switch {
		case err == nil:
			// Another hostmed that finds it busy sees by this by whom.
			if err = unix.FcntlFlock(mark.Fd(), unix.F_OFD_SETLK, &l); err == nil {
				return fd, mark, nil
			}
			unix.Close(fd)
		case errors.Is(err, fs.ErrNotExist):
			return -1, nil, mark.Close()
		case errors.Is(err, unix.EBUSY):
			probe := l
			probe.Type = unix.F_WRLCK
			if unix.FcntlFlock(mark.Fd(), unix.F_OFD_GETLK, &probe) == nil && probe.Type != unix.F_UNLCK {
				return -1, mark, nil
			}
			err = fmt.Errorf("%s is in use: something of the host has claimed it (a mount in another namespace, a program): see lsof %s, or serve a range that it is not in", name, filepath.Join(h.dev, name))
			if time.Now().Before(end) {
				continue // the kernel takes apart a process that was killed in its own time
			}
		case errors.Is(err, errWrongNode):
			err = fmt.Errorf("claiming %s: %w: make it anew (mknod), or leave it out of this container", filepath.Join(h.dev, name), err)
		default:
			err = fmt.Errorf("claiming %s: %w: run hostmed as root, or as a user who may read it", filepath.Join(h.dev, name), errnoOf(err))
		}
		return -1, nil, errors.Join(err, mark.Close())
	}
}

// release gives everything back.
func (c *claim) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, name := range c.held {
		errs = append(errs, holdingOf(c.h.dev+"/"+name).letGo())
	}
	c.held = nil
	if c.lock != nil {
		errs = append(errs, c.lock.Close())
		c.lock = nil
	}
	return errors.Join(errs...)
}
