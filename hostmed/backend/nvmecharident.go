package backend

import (
	"errors"
	"fmt"
	"math"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What a device says of itself, and what this backend makes of it. Nothing that it says is believed: a size that cannot be is refused, a
// limit that cannot be is none.

// charDevice is the character device of a namespace, as far as it is asked by ioctl.
type charDevice interface {
	nsid() (uint32, error)
	// admin and io run a command and wait for it. The error is the kernel's.
	admin(c *passthru, data []byte) (nvme.Status, error)
	io(c *passthru, data []byte) (nvme.Status, error)
}

// charFile keeps the file open while it is asked.
type charFile struct{ syscall.RawConn }

func (f charFile) nsid() (id uint32, err error) {
	asked := f.Control(func(fd uintptr) {
		var n int
		n, err = unix.IoctlRetInt(int(fd), nvmeIoctlID)
		id = uint32(n)
	})
	return id, errors.Join(asked, err)
}

func (f charFile) admin(c *passthru, data []byte) (nvme.Status, error) {
	return f.run(nvmeIoctlAdmin, c, data)
}

func (f charFile) io(c *passthru, data []byte) (nvme.Status, error) {
	return f.run(nvmeIoctlIO, c, data)
}

func (f charFile) run(request uintptr, c *passthru, data []byte) (st nvme.Status, err error) {
	asked := f.Control(func(fd uintptr) { st, err = ioctlPassthru(int(fd), request, c, data) })
	if asked != nil {
		err = asked
	}
	return st, err
}

// blockLimits are what the kernel's block device of the same namespace has, from its sysfs directory queue/. 0: not known.
type blockLimits struct {
	maxBytes, maxPages uint64
	polled             bool
}

// charLimits are a device's, in bytes of one command where nothing else is said. All are multiples of the block size and at least one block.
type charLimits struct {
	maxData    uint64
	maxPages   uint32
	maxZeroes  uint64
	maxDiscard uint64
	zeroes     bool // it has Write Zeroes
}

// charIdent is what a device says of itself and of one of its namespaces.
type charIdent struct {
	nsid uint32
	ctrl nvme.IdentifyController
	nvm  nvme.IdentifyControllerNVM // zeroes where the controller is too old for it
	ns   nvme.IdentifyNamespace
	ids  nvme.NamespaceDescriptors
	acts nvme.CommandEffects // zeroes where the device has no such log

	blocks uint64
	shift  uint8

	// restricted: this process is not CAP_SYS_ADMIN, and what the kernel lets it send beside Read, Write and Flush is not to be learnt.
	restricted bool
}

func identifyChar(d charDevice, cns nvme.CNS, nsid uint32, data *[nvme.IdentifySize]byte) error {
	c := &passthru{Opcode: nvme.AdminIdentify, NSID: nsid, CDW10: uint32(cns), TimeoutMS: adminPatience}
	st, err := d.admin(c, data[:])
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("asking the device (Identify %v): %w: run hostmed as root, or give it CAP_SYS_ADMIN", cns, err)
	case errors.Is(err, unix.ENOTTY):
		return errors.New("it is no NVMe namespace: give the character device of one, as in nvme:/dev/ng0n1 (ls /dev/ng*)")
	case err != nil:
		return fmt.Errorf("asking the device (Identify %v): %w: is it alive? See dmesg and /sys/class/nvme/*/state", cns, err)
	case !st.OK():
		return fmt.Errorf("asking the device (Identify %v): it says %v", cns, st)
	}
	return nil
}

// readIdent asks the device who it is. With an error it returns what the device said if it did answer.
func readIdent(d charDevice) (*charIdent, error) {
	var id charIdent
	var err error
	if id.nsid, err = d.nsid(); err != nil || id.nsid == 0 || id.nsid == nvme.NSIDAll {
		return nil, errors.New("it is no NVMe namespace: give the character device of one, as in nvme:/dev/ng0n1 (ls /dev/ng*)")
	}
	if err := identifyChar(d, nvme.CNSController, 0, id.ctrl.Bytes()); err != nil {
		return nil, err
	}
	if err := identifyChar(d, nvme.CNSNamespace, id.nsid, id.ns.Bytes()); err != nil {
		return nil, err
	}
	// What follows is newer than some devices, and what they say if they do not know it is theirs.
	if identifyChar(d, nvme.CNSCSIController, 0, id.nvm.Bytes()) != nil {
		id.nvm = nvme.IdentifyControllerNVM{}
	}
	var list [nvme.IdentifySize]byte
	switch err := identifyChar(d, nvme.CNSNamespaceDescriptors, id.nsid, &list); {
	case err == nil:
		id.ids.Decode(&list)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		id.restricted = true // anybody may ask for the others
	}
	if id.ctrl.LPA&nvme.LPACommandEffects != 0 {
		c := &passthru{Opcode: nvme.AdminGetLogPage, CDW10: uint32(nvme.LogCommandEffects) | (nvme.IdentifySize/4-1)<<16, TimeoutMS: adminPatience}
		if st, err := d.admin(c, id.acts.Bytes()[:]); err != nil || !st.OK() {
			id.acts = nvme.CommandEffects{}
		}
	}
	return &id, id.geometry()
}

