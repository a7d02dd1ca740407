package backend

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// The backend vfio: is a namespace, or a slice of one, of an NVMe device that this process has through VFIO. The device moves data straight to
// and from guest memory. All that name one device share it: see package hostnvme. The device is nobody else's, so slices are checked
// against each other here and not on the host.
//
//	vfio.go        opening, and what is shown of the device
//	vfioqueue.go   the way of a request
//	vfioadmin.go   admin commands of guests
type vfio struct {
	tally
	spec  Spec
	log   hclog.Logger
	info  Info
	id    identity
	dev   *hostnvme.Device
	is    *hostnvme.Space // the namespace
	pool  *hostnvme.Pool  // queue pairs of its own; nil: those that are for all
	slice hostnvme.Slice
	nvm   nvme.IdentifyControllerNVM
	held  *vfioSlice
	deaf  func() // ends Watch

	device  Device          // for those who administer it
	asking  chan struct{}   // full while Admin is at work, and after Close
	life    context.Context // ends at Close
	endLife context.CancelFunc
	closed  bool
}

const (
	vfioPatience   = time.Minute     // for a device to come up
	memoryPatience = 3 * time.Second // 100 GiB and more in large pages
	maxVFIONLB     = 1 << 16
)

func openVFIO(s Spec, log hclog.Logger) (_ Backend, err error) {
	say := func(err error) error { return fmt.Errorf("namespace vfio:%s: %w", s.Path, err) }
	ctx, cancel := context.WithTimeout(context.Background(), vfioPatience)
	defer cancel()
	dev, err := hostnvme.Open(ctx, s.Path, hostnvme.Options{Timeout: s.Timeout, UnsafeNoIOMMU: s.UnsafeNoIOMMU, Logger: log.Named("vfio")})
	if err != nil {
		return nil, say(err)
	}
	b, err := newVFIO(s, dev, log)
	if err != nil {
		return nil, say(errors.Join(err, dev.Close()))
	}
	return b, nil
}

// OverDevice is the backend of s over a device that is open, and that it closes.
func OverDevice(s Spec, dev *hostnvme.Device) (Backend, error) {
	b, err := newVFIO(s, dev, hclog.NewNullLogger())
	if err != nil {
		return nil, err
	}
	return b, nil
}

// newVFIO takes a slice of dev.
func newVFIO(s Spec, dev *hostnvme.Device, log hclog.Logger) (_ *vfio, err error) {
	b := &vfio{spec: s, dev: dev, log: log.Named("vfio"), asking: make(chan struct{}, 1)}
	b.life, b.endLife = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			b.endLife()
		}
	}()
	if b.spec.NSID == 0 {
		ids := dev.Namespaces()
		if len(ids) != 1 {
			return nil, fmt.Errorf("the device has the namespaces %v: say which one, as in nsid=1", ids)
		}
		b.spec.NSID = ids[0]
	}
	b.is = dev.Space(b.spec.NSID)
	if err := errors.Join(s.mayVendor(), b.take()); err != nil {
		return nil, err
	}
	if b.held, err = vfioSlices.take(b.key(), s.Offset, s.Offset+b.info.Size(), s.ReadOnly); err != nil {
		return nil, err
	}
	if s.Queues > 0 {
		if b.pool, err = dev.Pairs().Reserve(s.Queues); err != nil {
			b.held.release()
			return nil, err
		}
	}
	b.device = b.describe()
	b.id = takeKey(b.identity())
	b.info.NGUID, b.info.UUID = b.id.nguid(), b.id.uuid()
	return b, nil
}

// key names the device's namespace in this process.
func (b *vfio) key() string { return fmt.Sprintf("%s %d", b.dev.Address(), b.spec.NSID) }

// identity is what stays the same of the slice, wherever its device is plugged in.
func (b *vfio) identity() string {
	ctrl := b.dev.Controller()
	name := fmt.Sprintf("%#x %q %q %d", ctrl.VID, ctrl.SN, ctrl.MN, b.spec.NSID)
	if ns, err := b.dev.Namespace(b.spec.NSID); err == nil && (ns.NGUID != [16]byte{} || ns.EUI64 != [8]byte{}) {
		name = fmt.Sprintf("%x %x", ns.NGUID, ns.EUI64)
	}
	return fmt.Sprintf("vfio:%s+%d", name, b.spec.Offset)
}

