package backend

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/uring"
)

// The backend block: is a block device or a partition, through the host's block layer: io_uring with O_DIRECT, and its queues are those of a
// file (filequeue.go). What differs:
//
//   - Who else has it is found out, and kept out, by claim.go.
//   - Discard is the device's own (BLOCK_URING_CMD_DISCARD, 6.12), before that zeroing that may unmap. Write zeroes is fallocate, which
//     is the device's command where it has one.
//   - Flush and FUA mean something only where the kernel says that the device has a cache that loses data (queue/write_cache). A
//     failed one is told once: what a device does afterwards is its own.
//   - Guest memory is registered with the ring.
//   - With poll, reads and writes are on a ring that polls (IOPOLL), and the rest on another.

// blockFacts are what the kernel says of a device. Sizes are in bytes; 0: not known.
type blockFacts struct {
	disk, name string // nvme0n1, nvme0n1p3
	start      uint64 // of a partition on its disk
	key        string // what stays the same of it, whatever it is called

	logical, physical       uint64
	optimal                 uint64 // size of writes
	minimal                 uint64
	discardUnit, discardMax uint64
	boundary                uint64
	dmaMask                 uint64
	writeBack               bool
	polls                   bool
	readOnly                bool
}

// block is the backend of a block device.
type block struct {
	*file
	h      *diskHost
	facts  blockFacts
	claim  *claim // nil: tests
	events *ueventHub
	limit  memlock

	watching  atomic.Bool
	stop      chan struct{}
	stopped   chan struct{}
	discarder bool // io_uring has the device's discard
}

func openBlock(s Spec, h *diskHost, log hclog.Logger) (_ Backend, err error) {
	say := func(err error) error { return fmt.Errorf("namespace block:%s: %w", s.Path, err) }
	f, err := openBlockNode(s)
	if err != nil {
		return nil, say(err)
	}
	facts, err := h.facts(int(f.Fd()))
	if err != nil {
		f.Close()
		return nil, say(err)
	}
	size, err := blockSize(int(f.Fd()))
	var c *claim
	if err == nil {
		c, err = h.take(facts.disk, facts.start, facts.start+size, s.ReadOnly)
	}
	if err != nil {
		f.Close()
		return nil, say(err)
	}
	b, err := newBlock(s, f, facts, h)
	if err != nil {
		return nil, say(errors.Join(err, c.release(), f.Close()))
	}
	b.claim, b.limit.log = c, log
	return b, nil
}

func openBlockNode(s Spec) (*os.File, error) {
	st, err := os.Stat(s.Path)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: correct the path (lsblk lists what there is)", errnoOf(err))
	case st.Mode().IsRegular():
		return nil, fmt.Errorf("it is a regular file: use file:%s", s.Path)
	case st.Mode()&os.ModeCharDevice != 0:
		return nil, errors.New("it is a character device: for the one of an NVMe namespace use nvme:, or give the block device (lsblk lists what there is)")
	case st.Mode()&os.ModeDevice == 0:
		return nil, errors.New("it is no block device: give the path of one (lsblk lists what there is)")
	}
	mode := os.O_RDWR
	if s.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(s.Path, mode|unix.O_DIRECT|unix.O_NOCTTY, 0)
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.EROFS):
		return nil, fmt.Errorf("%w: run hostmed as root or as a user who may read and write it; if the device itself is read-only (blockdev --getro), add readonly", errnoOf(err))
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOMEDIUM):
		return nil, fmt.Errorf("%w: there is no device behind it: see lsblk and dmesg", errnoOf(err))
	case err != nil:
		return nil, errnoOf(err)
	}
	return f, nil
}

// blockSize is what BLKGETSIZE64 says.
func blockSize(fd int) (uint64, error) {
	n, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err == nil && n <= 0 {
		return 0, errors.New("the kernel says that it has no blocks: see lsblk and dmesg")
	}
	return uint64(n), err
}

// facts asks the kernel about an open block device.
func (h *diskHost) facts(fd int) (x blockFacts, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return x, err
	}
	number := fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
	at, err := filepath.EvalSymlinks(filepath.Join(h.sys, "dev/block", number))
	if err != nil {
		return x, fmt.Errorf("%w: /sys is needed to know the device, and who has it", errnoOf(err))
	}
	x.name = filepath.Base(at)
	disk, r, err := h.lookUp(x.name)
	if err != nil {
		return x, err
	}
	x.disk, x.start = disk, r.from
	logical, err := unix.IoctlGetUint32(fd, unix.BLKSSZGET)
	if err != nil {
		return x, fmt.Errorf("its block size: %w", err)
	}
	x.logical = uint64(logical)
	return x, h.read(&x)
}

