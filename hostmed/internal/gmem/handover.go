package gmem

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Guest memory as it is handed to somebody who only looks at it: by file and offset, through a descriptor that can neither be written to nor mapped
// for writing.

// MaxKept is how many of a client's files can be handed on: each keeps a descriptor of this process.
const MaxKept = 16

// keep keeps a descriptor of f's file. It is called with mu held.
func (m *Memory) keep(f *file, fd int) {
	if m.kept == MaxKept {
		return
	}
	if own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
		f.fd = own
		m.kept++
	}
}

func (m *Memory) unkeep(f *file) {
	if f.fd >= 0 {
		unix.Close(f.fd)
		f.fd = -1
		m.kept--
	}
}

// File is a file of guest memory, to be compared with others and to be opened.
type File struct{ f *file }

// Locate returns where in a file [iova, iova+n) is; false if it is not all mapped, not in one piece of one file, or memory of this process.
func (m *Memory) Locate(iova, n uint64) (in File, off uint64, ok bool) {
	t := m.Table()
	for left := n; ; {
		r := t.rangeAt(iova)
		if r == nil || r.file == nil {
			return File{}, 0, false
		}
		at := r.file.begin + r.off + (iova - r.IOVA)
		if left == n {
			in.f, off = r.file, at
		} else if r.file != in.f || at != off+(n-left) {
			return File{}, 0, false
		}
		step := min(left, r.end()-iova)
		iova += step
		if left -= step; left == 0 {
			return in, off, true
		}
	}
}

// Open opens in's file once more, for reading only. The error says that its descriptor was not kept, that it was unmapped since, or that this process may
// not open the file: one of another user's, by name.
func (m *Memory) Open(in File) (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if in.f == nil || in.f.fd < 0 {
		return nil, fmt.Errorf("guest memory: no descriptor is kept: %w", unix.EBADF)
	}
	return ReadOnly(in.f.fd)
}

// ReadOnly opens fd's file once more, for reading only.
func ReadOnly(fd int) (*os.File, error) {
	own, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening shared memory for reading: %w", err)
	}
	return os.NewFile(uintptr(own), "memory"), nil
}