// take makes slice and info of what the device says now.
func (b *vfio) take() error {
	ns, err := b.dev.Namespace(b.spec.NSID)
	if err != nil {
		return err
	}
	block, ok := ns.BlockSize()
	f := ns.Format()
	switch {
	case !ok || f.LBADS > MaxLBAShift:
		return fmt.Errorf("its blocks of 2^%d bytes are none that a guest can be given: format it with blocks of 512 or 4096 bytes", f.LBADS)
	case f.MS != 0:
		return fmt.Errorf("its blocks have %d bytes of metadata: format it without (nvme format --lbaf=)", f.MS)
	}
	shift := f.LBADS
	if ns.NSZE == 0 || ns.NSZE > math.MaxInt64>>shift {
		return fmt.Errorf("the device says that it has %d blocks of %d bytes", ns.NSZE, block)
	}
	first, blocks, err := sliceOf(b.spec, ns.NSZE, shift)
	if err != nil {
		return err
	}
	b.readNVM()
	b.limit(ns, first, blocks, shift)
	b.show(ns)
	return nil
}

// sliceOf finds the blocks that s names in a namespace of size blocks.
func sliceOf(s Spec, size uint64, shift uint8) (first, blocks uint64, err error) {
	block, bytes := uint64(1)<<shift, size<<shift
	for key, v := range map[string]uint64{"offset": s.Offset, "size": s.Size} {
		if v%block != 0 {
			return 0, 0, fmt.Errorf("%s=%s is not a multiple of the device's block size of %d bytes: the next one is %d", key, FormatSize(v), block, v-v%block+block)
		}
	}
	if s.Offset >= bytes {
		return 0, 0, fmt.Errorf("offset=%s is behind its end: it is %s (%d bytes) large", FormatSize(s.Offset), FormatSize(bytes), bytes)
	}
	n := s.Size
	if n == 0 {
		n = bytes - s.Offset
	}
	if n > bytes-s.Offset {
		return 0, 0, fmt.Errorf("offset=%s,size=%s ends behind its end: at the most size=%s is left", FormatSize(s.Offset), FormatSize(n), FormatSize(bytes-s.Offset))
	}
	return s.Offset >> shift, n >> shift, nil
}

// readNVM reads the limits of the NVM command set, which older devices do not have.
func (b *vfio) readNVM() {
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSCSIController, 0, nvme.CSINVM)
	ctx, cancel := context.WithTimeout(context.Background(), adminTimeout)
	defer cancel()
	var nvm nvme.IdentifyControllerNVM
	if st, _, err := b.dev.Exec(ctx, cmd, nvm.Bytes()[:]); err == nil && st.OK() {
		b.nvm = nvm
	}
}

// pages is 2^log pages of CAP.MPSMIN, or all that a command's block count can say.
func (b *vfio) pages(log, shift uint8) uint64 {
	most := uint64(maxVFIONLB) << shift
	at := 12 + uint(b.dev.Capabilities().MPSMIN()) + uint(log)
	if log == 0 || at > 40 {
		return most
	}
	return max(min(uint64(1)<<at, most), 1<<shift)
}

func (b *vfio) limit(ns *nvme.IdentifyNamespace, first, blocks uint64, shift uint8) {
	ctrl := b.dev.Controller()
	discard := uint64(math.MaxUint32)
	if b.nvm.DMRSL != 0 {
		discard = min(discard, uint64(b.nvm.DMRSL))
	}
	if b.nvm.DMSL != 0 {
		discard = min(discard, b.nvm.DMSL)
	}
	b.slice = hostnvme.Slice{
		NSID: b.spec.NSID, Is: b.is, First: first, Blocks: blocks, Shift: shift,
		ReadOnly:    b.spec.ReadOnly || ns.NSATTR&nvme.NSATTRWriteProtected != 0,
		MaxTransfer: max(uint64(b.dev.MaxTransfer())&^(1<<shift-1), 1<<shift),
		Boundary:    uint64(ns.NOIOB) << shift,
		Zeroes:      ctrl.ONCS&nvme.ONCSWriteZeroes != 0,
		MaxZeroes:   b.pages(b.nvm.WZSL, shift),
		Dealloc:     ns.DLFEAT&nvme.DLFEATWZDealloc != 0,
		Discard:     ctrl.ONCS&nvme.ONCSDSM != 0,
		MaxDiscard:  discard << shift,
	}
}

