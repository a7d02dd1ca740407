package uring

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// RegisterFiles registers fds, by which entries with SQEFixedFile name them by index. -1 leaves a
// place empty. The kernel holds its own reference: the fds may be closed.
func (r *Ring) RegisterFiles(fds []int) error {
	if errno := registerInts(r.fd, regFiles, toInt32(fds)); errno != 0 {
		return &Error{Op: fmt.Sprintf("registering %d files with io_uring", len(fds)), Errno: errno}
	}
	return nil
}

// UpdateFiles replaces the registered files from index at on; -1 empties a place.
func (r *Ring) UpdateFiles(at int, fds []int) error {
	v := toInt32(fds)
	errno := updateFiles(r.fd, at, v)
	runtime.KeepAlive(v)
	if errno != 0 {
		return &Error{Op: fmt.Sprintf("updating registered files %d to %d", at, at+len(fds)-1), Errno: errno}
	}
	return nil
}

// UnregisterFiles drops the registered files.
func (r *Ring) UnregisterFiles() error {
	return r.unregister(unregFiles, "dropping registered files")
}

func toInt32(fds []int) []int32 {
	v := make([]int32, len(fds))
	for i, fd := range fds {
		v[i] = int32(fd)
	}
	return v
}

// RegisterBuffers pins bufs, by which ReadFixed and WriteFixed name them by index. It counts
// against RLIMIT_MEMLOCK; a buffer is at most 1 GiB. The memory stays pinned, mapped or not,
// until it is unregistered.
func (r *Ring) RegisterBuffers(bufs [][]byte) error {
	v, size := iovecs(bufs)
	errno := registerIovecs(r.fd, regBuffers, v)
	runtime.KeepAlive(bufs)
	if errno != 0 {
		return explainBuffers(errno, size)
	}
	return nil
}

// RegisterSparseBuffers makes room for n registered buffers (5.19), for UpdateBuffers to fill.
func (r *Ring) RegisterSparseBuffers(n int) error {
	if errno := registerSparse(r.fd, regBuffers2, n); errno != 0 {
		e := &Error{Op: "sparse io_uring buffers", Errno: errno}
		if errno == unix.EINVAL {
			e.Remedy = "they need Linux 5.19"
		}
		return e
	}
	return nil
}

// UpdateBuffers replaces the registered buffers from index at on (5.13); nil empties a place. Operations
// in flight keep the old buffer.
func (r *Ring) UpdateBuffers(at int, bufs [][]byte) error {
	v, size := iovecs(bufs)
	errno := updateIovecs(r.fd, at, v)
	runtime.KeepAlive(bufs)
	if errno != 0 {
		return explainBuffers(errno, size)
	}
	return nil
}

// UnregisterBuffers drops the registered buffers and unpins them.
func (r *Ring) UnregisterBuffers() error {
	return r.unregister(unregBuffers, "dropping registered buffers")
}

func iovecs(bufs [][]byte) (v []unix.Iovec, size uint64) {
	v = make([]unix.Iovec, len(bufs))
	for i, b := range bufs {
		v[i] = iovec(b)
		size += uint64(len(b))
	}
	return v, size
}

func explainBuffers(errno unix.Errno, size uint64) error {
	e := &Error{Op: fmt.Sprintf("registering %d KiB of memory with io_uring", size>>10), Errno: errno}
	switch errno {
	case unix.ENOMEM:
		e.Remedy = "it must be lockable: " + raiseMemlock()
	case unix.EFAULT:
		e.Remedy = "it is not all mapped, or a buffer is larger than 1 GiB"
	case unix.EOPNOTSUPP:
		e.Remedy = "memory of this kind cannot be pinned"
	}
	return e
}

// EventFD returns a non-blocking eventfd that the kernel signals at every completion. It is
// made and registered by the first call and stays the ring's.
func (r *Ring) EventFD() (int, error) {
	if r.evfd >= 0 {
		return r.evfd, nil
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	if err := r.RegisterEventFD(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	r.evfd = fd
	return fd, nil
}

// RegisterEventFD has the kernel signal fd at every completion.
func (r *Ring) RegisterEventFD(fd int) error { return r.registerEventFD(regEventFD, fd) }

// RegisterEventFDAsync has the kernel signal fd only for operations that were not complete when Submit returned.
func (r *Ring) RegisterEventFDAsync(fd int) error { return r.registerEventFD(regEventFDAsync, fd) }

func (r *Ring) registerEventFD(op uint32, fd int) error {
	if errno := registerInts(r.fd, op, []int32{int32(fd)}); errno != 0 {
		return &Error{Op: "registering an eventfd with io_uring", Errno: errno}
	}
	return nil
}

// UnregisterEventFD ends the signalling.
func (r *Ring) UnregisterEventFD() error {
	return r.unregister(unregEventFD, "dropping the eventfd")
}

// LimitWorkers bounds the kernel threads that serve this ring's blocking operations, for files and for the
// rest; 0 leaves a bound as it is. Before 5.15 it returns ENOSYS or EINVAL.
func (r *Ring) LimitWorkers(files, rest uint32) error {
	if errno := registerInts(r.fd, regIOWQMax, []int32{int32(files), int32(rest)}); errno != 0 {
		return &Error{Op: "limiting io_uring workers", Errno: errno}
	}
	return nil
}

func (r *Ring) unregister(op uint32, what string) error {
	if errno := registerNothing(r.fd, op); errno != 0 {
		return &Error{Op: what, Errno: errno}
	}
	return nil
}