// read fills in what sysfs has.
func (h *diskHost) read(x *blockFacts) error {
	dir := filepath.Join(h.sys, "class/block", x.disk)
	text := func(what ...string) string {
		b, _ := os.ReadFile(filepath.Join(append([]string{dir}, what...)...))
		return strings.TrimSpace(string(b))
	}
	number := func(what string) uint64 {
		n, _ := sysNumber(filepath.Join(dir, "queue", what))
		return n
	}
	if z := text("queue", "zoned"); z == "host-managed" {
		return errors.New("its zones must be written in order (host-managed), which guests are not told: use another device")
	}
	x.physical, x.minimal, x.optimal = number("physical_block_size"), number("minimum_io_size"), number("optimal_io_size")
	x.discardUnit, x.discardMax = number("discard_granularity"), number("discard_max_bytes")
	x.boundary = number("chunk_sectors") << 9
	x.dmaMask = x.logical - 1
	if _, err := os.Stat(filepath.Join(dir, "queue/dma_alignment")); err == nil { // Linux 6.0
		x.dmaMask = number("dma_alignment")
	}
	x.writeBack = text("queue", "write_cache") != "write through"
	x.polls = number("io_poll") != 0
	x.readOnly = text("ro") == "1"
	if x.name != x.disk {
		x.readOnly = x.readOnly || text(x.name, "ro") == "1"
	}
	x.key = h.lasting(x, text)
	return nil
}

// lasting is what identifies the device for ever, or nothing.
func (h *diskHost) lasting(x *blockFacts, text func(...string) string) string {
	part := ""
	if x.name != x.disk {
		part = "#" + text(x.name, "partition")
	}
	for _, id := range [][]string{{"wwid"}, {"device", "wwid"}, {"dm", "uuid"}, {"md", "uuid"}, {"serial"}} {
		if v := text(id...); v != "" {
			return strings.Join(id, "/") + "=" + v + part
		}
	}
	if x.name != x.disk {
		for _, line := range strings.Split(text(x.name, "uevent"), "\n") {
			if strings.HasPrefix(line, "PARTUUID=") {
				return line
			}
		}
	}
	return ""
}

// newBlock makes the backend of what is open as f.
func newBlock(s Spec, f *os.File, x blockFacts, h *diskHost) (_ *block, err error) {
	switch lba := uint64(s.LBA); {
	case bits.OnesCount64(x.logical) != 1 || x.logical < minLBA || x.logical > maxLBA:
		return nil, fmt.Errorf("its blocks are of %d bytes, and 512 to %d can be served", x.logical, maxLBA)
	case lba != 0 && lba < x.logical:
		return nil, fmt.Errorf("lba=%d is less than the device's blocks of %d bytes: give lba=%d or more, or leave it out", lba, x.logical, x.logical)
	case x.readOnly && !s.ReadOnly:
		return nil, errors.New("the device is read-only: add readonly, or let it be written (blockdev --setrw)")
	case s.Poll && !x.polls:
		return nil, errors.New("poll: the device has no poll queues: load its driver with them (nvme.poll_queues=2 on the kernel's command line, or modprobe nvme poll_queues=2), or leave poll out")
	}
	ring, err := uring.New(uring.Config{Entries: 1})
	if err != nil {
		return nil, err
	}
	discards := !s.ReadOnly && x.discardMax > 0 && discardsBy(ring, int(f.Fd()))
	if err := ring.Close(); err != nil {
		return nil, err
	}
	b := &block{h: h, facts: x, events: &uevents, discarder: discards, file: &file{f: f, fd: int(f.Fd()), spec: s, device: true, direct: true}}
	size, err := blockSize(b.fd)
	if err != nil {
		return nil, err
	}
	if b.zeros, err = unix.Mmap(-1, 0, zeroChunk, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return nil, err
	}
	if x.key == "" {
		b.id = takeIdentity(s)
	} else {
		b.id = takeKey("block:" + x.key)
	}
	lba := s.LBA
	if lba == 0 {
		lba = uint32(x.logical)
	}
	b.show(size, lba)
	return b, nil
}

// discardsBy finds out whether the kernel has discard in io_uring: one of nothing is invalid where it has.
func discardsBy(ring *uring.Ring, fd int) bool {
	if !ring.Supports(uring.OpURingCmd) {
		return false
	}
	ring.GetSQE().PrepCommand(fd, uring.BlockDiscard)
	var c [1]uring.CQE
	for tries := 0; tries < maxTries; tries++ {
		if _, err := ring.SubmitAndWait(1); err == nil && ring.Reap(c[:]) == 1 {
			return c[0].Errno() == unix.EINVAL
		}
	}
	return false
}

