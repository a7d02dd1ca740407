package backend

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// The backend nvme: is an NVMe namespace, or a slice of one, by its character device (/dev/ng0n1): the guest's commands go to the device by
// io_uring passthrough, past the block layer, with their blocks checked and moved and the guest's memory as their data. What the device answers is
// what the guest gets. Beside it the host may go on using other partitions of the same namespace.
//
//	nvmechar.go        opening, and what is shown of the device
//	nvmecharident.go   what the device says of itself
//	nvmecharcmd.go     what goes to the device
//	nvmecharqueue.go   the way of a request
//	nvmecharwatch.go   its end, and changes of its size
//	claim.go           who has which bytes of the host's disks

// nvmeChar is the backend of a character device. Everything in it that changes while a queue is open is atomic.
type nvmeChar struct {
	tally
	info Info
	id   identity
	spec Spec
	fd   int
	f    *os.File // owns fd
	asks charDevice

	name  string // of the block device of the same namespace, nvme0n1
	nsid  uint32
	shift uint8 // log2 of the device's block size
	ident *charIdent
	dev   charLimits
	first uint64 // block of the device that is the slice's first
	zeros []byte // for a device without Write Zeroes

	fixedVec atomic.Bool // the kernel takes pieces of registered memory

	device Device // for those who administer it

	limit  memlock
	claim  *claim // of the slice, on the host
	events *ueventHub
	deaf   func()      // ends listening to events; nil: there is nothing to hear
	other  atomic.Bool // the device is not what it was: nothing is sent to it any more

	// telling is held while watcher is called.
	telling sync.Mutex
	watcher func(Event) // nil: nobody watches yet
	missed  []Event     // what came before, each once
}

// openNvmeChar opens the character device of s.
func openNvmeChar(s Spec, log hclog.Logger) (_ Backend, err error) {
	say := func(err error) error { return fmt.Errorf("namespace nvme:%s: %w", s.Path, err) }
	f, err := openChar(s)
	if err != nil {
		return nil, say(err)
	}
	b := &nvmeChar{spec: s, limit: memlock{log: log}, f: f, fd: int(f.Fd()), events: &uevents}
	defer func() {
		if err != nil {
			b.letGo()
		}
	}()
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, say(err)
	}
	b.asks = charFile{conn}
	if b.name, err = genericName(machineSys, b.fd); err != nil {
		return nil, say(err)
	}
	if err := b.take(kernelLimits(machineSys, b.name)); err != nil {
		return nil, say(err)
	}
	from := b.first << b.info.LBAShift
	if b.claim, err = disks.take(b.name, from, from+b.info.Size(), s.ReadOnly); err != nil {
		return nil, say(err)
	}
	b.zeros, err = unix.Mmap(-1, 0, zeroChunk, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, say(err)
	}
	b.fixedVec.Store(kernelAtLeast(6, 15))
	b.show()
	if err := b.try(); err != nil {
		return nil, errors.Join(say(err), unix.Munmap(b.zeros))
	}
	b.id = takeKey(b.ident.key(s.Offset))
	b.show()
	b.listen()
	return b, nil
}

// try reads a block as guests will: better now than when the first controller is attached.
func (b *nvmeChar) try() error {
	q, err := b.NewQueue()
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, 1<<b.info.LBAShift, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return errors.Join(err, q.Close())
	}
	r := &Request{Op: OpRead, Len: uint64(len(mem)), Vec: []Seg{{Base: &mem[0], Len: uint64(len(mem))}}}
	var done [1]*Request
	n := q.Submit([]*Request{r}, done[:])
	for end := time.Now().Add(tryPatience); n == 0 && time.Now().Before(end); n = q.Reap(done[:]) {
		time.Sleep(time.Millisecond)
	}
	if n == 0 {
		// The kernel may write to mem, and the queue cannot be closed: both stay, as does the device.
		return fmt.Errorf("it does not answer a read within %v: see dmesg, and the state in /sys/class/nvme", tryPatience)
	}
	err = errors.Join(q.Close(), unix.Munmap(mem))
	if err == nil && r.Status == statusOf(OpRead, unix.EOPNOTSUPP) { // of the kernel: what the device says is for the guest
		what := "use Linux 5.19 or later"
		if b.spec.Poll {
			what = "leave out poll, or use Linux 6.1 or later"
		}
		err = fmt.Errorf("this kernel's io_uring does not pass commands on to it: %s, or serve it by block:%s", what, "/dev/"+b.name)
	}
	return err
}

const tryPatience = 30 * time.Second

