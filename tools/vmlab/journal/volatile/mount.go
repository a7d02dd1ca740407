package volatile

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// File is a Disk as a file.
type File struct {
	Path   string // good in this process and, for root, in others
	mount  int    // the file system, which is in no directory
	server *fuse.Server
	served chan struct{}
}

const name = "disk"

// Mount makes a file of d. The file system is attached to nothing, so that it goes with this process, however that ends. It takes /dev/fuse and
// root.
func Mount(d *Disk) (_ *File, err error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/fuse: %w: load the module fuse and be root", err)
	}
	f := &File{served: make(chan struct{})}
	if f.mount, err = mount(dev); err != nil {
		return nil, errors.Join(fmt.Errorf("mounting a FUSE file system: %w", err), unix.Close(dev))
	}
	defer func() {
		if err != nil {
			unix.Close(f.mount)
		}
	}()
	f.server, err = fuse.NewServer(&fileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), d: d}, fmt.Sprintf("/dev/fd/%d", dev),
		&fuse.MountOptions{MaxWrite: maxTransfer, DisableXAttrs: true})
	if err != nil {
		return nil, errors.Join(err, unix.Close(dev))
	}
	go func() {
		defer close(f.served)
		f.server.Serve()
	}()
	f.Path = fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), f.mount, name)
	if err := noPoll(f.Path); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Path, err)
	}
	return f, nil
}

// noPoll lets the kernel find out, once, that the file cannot be polled. It would ask the first time that Go's runtime
// adds the file to its epoll set, in a system call that the scheduler knows nothing of, and a garbage collection that begins
// meanwhile keeps the server from answering: for ever, where that is in the same process.
func noPoll(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	for {
		if _, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != unix.EINTR {
			break
		}
	}
	return errors.Join(err, unix.Close(fd))
}

// mount makes a file system whose requests come out of dev.
func mount(dev int) (int, error) {
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	for key, value := range map[string]string{
		"source": "volatile", "fd": strconv.Itoa(dev), "rootmode": "40000", "user_id": "0", "group_id": "0", "max_read": strconv.Itoa(maxTransfer),
	} {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return -1, fmt.Errorf("%s=%s: %w", key, value, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
}

// Close takes the file system away. Whoever has the file open must have closed it.
func (f *File) Close() error {
	err := unix.Close(f.mount)
	<-f.served
	return err
}

// maxTransfer is the longest read or write.
const maxTransfer = 1 << 20

// fileSystem is a directory with one file in it.
type fileSystem struct {
	fuse.RawFileSystem
	d *Disk
}

const (
	rootNode = 1
	fileNode = 2
	forever  = 1 << 30 // seconds
)

func (fs *fileSystem) attr(node uint64, a *fuse.Attr) fuse.Status {
	switch node {
	case rootNode:
		*a = fuse.Attr{Ino: rootNode, Mode: fuse.S_IFDIR | 0o700, Nlink: 2}
	case fileNode:
		*a = fuse.Attr{Ino: fileNode, Mode: fuse.S_IFREG | 0o600, Nlink: 1, Size: uint64(fs.d.size()), Blocks: uint64(fs.d.size() / sector), Blksize: 4096}
	default:
		return fuse.ENOENT
	}
	return fuse.OK
}

func (fs *fileSystem) Lookup(_ <-chan struct{}, h *fuse.InHeader, what string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != rootNode || what != name {
		return fuse.ENOENT
	}
	out.NodeId, out.AttrValid, out.EntryValid = fileNode, forever, forever
	return fs.attr(fileNode, &out.Attr)
}

func (fs *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = forever
	return fs.attr(in.NodeId, &out.Attr)
}

// SetAttr takes times and modes, and forgets them.
func (fs *fileSystem) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Valid&fuse.FATTR_SIZE != 0 && in.Size != uint64(fs.d.size()) {
		return fuse.EPERM
	}
	out.AttrValid = forever
	return fs.attr(in.NodeId, &out.Attr)
}

func (fs *fileSystem) Open(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if in.NodeId != fileNode {
		return fuse.ENOENT
	}
	return fuse.OK
}

func (fs *fileSystem) Read(_ <-chan struct{}, in *fuse.ReadIn, p []byte) (fuse.ReadResult, fuse.Status) {
	return fuse.ReadResultData(p[:fs.d.read(p[:min(int(in.Size), len(p))], int64(in.Offset))]), fuse.OK
}

func (fs *fileSystem) Write(_ <-chan struct{}, in *fuse.WriteIn, p []byte) (uint32, fuse.Status) {
	// The kernel says RWF_DSYNC by the flag of open.
	if !fs.d.write(p, int64(in.Offset), int64(len(p)), in.Flags&unix.O_DSYNC != 0) {
		return 0, fuse.Status(unix.ENOSPC)
	}
	return uint32(len(p)), fuse.OK
}

func (fs *fileSystem) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	fs.d.sync()
	return fuse.OK
}

// Fallocate makes holes and zeroes; both are writes as far as a cut is concerned.
func (fs *fileSystem) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	switch in.Mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE:
	default:
		return fuse.Status(unix.EOPNOTSUPP)
	}
	off, n := int64(in.Offset), int64(in.Length)
	if off < 0 || n < 0 {
		return fuse.EINVAL
	}
	off = min(off, fs.d.size())
	if !fs.d.write(nil, off, min(n, fs.d.size()-off), false) {
		return fuse.EINVAL
	}
	return fuse.OK
}
