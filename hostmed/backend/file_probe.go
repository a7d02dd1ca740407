package backend

import (
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// probe finds out how the file can be served and fills in what the guest may be told.
func (b *file) probe(s Spec, size uint64, direct bool) {
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err == nil {
		b.info.OptimalBlocks = max(1, uint32(st.Blksize>>b.info.LBAShift))
	}
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(b.fd, &sfs); err == nil && (sfs.Type == unix.TMPFS_MAGIC || sfs.Type == unix.RAMFS_MAGIC) {
		b.pages = openPages(b.fd, size, s.ReadOnly)
	} else {
		b.info.VolatileCache = !s.ReadOnly
		if direct {
			b.probeDirect(uint64(s.LBA))
		}
	}
	if !s.ReadOnly {
		// Beyond the end there is nothing to lose.
		err := fallocate(b.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(size), shm.PageSize)
		b.noPunch.Store(err != nil)
		b.info.Discard = err == nil
		b.info.DiscardZeroes = err == nil
		b.info.WriteZeroes = true
	}
	// A file system that punches holes tells where they are.
	_, err := unix.Seek(b.fd, 0, unix.SEEK_HOLE)
	b.info.Maps = err == nil && (b.info.Discard || s.ReadOnly)
}

// probeDirect switches the descriptor to O_DIRECT if the file system takes it for single
// blocks. What it says about alignment (STATX_DIOALIGN, 6.1) is believed; one read decides.
func (b *file) probeDirect(lba uint64) {
	b.memAlign, b.lenAlign = shm.PageSize, lba
	var stx unix.Statx_t
	err := unix.Statx(b.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
	if err == nil && stx.Mask&unix.STATX_DIOALIGN != 0 {
		if stx.Dio_mem_align == 0 || stx.Dio_offset_align == 0 || lba%uint64(stx.Dio_offset_align) != 0 {
			return
		}
		b.memAlign = uint64(stx.Dio_mem_align)
		b.lenAlign = uint64(stx.Dio_offset_align)
	}
	flags, err := unix.FcntlInt(uintptr(b.fd), unix.F_GETFL, 0)
	if err != nil {
		return
	}
	if _, err := unix.FcntlInt(uintptr(b.fd), unix.F_SETFL, flags|unix.O_DIRECT); err != nil {
		return
	}
	mem, err := unix.Mmap(-1, 0, maxLBA, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil {
		var n int
		n, err = unix.Pread(b.fd, mem[:lba], 0)
		b.direct = err == nil && n == int(lba)
		err = unix.Munmap(mem)
	}
	if !b.direct || err != nil {
		_, err = unix.FcntlInt(uintptr(b.fd), unix.F_SETFL, flags)
		b.direct = err != nil // still on: then every request must keep to its rules
	}
}

// fits reports whether the pieces of vec can be given to O_DIRECT as they are.
func (b *file) fits(vec []Seg) bool {
	for i := range vec {
		if uint64(segAddress(&vec[i]))&(b.memAlign-1) != 0 || vec[i].Len&(b.lenAlign-1) != 0 {
			return false
		}
	}
	return true
}