// openChar opens the device's node and nothing else.
func openChar(s Spec) (*os.File, error) {
	mode := os.O_RDWR
	if s.ReadOnly {
		mode = os.O_RDONLY
	}
	st, err := os.Stat(s.Path)
	if err == nil && st.Mode()&os.ModeCharDevice == 0 {
		if name, ok := strings.CutPrefix(filepath.Base(s.Path), "nvme"); ok && st.Mode()&os.ModeDevice != 0 {
			return nil, fmt.Errorf("it is a block device: give the character device, as in nvme:/dev/ng%s, or use block:%s", name, s.Path)
		}
		return nil, errors.New("it is no character device: give that of an NVMe namespace, as in nvme:/dev/ng0n1 (ls /dev/ng*)")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: correct the path (ls /dev/ng*; the kernel must be Linux 5.13 or later with its nvme driver loaded)", errnoOf(err))
	}
	f, err := os.OpenFile(s.Path, mode|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: run hostmed as root, or as a user who may read and write it and has CAP_SYS_ADMIN; in a container, allow the device", errnoOf(err))
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("%w: the device is gone: see dmesg", errnoOf(err))
	case err != nil:
		return nil, errnoOf(err)
	}
	return f, nil
}

// kernelAtLeast says whether the kernel is of that version or a later one.
func kernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a > major || a == major && b >= minor
}

const machineSys = "/sys"

// genericName returns the name of the block device of the namespace that fd is the character device of.
func genericName(sys string, fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	no := errors.New("it is no character device of an NVMe namespace: give one, as in nvme:/dev/ng0n1 (ls /dev/ng*)")
	at, err := filepath.EvalSymlinks(filepath.Join(sys, "dev/char", fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))))
	if err != nil {
		return "", no
	}
	rest, ok := strings.CutPrefix(filepath.Base(at), "ng")
	if !ok {
		return "", no
	}
	return "nvme" + rest, nil
}

// kernelLimits are those of the block device with this name. A namespace may have none, and then there are none.
func kernelLimits(sys, name string) (l blockLimits) {
	number := func(what string) uint64 {
		b, _ := os.ReadFile(filepath.Join(sys, "class/block", name, "queue", what))
		n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		return n
	}
	l.maxBytes = min(number("max_hw_sectors_kb"), maxOp>>10) << 10
	l.maxPages = number("max_segments")
	l.polled = number("io_poll") != 0
	return l
}

// take asks the device, and takes the slice.
func (b *nvmeChar) take(k blockLimits) error {
	id, err := readIdent(b.asks)
	if err != nil {
		return err
	}
	if err := b.spec.mayVendor(); err != nil {
		return err
	}
	if b.spec.Poll && !k.polled {
		return errors.New("poll: the device has no poll queues: load its driver with them (nvme.poll_queues=2 on the kernel's command line, or modprobe nvme poll_queues=2), or leave poll out")
	}
	b.ident, b.nsid, b.shift = id, id.nsid, id.shift
	b.dev = id.limits(k)
	if err := b.slice(id); err != nil {
		return err
	}
	b.device = Device{NSID: id.nsid, Whole: b.spec.whole(), Vendor: b.spec.Vendor, Controller: id.ctrl, Effects: id.acts}
	return b.mayCommand()
}

// slice finds the blocks that are served.
func (b *nvmeChar) slice(id *charIdent) error {
	size := id.blocks << id.shift
	block := uint64(1) << id.shift
	s := b.spec
	off := func(key string, v uint64) error {
		if v%block != 0 {
			return fmt.Errorf("%s=%s is not a multiple of the device's block size of %d bytes: the next one is %d", key, FormatSize(v), block, v-v%block+block)
		}
		return nil
	}
	if err := errors.Join(off("offset", s.Offset), off("size", s.Size)); err != nil {
		return err
	}
	if s.Offset >= size {
		return fmt.Errorf("offset=%s is behind its end: it is %s (%d bytes) large", FormatSize(s.Offset), FormatSize(size), size)
	}
	n := s.Size
	if n == 0 {
		n = size - s.Offset
	}
	if n > size-s.Offset {
		return fmt.Errorf("offset=%s,size=%s ends behind its end: at the most size=%s is left", FormatSize(s.Offset), FormatSize(n), FormatSize(size-s.Offset))
	}
	b.first = s.Offset >> id.shift
	b.info.Blocks, b.info.LBAShift = n>>id.shift, id.shift
	return nil
}

// mayCommand tries whether the kernel lets this process send what guests will ask for. Without CAP_SYS_ADMIN it does so only where the
// device says in its Commands Supported and Effects log what they do (Linux 6.2).
func (b *nvmeChar) mayCommand() error {
	data := make([]byte, 1<<b.info.LBAShift)
	for _, c := range []passthru{
		{Opcode: nvme.IORead, NSID: b.nsid, CDW10: uint32(b.first), CDW11: uint32(b.first >> 32)},
		{Opcode: nvme.IOFlush, NSID: b.nsid},
	} {
		d := data
		if c.Opcode == nvme.IOFlush {
			d = nil
			if b.spec.ReadOnly || b.ident.ctrl.VWC&nvme.VWCPresent == 0 {
				continue
			}
		}
		// The device's own opinion is the guest's to see, later.
		if _, err := b.asks.io(&c, d); errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%s: %w: run hostmed as root, or give it CAP_SYS_ADMIN", nvme.IOOpcodeName(c.Opcode), err)
		}
	}
	return nil
}

