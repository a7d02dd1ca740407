package backend

import (
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// Alterable is a Backend whose Info can change while it is open. Resize and Format are called while none of its queues is
// open, and by one goroutine at a time. All backends of this package are Alterable.
type Alterable interface {
	Backend
	// Resized reports whether the medium has another size than Info says.
	Resized() bool
	// Resize makes Info say the size that the medium has now. An error leaves it as it was.
	Resize() error
	// Format makes every block read as zeroes, gives their space back where that is possible, and changes the size of a block to lba
	// bytes. It may take long. After an error the content is undefined, and Info is as it was.
	Format(lba uint32) error
}

// reshape is what Format does to info.
func (i *Info) reshape(lba uint32) {
	i.Blocks = i.Size() / uint64(lba)
	i.LBAShift = uint8(bits.TrailingZeros32(lba))
}

func (i *Info) checkFormat(lba uint32) error {
	switch {
	case lba < minLBA || lba > maxLBA || bits.OnesCount32(lba) != 1:
		return fmt.Errorf("namespace %s: a block size of %d bytes: a power of two from %d to %d", i.Name, lba, minLBA, maxLBA)
	case i.Size()%uint64(lba) != 0:
		return fmt.Errorf("namespace %s: its size of %d bytes is not a multiple of %d", i.Name, i.Size(), lba)
	case i.ReadOnly:
		return fmt.Errorf("namespace %s: read-only", i.Name)
	}
	return nil
}

func (b *null) Resized() bool { return false }
func (b *null) Resize() error { return nil }

func (b *null) Format(lba uint32) error {
	if err := b.info.checkFormat(lba); err != nil {
		return err
	}
	b.info.reshape(lba)
	return nil
}

func (b *mem) Resized() bool { return false }
func (b *mem) Resize() error { return nil }

func (b *mem) Format(lba uint32) error {
	if err := b.info.checkFormat(lba); err != nil {
		return err
	}
	zero(b.data)
	b.written.clear(0, uint64(len(b.data)))
	b.info.reshape(lba)
	b.info.OptimalBlocks = max(1, uint32(shm.PageSize>>b.info.LBAShift))
	return nil
}

func (b *file) Resized() bool {
	var st unix.Stat_t
	return unix.Fstat(b.fd, &st) == nil && uint64(st.Size) != b.info.Size()
}

func (b *file) Resize() error {
	s := b.spec
	s.Size = 0 // it was that of the start
	size, err := sizeOf(s, b.f)
	if err != nil {
		return err
	}
	return b.take(s, size)
}

// take makes the file what s and size say.
func (b *file) take(s Spec, size uint64) error {
	if b.pages != nil {
		if err := b.pages.close(); err != nil {
			return err
		}
		b.pages = nil
	}
	if b.direct {
		flags, err := unix.FcntlInt(uintptr(b.fd), unix.F_GETFL, 0)
		if err == nil {
			_, err = unix.FcntlInt(uintptr(b.fd), unix.F_SETFL, flags&^unix.O_DIRECT)
		}
		if err != nil {
			return fmt.Errorf("namespace %s: %w", b.info.Name, err)
		}
		b.direct = false
	}
	b.spec = s
	b.info = newInfo(s, size, b.id)
	b.probe(s, size, b.mayDirect)
	return nil
}

func (b *file) Format(lba uint32) error {
	if err := b.info.checkFormat(lba); err != nil {
		return err
	}
	size := b.info.Size()
	if err := b.erase(int64(size)); err != nil {
		return fmt.Errorf("namespace %s: erasing: %w", b.info.Name, errnoOf(err))
	}
	if err := fdatasync(b.fd); err != nil {
		return fmt.Errorf("namespace %s: %w", b.info.Name, err)
	}
	s := b.spec
	s.LBA = lba
	return b.take(s, size)
}

// erase zeroes the file in the best way there is.
func (b *file) erase(size int64) error {
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE} {
		err := fallocate(b.fd, mode, 0, size)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
			return err
		}
	}
	for off := int64(0); off < size; {
		n, err := unix.Pwrite(b.fd, b.zeros[:min(int64(len(b.zeros)), size-off)], off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// fallocate goes on after a signal: file systems that look for one would do part of the work, and it would seem as if they could not do it.
func fallocate(fd int, mode uint32, off, n int64) error {
	for {
		if err := unix.Fallocate(fd, mode, off, n); err != unix.EINTR {
			return err
		}
	}
}

// fdatasync is fdatasync(2) that a signal does not end.
func fdatasync(fd int) error {
	for {
		if err := unix.Fdatasync(fd); err != unix.EINTR {
			return err
		}
	}
}