// mostZeroes is how many bytes of zeroes one command can write.
func (b *vfio) mostZeroes() uint64 {
	if b.slice.Zeroes {
		return b.slice.MaxZeroes
	}
	return b.slice.MaxTransfer
}

// show fills in info, and what of it the slice has to keep.
func (b *vfio) show(ns *nvme.IdentifyNamespace) {
	ctrl, s := b.dev.Controller(), &b.slice
	i := &b.info
	i.Name, i.Blocks, i.LBAShift, i.ReadOnly = b.spec.String(), s.Blocks, s.Shift, s.ReadOnly
	i.FixedLBA = true
	i.promise(ctrl, ns, s.First, min(s.MaxTransfer, b.mostZeroes())>>s.Shift, s.Discard, s.Zeroes)
	s.Atomic = uint64(i.AtomicWrite) << s.Shift
	writes := !i.ReadOnly
	i.Native = Opcodes{}
	add := func(bit uint16, changes bool, op uint8) {
		if ctrl.ONCS&bit != 0 && (writes || !changes) {
			i.Native = i.Native.With(op)
		}
	}
	add(nvme.ONCSCompare, false, nvme.IOCompare)
	add(nvme.ONCSVerify, false, nvme.IOVerify)
	add(nvme.ONCSWriteUncorrectable, true, nvme.IOWriteUncorrectable)
	add(nvme.ONCSDSM, true, nvme.IODSM)
	if ctrl.OCFS&nvme.OCFSFormat0 != 0 && ns.MSSRL != 0 && ns.MCL != 0 {
		add(nvme.ONCSCopy, true, nvme.IOCopy)
	}
	i.NativeMax = CommandLimits{
		Compare: s.MaxTransfer, Verify: b.pages(b.nvm.VSL, s.Shift), WriteUncorrectable: b.pages(b.nvm.WUSL, s.Shift),
		DSMRanges: uint32(b.nvm.DMRL), DSMRange: b.nvm.DMRSL, DSM: b.nvm.DMSL,
		CopyRanges: ns.MSRC.Count(), CopyRange: uint32(ns.MSSRL), Copy: ns.MCL,
	}
}

func (b *vfio) Info() Info { return b.info }

// Warnings says what it means that there is no IOMMU.
func (b *vfio) Warnings() []string {
	if !b.dev.Exposed() {
		return nil
	}
	return []string{fmt.Sprintf("UNSAFE: no IOMMU keeps %s from any memory of this machine. Its firmware, and a mistake in an address that hostmed gives it, can read and change everything: the kernel, hostmed and every guest. "+
		"Guests give it no addresses, and their memory is pinned for it: no balloon may take that away", b.dev.Address())}
}

// AwaitMemory waits until the device reaches what its queues were told of: until then data is copied.
func (b *vfio) AwaitMemory() { b.dev.Pairs().Memory().Settle(memoryPatience) }

// Watch makes f hear of the device's end, of changes of the namespace, and of warnings.
func (b *vfio) Watch(f func(Event)) {
	b.deaf = b.dev.Watch(b.spec.NSID, func(e hostnvme.Event) {
		f(map[hostnvme.Event]Event{hostnvme.Changed: EventChanged, hostnvme.Gone: EventGone, hostnvme.Health: EventHealth}[e])
	})
}

// Resized reports whether the namespace is of another size. A slice with size= is not.
func (b *vfio) Resized() bool {
	ns, err := b.dev.Namespace(b.spec.NSID)
	if err != nil || b.spec.Size != 0 {
		return false
	}
	return ns.Format().LBADS != b.info.LBAShift || ns.NSZE != b.slice.First+b.slice.Blocks
}

