package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/uring"
)

// A file is served in one of three ways:
//
//   - O_DIRECT through io_uring, where the file system takes it for this LBA size. The host caches
//     nothing and the device moves the data from and to guest memory. Guest memory that is
//     not aligned enough goes through a bounce buffer, direct too: buffered and
//     direct writes to neighbouring blocks of one page at the same time can undo each other.
//   - The page cache through io_uring, elsewhere. What is cached completes within the submission.
//   - Its pages mapped, on tmpfs and ramfs, which are memory. io_uring has no non-blocking way
//     into them and hands each request to a kernel thread: 13 µs for a 4 KiB read, 2 to 6 in batches of 32.
//     pread takes 1.5 µs, and a copy from the mapping 0.6. Only what is known to be
//     allocated is touched in the mapping, since touching a hole would fill it.
//
// Registered (pinned) guest memory made no difference that could be measured in any of them, and
// would count as memory of this process, so AddMemory does nothing.

// file is the backend of a regular file. Everything in it that changes while a queue is open is atomic.
type file struct {
	info Info
	id   identity
	spec Spec
	fd   int
	f    *os.File // owns fd, and with it the lock

	mayDirect bool // O_DIRECT may be tried
	device    bool // a block device: see block.go

	direct   bool
	memAlign uint64 // of guest memory, direct only
	lenAlign uint64 // of each piece of it

	pages *pageCache // files in memory only
	zeros []byte     // for writing zeroes

	noPunch, noZero atomic.Bool // the file system turned out not to have it
	noDiscard       atomic.Bool // the same of the device's own discard; files have none
	tally           tally
	syncFailed      atomic.Bool // fdatasync failed: data may be lost, and the kernel says so only once
}

// openFile opens, or creates, the file of s. direct says whether O_DIRECT may be used.
func openFile(s Spec, direct bool) (_ Backend, err error) {
	f, created, err := openRegular(s)
	if err != nil {
		return nil, err
	}
	b := &file{f: f, fd: int(f.Fd()), spec: s, mayDirect: direct}
	b.noDiscard.Store(true)
	defer func() {
		if err == nil {
			return
		}
		f.Close()
		if created {
			os.Remove(s.Path)
		}
	}()
	if err := lock(s, b.fd); err != nil {
		return nil, err
	}
	size, err := sizeOf(s, f)
	if err != nil {
		return nil, err
	}
	if created {
		// What a guest flushes is durable only if the file's name is. fsync(2)
		if err := syncNew(f); err != nil {
			return nil, fmt.Errorf("namespace %s: making the new file durable: %w", s, err)
		}
	}
	// Better now than when the first controller is attached.
	ring, err := uring.New(uring.Config{Entries: 1})
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", s, err)
	}
	if err := ring.Close(); err != nil {
		return nil, err
	}
	b.zeros, err = unix.Mmap(-1, 0, zeroChunk, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", s, err)
	}
	b.id = takeIdentity(s)
	b.info = newInfo(s, size, b.id)
	b.probe(s, size, direct)
	return b, nil
}

// syncNew makes a file that was just created durable: its size, and its entry in the directory.
func syncNew(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(f.Name()))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

const zeroChunk = 1 << 20

