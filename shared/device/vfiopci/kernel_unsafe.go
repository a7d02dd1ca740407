package vfiopci

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// kernel is the system calls that VFIO is made of. Tests have their own.
type kernel interface {
	open(path string) (int, error)
	close(fd int) error
	// ioctl passes the address of arg, or 0 if there is none.
	ioctl(fd int, request uintptr, arg []byte) (int, error)
	ioctlValue(fd int, request, arg uintptr) (int, error)
	pread(fd int, p []byte, off int64) error
	pwrite(fd int, p []byte, off int64) error
	mmap(fd int, off int64, size uint64) (*shm.Region, error)
}

type system struct{}

func (system) open(path string) (int, error) { return unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) }
func (system) close(fd int) error            { return unix.Close(fd) }

func (s system) ioctl(fd int, request uintptr, arg []byte) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(unsafe.SliceData(arg))))
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

func (s system) ioctlValue(fd int, request, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func (system) pread(fd int, p []byte, off int64) error {
	n, err := unix.Pread(fd, p, off)
	if err == nil && n != len(p) {
		err = unix.EIO
	}
	return err
}

func (system) pwrite(fd int, p []byte, off int64) error {
	n, err := unix.Pwrite(fd, p, off)
	if err == nil && n != len(p) {
		err = unix.EIO
	}
	return err
}

func (system) mmap(fd int, off int64, size uint64) (*shm.Region, error) {
	return shm.Map(fd, off, size, true)
}

// addressOf returns where mem is in this process.
func addressOf(mem *shm.Region) uint64 { return uint64(uintptr(mem.Base())) }

// addressOfBytes is addressOf for a slice.
func addressOfBytes(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