func (b *vfio) Resize() error {
	say := func(err error) error { return fmt.Errorf("namespace vfio:%s: %w", b.spec.Path, err) }
	ns, err := b.dev.Namespace(b.spec.NSID)
	if err != nil {
		return say(err)
	}
	if shift := ns.Format().LBADS; shift != b.info.LBAShift {
		return say(fmt.Errorf("its blocks are of 2^%d bytes now, not %d: start hostmed again", shift, b.info.LBASize()))
	}
	slice, info := b.slice, b.info
	if err = b.take(); err == nil {
		err = vfioSlices.grow(b.held, b.spec.Offset+b.info.Size())
	}
	if err != nil {
		b.slice, b.info = slice, info
		return say(err)
	}
	return nil
}

// Format writes zeroes: the device's own Format NVM would take the neighbours' blocks along.
func (b *vfio) Format(lba uint32) error {
	if err := b.info.checkFormat(lba); err != nil {
		return err
	}
	if lba != uint32(b.info.LBASize()) {
		return fmt.Errorf("namespace %s: the device has blocks of %d bytes, and only its host can change that (nvme format)", b.info.Name, b.info.LBASize())
	}
	q, err := b.open(nil, b.dev.Polled())
	if err != nil {
		return fmt.Errorf("namespace %s: %w", b.info.Name, err)
	}
	st := q.Do(hostnvme.Request{Op: hostnvme.WriteZeroes, Len: b.info.Size(), Dealloc: true})
	if err := errors.Join(st.Err(), q.Close()); err != nil {
		return fmt.Errorf("namespace %s: erasing: %w", b.info.Name, err)
	}
	return nil
}

// Close leaves the device to the others that have it.
func (b *vfio) Close() error {
	if b.closed {
		return nil
	}
	b.closed = true
	b.endLife()
	b.asking <- struct{}{} // nobody asks the device from here on
	if b.deaf != nil {
		b.deaf()
	}
	b.id.release()
	b.held.release()
	if b.pool != nil {
		b.dev.Pairs().Return(b.pool)
	}
	b.tell()
	err := b.dev.Pairs().Trim()
	b.AwaitMemory() // to be taken back
	return errors.Join(err, b.dev.Close())
}

// tell says in the log what the device has done so far, for all that have it.
func (b *vfio) tell() {
	n, used := b.dev.Pairs().Counts()
	d := b.dev.Stats()
	b.log.Info("namespace closed", "spec", b.info.Name, "commands", n.Commands, "mapped", n.Mapped, "copied", n.Bounced, "waited", n.Full,
		"sent again", n.Reissued, "failed", n.Failed, "wrong completions", n.Wrong, "doorbell writes", n.Doorbells, "batches", n.Batches, "kicks", n.Kicks,
		"queue pairs in use", used, "resets", d.Resets, "timeouts", d.Timeouts, "aborts", d.Aborts)
}

// vfioSlices are those that backends of this process have.
var vfioSlices vfioClaims

type vfioClaims struct {
	mu   sync.Mutex
	held map[*vfioSlice]struct{}
}

// vfioSlice is bytes of a device's namespace.
type vfioSlice struct {
	of       *vfioClaims
	key      string
	from, to uint64
	readOnly bool
}

func (c *vfioClaims) take(key string, from, to uint64, readOnly bool) (*vfioSlice, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &vfioSlice{c, key, from, to, readOnly}
	if err := c.free(s); err != nil {
		return nil, err
	}
	if c.held == nil {
		c.held = map[*vfioSlice]struct{}{}
	}
	c.held[s] = struct{}{}
	return s, nil
}

// free says whether nobody but s has a byte of it, except to read where s only reads too.
func (c *vfioClaims) free(s *vfioSlice) error {
	for o := range c.held {
		if o != s && o.key == s.key && o.from < s.to && s.from < o.to && !(o.readOnly && s.readOnly) {
			return fmt.Errorf("another namespace has its bytes %d to %d, and this one would have %d to %d: give slices that do not overlap, or one SPEC to several sockets", o.from, o.to-1, s.from, s.to-1)
		}
	}
	return nil
}

// grow makes s end at to.
func (c *vfioClaims) grow(s *vfioSlice, to uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := s.to
	s.to = to
	err := c.free(s)
	if err != nil {
		s.to = was
	}
	return err
}

func (s *vfioSlice) release() {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	delete(s.of.held, s)
}