// show fills in info. A device need not end with a block of the guest's.
func (b *block) show(size uint64, lba uint32) {
	s, x := b.spec, &b.facts
	s.LBA = lba
	b.info = newInfo(s, size, b.id)
	i := &b.info
	i.Name = b.spec.String()
	b.memAlign, b.lenAlign = x.dmaMask+1, x.logical
	i.FixedLBA = x.logical > minLBA // a guest would be offered smaller ones too
	writes := !i.ReadOnly
	i.VolatileCache = writes && x.writeBack
	i.Discard = writes && x.discardMax > 0
	i.WriteZeroes = writes
	b.noDiscard.Store(!b.discarder)
	b.noPunch.Store(!writes)
	// A unit that the partition does not begin with is none.
	unit := func(bytes uint64) uint32 {
		if bytes == 0 || bytes>>i.LBAShift > 1<<16 || x.start%bytes != 0 {
			return 0
		}
		return uint32(max(bytes>>i.LBAShift, 1))
	}
	if i.Discard {
		i.OptimalBlocks = max(unit(x.discardUnit), 1)
	}
	i.WriteBlocks = max(unit(max(x.physical, x.minimal)), 1)
	i.OptimalWrite = unit(x.optimal)
	i.Boundary = unit(x.boundary)
}

func (b *block) NewQueue() (Queue, error) {
	say := func(err error, open ...ring) error {
		err = fmt.Errorf("namespace %s: %w", b.info.Name, err)
		for _, r := range open {
			err = errors.Join(err, r.Close())
		}
		return err
	}
	r, err := uring.New(uring.Config{Entries: sqEntries, CQEntries: cqEntries, CoopTaskrun: true, IOPoll: b.spec.Poll})
	if err != nil {
		return nil, say(err)
	}
	q, err := b.newQueue(r)
	if err == nil {
		err = r.RegisterFiles([]int{b.fd})
	}
	if err != nil {
		return nil, say(err, r)
	}
	if !b.spec.NoPin {
		q.fixed.ring, q.fixed.full = r, func() { b.limit.tell(b.info.Name) }
	}
	if !b.spec.Poll {
		b.tally.join(q, q.counts.get)
		return q, nil
	}
	aux, err := uring.New(uring.Config{Entries: sqEntries, CQEntries: cqEntries, CoopTaskrun: true})
	if err != nil {
		return nil, say(err, r)
	}
	if err = aux.RegisterFiles([]int{b.fd}); err == nil {
		err = aux.RegisterEventFD(q.evfd)
	}
	if err != nil {
		return nil, say(err, aux, r)
	}
	q.aux = aux
	b.tally.join(q, q.counts.get)
	return q, nil
}

// Counts is Counted's.
func (b *block) Counts() Counts { return b.tally.Counts() }

// Warnings is what the operator should know.
func (b *block) Warnings() (list []string) {
	if b.claim != nil {
		list = append(list, b.claim.warnings...)
	}
	if lba, whole := b.info.LBASize(), max(b.facts.physical, b.facts.logical); lba > whole && !b.info.ReadOnly {
		list = append(list, fmt.Sprintf("a guest expects each of its blocks to be written as a whole or not at all: those of %d bytes can be written in part when power fails, as the device's are of %d (lba=%d)", lba, whole, whole))
	}
	if most, ok := lockable(); ok && !b.spec.NoPin {
		list = append(list, fmt.Sprintf("at most %s of guest memory are registered with the kernel, the rest is served without: %s", FormatSize(most), raiseMemlock))
	}
	return list
}

// lockable returns how much memory this process may lock, if that is less than a small guest has.
func lockable() (most uint64, limited bool) {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim) != nil || lim.Cur >= 1<<30 {
		return 0, false
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if unix.Capget(&head, &caps[0]) == nil && caps[0].Effective>>unix.CAP_IPC_LOCK&1 != 0 {
		return 0, false
	}
	return lim.Cur, true
}

// Resized reports whether the device is of another size. One that is gone is not.
func (b *block) Resized() bool {
	size, err := blockSize(b.fd)
	return err == nil && size>>b.info.LBAShift != b.info.Blocks
}

func (b *block) Resize() error {
	size, err := blockSize(b.fd)
	if err == nil && b.claim != nil {
		err = b.claim.grow(b.facts.disk, b.facts.start, b.facts.start+size, b.spec.ReadOnly)
	}
	if err != nil {
		return fmt.Errorf("namespace %s: %w", b.info.Name, err)
	}
	b.show(size, uint32(b.info.LBASize()))
	return nil
}

func (b *block) Format(lba uint32) error {
	if err := b.info.checkFormat(lba); err != nil {
		return err
	}
	if uint64(lba) < b.facts.logical {
		return fmt.Errorf("namespace %s: a block size of %d bytes: the device's is %d", b.info.Name, lba, b.facts.logical)
	}
	size, err := blockSize(b.fd)
	if err == nil {
		err = b.erase(int64(size))
	}
	if err == nil {
		err = fdatasync(b.fd)
	}
	if err != nil {
		return fmt.Errorf("namespace %s: erasing: %w", b.info.Name, errnoOf(err))
	}
	b.show(size, lba)
	return nil
}

// Close gives the device back. It does not flush.
func (b *block) Close() error {
	if b.zeros == nil {
		return nil
	}
	b.endWatch()
	err := b.file.Close()
	if b.claim != nil {
		err = errors.Join(err, b.claim.release())
	}
	return err
}