// show fills in info.
func (b *nvmeChar) show() {
	id := b.ident
	i := &b.info
	i.Name, i.FixedLBA = b.spec.String(), true
	i.ReadOnly = b.spec.ReadOnly || id.ns.NSATTR&nvme.NSATTRWriteProtected != 0
	i.NGUID, i.UUID = b.id.nguid(), b.id.uuid()
	most := b.dev.maxData
	if b.dev.zeroes {
		most = min(most, b.dev.maxZeroes)
	}
	i.promise(&id.ctrl, &id.ns, b.first, most>>b.shift, id.ctrl.ONCS&nvme.ONCSDSM != 0 && !id.restricted, b.dev.zeroes)
	i.Native, i.NativeMax = id.native(b.dev, i.ReadOnly)
}

func (b *nvmeChar) Info() Info { return b.info }

// Close gives the device and the slice back. It does not flush.
func (b *nvmeChar) Close() error {
	if b.zeros == nil {
		return nil
	}
	if b.deaf != nil {
		b.deaf()
	}
	b.id.release()
	err := unix.Munmap(b.zeros)
	b.zeros = nil
	return errors.Join(err, b.letGo())
}

func (b *nvmeChar) letGo() error {
	if b.claim == nil {
		return b.f.Close()
	}
	return errors.Join(b.f.Close(), b.claim.release())
}

// Device is what of the device a guest may use.
func (b *nvmeChar) Device() *Device { return &b.device }

// adminPatience is for commands that answer soon: what takes long goes on in the device.
const adminPatience = 10_000 // milliseconds

func (b *nvmeChar) Admin(c *nvme.Command, data []byte) (dw0 uint32, status nvme.Status, err error) {
	p := &passthru{Opcode: c.Opcode, NSID: c.NSID, CDW10: c.CDW10, CDW11: c.CDW11, CDW12: c.CDW12, CDW13: c.CDW13, CDW14: c.CDW14, CDW15: c.CDW15, TimeoutMS: adminPatience}
	status, err = b.asks.admin(p, data)
	return p.DW0, status, err
}

// Warnings is what the operator should know.
func (b *nvmeChar) Warnings() []string {
	w := b.claim.warnings
	if block := b.info.LBASize(); b.ident.ns.NSFEAT&nvme.NSFEATOptPerf != 0 {
		unit := uint64(b.ident.ns.NPWG.Count()) * block
		if b.spec.Offset%unit != 0 || b.spec.Size%unit != 0 {
			w = append(w[:len(w):len(w)], fmt.Sprintf("the device writes best in units of %d bytes (NPWG), and the slice is not of such units: its guest's writes are slower than they need be", unit))
		}
	}
	if b.ident.restricted {
		w = append(w[:len(w):len(w)], "without CAP_SYS_ADMIN only reads, writes and flushes go to the device: hostmed writes zeroes itself, nothing is deallocated, and the device's health is not shown")
	}
	return w
}

// Resized reports whether the namespace is of another size. A slice with size= is not.
func (b *nvmeChar) Resized() bool {
	if b.spec.Size != 0 {
		return false
	}
	id, err := readIdent(b.asks)
	return err == nil && (id.shift != b.info.LBAShift || id.blocks != b.first+b.info.Blocks)
}

func (b *nvmeChar) Resize() error {
	id, err := readIdent(b.asks)
	if err == nil && id.shift != b.info.LBAShift {
		err = fmt.Errorf("its blocks are of %d bytes now, not %d: start hostmed again", 1<<id.shift, 1<<b.info.LBAShift)
	}
	before := b.info.Blocks
	if err == nil {
		err = b.slice(id)
	}
	if from := b.first << b.info.LBAShift; err == nil && b.claim != nil {
		if err = b.claim.grow(b.name, from, from+b.info.Size(), b.spec.ReadOnly); err != nil {
			b.info.Blocks = before
		}
	}
	if err != nil {
		return fmt.Errorf("namespace nvme:%s: %w", b.spec.Path, err)
	}
	b.ident = id
	b.show()
	return nil
}

// Format writes zeroes. The device's own Format NVM would take the neighbours' blocks along, and the kernel's notion of the block size.
func (b *nvmeChar) Format(lba uint32) error {
	if err := b.info.checkFormat(lba); err != nil {
		return err
	}
	if lba != uint32(b.info.LBASize()) {
		return fmt.Errorf("namespace %s: the device has blocks of %d bytes, and only its host can change that (nvme format)", b.info.Name, b.info.LBASize())
	}
	r := &Request{Op: OpWriteZeroes, Len: b.info.Size(), Dealloc: true}
	for at := uint64(0); at < r.Len; {
		if b.other.Load() {
			return fmt.Errorf("namespace %s: the device's blocks are not what they were, or it is another: start hostmed again", b.info.Name)
		}
		n, _ := b.piece(r, at)
		var c passthru
		b.command(&c, r, at, n)
		var data []byte
		if !b.dev.zeroes {
			data = b.zeros[:n]
		}
		st, err := b.asks.io(&c, data)
		if err == nil {
			err = st.Err()
		}
		if err != nil {
			return fmt.Errorf("namespace %s: erasing: %w", b.info.Name, err)
		}
		at += n
	}
	return nil
}
