package nvme

import "encoding/binary"

// The Persistent Event log, 0Dh: a header, then events one after the other, the newest first. NVMe Base 2.0c 5.16.1.14.

// Sizes in bytes.
const (
	PersistentHeaderSize      = 512
	PersistentEventHeaderSize = 24
	PersistentEventUnit       = 64 << 10 // of IdentifyController.PELS
)

// Actions of Get Log Page for it, in the log specific field.
const (
	PersistentRead      = 0 // of the context there is
	PersistentEstablish = 1 // and read
	PersistentRelease   = 2
	PersistentHeader    = 3 // establish, and read the header alone
)

// PersistentEventType is what happened.
type PersistentEventType uint8

// Values of PersistentEventType.
const (
	PersistentSMART           PersistentEventType = 0x01
	PersistentTimestamp       PersistentEventType = 0x03
	PersistentPowerOnReset    PersistentEventType = 0x04
	PersistentChangeNamespace PersistentEventType = 0x06
	PersistentFormatStart     PersistentEventType = 0x07
	PersistentFormatEnd       PersistentEventType = 0x08
)

// PersistentLog is what the header says beside what the events say themselves.
type PersistentLog struct {
	Time         Timestamp
	PowerOnHours uint64
	PowerCycles  uint64
	VID, SSVID   uint16
	SN           [20]byte
	MN           [40]byte
	SUBNQN       [256]byte
	Generation   uint16
	Supported    []PersistentEventType
}

// Header returns the header of a log of n events and total bytes, the header among them.
func (l *PersistentLog) Header(n uint32, total uint64) *[PersistentHeaderSize]byte {
	const (
		revision      = 2
		headerLength  = PersistentHeaderSize - 20
		contextExists = 1 << 18
	)
	b := new([PersistentHeaderSize]byte)
	le := binary.LittleEndian
	b[0] = uint8(LogPersistentEvent)
	le.PutUint32(b[4:], n)
	le.PutUint64(b[8:], total)
	b[16] = revision
	le.PutUint16(b[18:], headerLength)
	copy(b[20:], l.Time[:])
	le.PutUint64(b[28:], l.PowerOnHours)
	le.PutUint64(b[44:], l.PowerCycles)
	le.PutUint16(b[52:], l.VID)
	le.PutUint16(b[54:], l.SSVID)
	copy(b[56:], l.SN[:])
	copy(b[76:], l.MN[:])
	copy(b[116:], l.SUBNQN[:])
	le.PutUint16(b[372:], l.Generation)
	le.PutUint32(b[374:], contextExists)
	for _, t := range l.Supported {
		b[480+int(t)/8] |= 1 << (t % 8)
	}
	return b
}

// AppendPersistentEvent appends an event of controller cntlid with its data, of which there are less than 64 KiB.
func AppendPersistentEvent(b []byte, t PersistentEventType, cntlid uint16, at Timestamp, data []byte) []byte {
	const (
		revision     = 1
		headerLength = PersistentEventHeaderSize - 3
	)
	le := binary.LittleEndian
	b = append(b, uint8(t), revision, headerLength, 0)
	b = le.AppendUint16(b, cntlid)
	b = append(b, at[:]...)
	b = append(b, 0, 0, 0, 0, 0, 0)           // port, reserved
	b = le.AppendUint16(b, 0)                 // vendor specific information
	b = le.AppendUint16(b, uint16(len(data))) // with it
	return append(b, data...)
}