// geometry checks what the namespace says of its blocks.
func (id *charIdent) geometry() error {
	if id.ids.HasCSI && id.ids.CSI != nvme.CSINVM {
		return fmt.Errorf("it is of the %v command set, and only the NVM command set is served: use another namespace", id.ids.CSI)
	}
	f := id.ns.Format()
	const reformat = "format it with a block size of 512 or 4096 bytes and no metadata, which loses its data (nvme id-ns -H, then nvme format --lbaf=N), or use block:"
	switch {
	case id.ns.NSZE == 0:
		return errors.New("the device says that the namespace has no blocks: is it attached? See nvme list-ns and nvme id-ns")
	case f.LBADS < 9 || f.LBADS > MaxLBAShift:
		return fmt.Errorf("its blocks are of 2^%d bytes, and 512 to %d can be served: %s", f.LBADS, maxLBA, reformat)
	case f.MS != 0:
		return fmt.Errorf("its blocks have %d bytes of metadata, which guests are not given: %s", f.MS, reformat)
	case id.ns.DPS&7 != 0:
		return fmt.Errorf("it has protection information of type %d, which guests are not given: %s", id.ns.DPS&7, reformat)
	case id.ns.NSZE > math.MaxInt64>>f.LBADS:
		return fmt.Errorf("the device says that the namespace has %d blocks of %d bytes, which no device has: its firmware or its driver is broken", id.ns.NSZE, 1<<f.LBADS)
	}
	id.blocks, id.shift = id.ns.NSZE, f.LBADS
	return nil
}

const (
	defaultCharData = 128 << 10 // bytes of a command where nobody has said what the device takes
	defaultCharSegs = 32
	maxCharDiscard  = 1 << 31 // blocks; a range's length has 32 bits
)

// limits are what one command may be about: what the kernel's block device has, but never more than the device says.
func (id *charIdent) limits(k blockLimits) charLimits {
	const page = 4096
	block := uint64(1) << id.shift
	round := func(n uint64) uint64 { return max(n&^(block-1), block) }
	pages := func(log uint8) uint64 { // of CAP.MPSMIN, which is 4 KiB in every device that there is
		if log == 0 || log > 40 {
			return math.MaxInt64
		}
		return page << log
	}
	l := charLimits{zeroes: id.ctrl.ONCS&nvme.ONCSWriteZeroes != 0 && !id.restricted}
	l.maxData = k.maxBytes
	if l.maxData == 0 {
		l.maxData = defaultCharData
	}
	l.maxData = round(min(l.maxData, pages(id.ctrl.MDTS), maxNLB<<id.shift, maxOp))
	l.maxPages = uint32(min(k.maxPages, maxVec))
	if l.maxPages == 0 {
		l.maxPages = defaultCharSegs
	}
	l.maxZeroes = maxNLB << id.shift
	if id.nvm.WZSL != 0 {
		l.maxZeroes = min(l.maxZeroes, pages(id.nvm.WZSL))
	}
	l.maxZeroes = round(l.maxZeroes)
	discard := uint64(maxCharDiscard)
	if id.nvm.DMRSL != 0 {
		discard = min(discard, uint64(id.nvm.DMRSL))
	}
	if id.nvm.DMSL != 0 {
		discard = min(discard, id.nvm.DMSL)
	}
	l.maxDiscard = max(discard, 1) << id.shift
	return l
}

// native is which of the guest's commands the device does itself, and how much of each.
func (id *charIdent) native(l charLimits, readOnly bool) (o Opcodes, most CommandLimits) {
	oncs := id.ctrl.ONCS
	if id.restricted {
		oncs = 0
	}
	add := func(bit uint16, writes bool, op uint8) {
		if oncs&bit != 0 && !(writes && readOnly) {
			o = o.With(op)
		}
	}
	add(nvme.ONCSCompare, false, nvme.IOCompare)
	add(nvme.ONCSVerify, false, nvme.IOVerify)
	add(nvme.ONCSWriteUncorrectable, true, nvme.IOWriteUncorrectable)
	add(nvme.ONCSDSM, true, nvme.IODSM)
	if id.ctrl.OCFS&nvme.OCFSFormat0 != 0 && id.ns.MSSRL != 0 && id.ns.MCL != 0 {
		add(nvme.ONCSCopy, true, nvme.IOCopy)
	}
	some := func(log uint8) uint64 { // no limit said: that of a command's block count
		if log == 0 || log > 40 {
			return maxNLB << id.shift
		}
		return max(min(uint64(4096)<<log, maxNLB<<id.shift), 1<<id.shift)
	}
	return o, CommandLimits{
		Compare: l.maxData, Verify: some(id.nvm.VSL), WriteUncorrectable: some(id.nvm.WUSL),
		DSMRanges: uint32(id.nvm.DMRL), DSMRange: id.nvm.DMRSL, DSM: id.nvm.DMSL,
		CopyRanges: id.ns.MSRC.Count(), CopyRange: uint32(id.ns.MSSRL), Copy: id.ns.MCL,
	}
}

// key is what stays the same of the slice that begins at offset, whatever the kernel calls the device.
func (id *charIdent) key(offset uint64) string {
	ns := &id.ns
	name := fmt.Sprintf("%x %x %x", ns.NGUID, ns.EUI64, id.ids.UUID)
	if ns.NGUID == [16]byte{} && ns.EUI64 == [8]byte{} && !id.ids.HasUUID {
		name = fmt.Sprintf("%#x %q %q %d", id.ctrl.VID, id.ctrl.SN, id.ctrl.MN, id.nsid)
	}
	return fmt.Sprintf("nvme:%s+%d", name, offset)
}