func openRegular(s Spec) (f *os.File, created bool, err error) {
	say := func(format string, a ...any) error {
		return fmt.Errorf("namespace file:%s: %w", s.Path, fmt.Errorf(format, a...))
	}
	mode := os.O_RDWR
	if s.ReadOnly {
		mode = os.O_RDONLY
	}
	st, err := os.Stat(s.Path)
	switch {
	case err == nil:
		if err := wrongKind(st.Mode()); err != nil {
			return nil, false, say("%w", err)
		}
	case errors.Is(err, fs.ErrNotExist):
		if s.ReadOnly {
			return nil, false, say("no such file, and readonly cannot create it: create it first (truncate -s 10G %s)", s.Path)
		}
		if s.Size == 0 {
			return nil, false, say("no such file: add size=10GiB to create it, or correct the path")
		}
		if dir := filepath.Dir(s.Path); !isDir(dir) {
			return nil, false, say("no such directory as %s: create it (mkdir -p %s)", dir, dir)
		}
		mode |= os.O_CREATE | os.O_EXCL
		created = true
	}
	// O_NONBLOCK: should it have become a FIFO meanwhile, the open must not wait.
	f, err = os.OpenFile(s.Path, mode|unix.O_NONBLOCK|unix.O_NOCTTY, 0o600)
	if err != nil {
		return nil, false, explainOpen(s, err)
	}
	if st, err = f.Stat(); err == nil {
		err = wrongKind(st.Mode())
	}
	if err == nil {
		var sfs unix.Statfs_t
		if unix.Fstatfs(int(f.Fd()), &sfs) == nil && sfs.Type == unix.HUGETLBFS_MAGIC {
			err = errors.New("hugetlbfs has no way to write a file: put it on tmpfs, or use mem:size=")
		}
	}
	if err != nil {
		f.Close()
		return nil, false, say("%w", err)
	}
	return f, created, nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

func wrongKind(m fs.FileMode) error {
	what, remedy := "", ""
	switch {
	case m.IsRegular():
		return nil
	case m.IsDir():
		what = "a directory"
	case m&fs.ModeCharDevice != 0:
		what = "a character device"
	case m&fs.ModeDevice != 0:
		what, remedy = "a block device", ", or use block:"
	case m&fs.ModeNamedPipe != 0:
		what = "a pipe"
	case m&fs.ModeSocket != 0:
		what = "a socket"
	default:
		what = "not a regular file"
	}
	return fmt.Errorf("it is %s, and this backend serves regular files: give the path of a disk image%s", what, remedy)
}

func explainOpen(s Spec, err error) error {
	var errno unix.Errno
	errors.As(err, &errno)
	remedy := ""
	access := "read and write"
	if s.ReadOnly {
		access = "read"
	}
	switch errno {
	case unix.EACCES, unix.EPERM:
		remedy = "run hostmed as a user who may " + access + " it (chown, chmod)"
		if !s.ReadOnly {
			remedy += ", or add readonly"
		}
	case unix.EROFS:
		remedy = "the file system is mounted read-only: add readonly, or remount it"
	case unix.ENOTDIR:
		remedy = "a part of the path is no directory: correct the path"
	case unix.ELOOP, unix.ENAMETOOLONG:
		remedy = "correct the path"
	case unix.EMFILE, unix.ENFILE:
		remedy = "raise the limit of open files (ulimit -n)"
	case unix.ENOSPC, unix.EDQUOT:
		remedy = "make room on the file system"
	case unix.ETXTBSY:
		remedy = "it is a program that runs: give the path of a disk image"
	case unix.EEXIST:
		remedy = "something else has just created it: try again"
	default:
		remedy = "check the path"
	}
	return fmt.Errorf("namespace file:%s: %w: %s", s.Path, errnoOf(err), remedy)
}

// lockPatience is how long a lock is waited for: the kernel takes apart the rings of a process that was
// killed in its own time, and a registered file stays open, and locked, until then.
const lockPatience = 500 * time.Millisecond

// lock takes the whole file for this open file, against other hostmeds, other namespaces of this one,
// and QEMU, which locks in the same way.
func lock(s Spec, fd int) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	if s.ReadOnly {
		l.Type = unix.F_RDLCK
	}
	err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
	for end := time.Now().Add(lockPatience); err == unix.EAGAIN && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
	}
	if err == unix.EAGAIN || err == unix.EACCES {
		who := "another namespace or process (hostmed, QEMU) has it open"
		if s.ReadOnly {
			return fmt.Errorf("namespace file:%s: in use: %s for writing: stop that one", s.Path, who)
		}
		return fmt.Errorf("namespace file:%s: in use: %s: stop that one, or open it readonly in both", s.Path, who)
	}
	if err != nil {
		return fmt.Errorf("namespace file:%s: locking it: %w: put it on a file system that has locks", s.Path, err)
	}
	return nil
}

// sizeOf returns the namespace's size. A file that holds data is never resized: a wrong size= would
// cut it or add to it.
func sizeOf(s Spec, f *os.File) (uint64, error) {
	say := func(format string, a ...any) error {
		return fmt.Errorf("namespace file:%s: %w", s.Path, fmt.Errorf(format, a...))
	}
	st, err := f.Stat()
	if err != nil {
		return 0, say("%w", err)
	}
	size := uint64(st.Size())
	switch {
	case size == 0 && s.Size == 0:
		return 0, say("it is empty: say how large it shall be, as in size=10GiB")
	case size == 0 && s.ReadOnly:
		return 0, say("it is empty, and readonly cannot enlarge it: truncate -s %d %s", s.Size, s.Path)
	case size == 0:
		if err := f.Truncate(int64(s.Size)); err != nil {
			return 0, say("making it %s large: %w: choose a size= that the file system can hold", FormatSize(s.Size), errnoOf(err))
		}
		return s.Size, nil
	case s.Size != 0 && s.Size != size:
		return 0, say("it is %s large, not size=%s: leave size= out to take it as it is, or resize it (truncate -s %d %s)",
			FormatSize(size), FormatSize(s.Size), s.Size, s.Path)
	}
	if err := checkMultiple(size, s.LBA); err != nil {
		return 0, say("its size of %d bytes %w (truncate -s, or another lba=)", size, err)
	}
	return size, nil
}

func errnoOf(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

func (b *file) Info() Info { return b.info }

// Direct reports whether the file is served with O_DIRECT.
func (b *file) Direct() bool { return b.direct }

// Close gives the file and its lock back. It does not flush.
func (b *file) Close() error {
	if b.zeros == nil {
		return nil
	}
	b.id.release()
	errs := []error{unix.Munmap(b.zeros)}
	b.zeros = nil
	if b.pages != nil {
		errs = append(errs, b.pages.close())
	}
	// Rings that are closed may still hold the file.
	l := unix.Flock_t{Type: unix.F_UNLCK, Whence: unix.SEEK_SET}
	errs = append(errs, unix.FcntlFlock(uintptr(b.fd), unix.F_OFD_SETLK, &l))
	return errors.Join(append(errs, b.f.Close())...)
}

// syncStatus is the result of an fdatasync. After a failure the kernel drops what it could not
// write and reports the next one as a success, so the failure is remembered.
func (b *file) syncStatus(op Op, e unix.Errno) nvme.Status {
	if e != 0 && !b.device {
		b.syncFailed.Store(true)
	}
	return b.status(op, e)
}
