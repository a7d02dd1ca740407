package nvme

import "encoding/binary"

// ReservationType is RTYPE of a reservation. NVMe Base 2.0c 7.2, the figure of reservation types.
type ReservationType uint8

// Values of ReservationType; 0 is no reservation.
const (
	WriteExclusive                ReservationType = 1
	ExclusiveAccess               ReservationType = 2
	WriteExclusiveRegistrants     ReservationType = 3 // registrants only
	ExclusiveAccessRegistrants    ReservationType = 4
	WriteExclusiveAllRegistrants  ReservationType = 5 // every registrant is a holder
	ExclusiveAccessAllRegistrants ReservationType = 6
)

var reservationNames = [...]string{
	"None", "Write Exclusive", "Exclusive Access", "Write Exclusive - Registrants Only", "Exclusive Access - Registrants Only",
	"Write Exclusive - All Registrants", "Exclusive Access - All Registrants",
}

func (t ReservationType) String() string {
	if int(t) < len(reservationNames) {
		return reservationNames[t]
	}
	return "Reservation Type " + hex8(uint8(t))
}

// Valid reports whether t is one of the six types.
func (t ReservationType) Valid() bool {
	return t >= WriteExclusive && t <= ExclusiveAccessAllRegistrants
}

// WriteExclusive reports whether anybody may read.
func (t ReservationType) WriteExclusive() bool {
	return t == WriteExclusive || t == WriteExclusiveRegistrants || t == WriteExclusiveAllRegistrants
}

// Registrants reports whether every registrant may do what the holder may.
func (t ReservationType) Registrants() bool { return t >= WriteExclusiveRegistrants && t.Valid() }

// All reports whether every registrant is a holder.
func (t ReservationType) All() bool { return t >= WriteExclusiveAllRegistrants && t.Valid() }

// Actions of Reservation Register (RREGA), Acquire (RACQA) and Release (RRELA). NVMe Base 2.0c 7.1, 7.2 and 7.3.
const (
	ReservationRegister     = 0
	ReservationUnregister   = 1
	ReservationReplace      = 2
	ReservationAcquire      = 0
	ReservationPreempt      = 1
	ReservationPreemptAbort = 2
	ReservationRelease      = 0
	ReservationClear        = 1
)

// Values of CPTPL: what becomes of Persist Through Power Loss.
const (
	CPTPLKeep  = 0
	CPTPLClear = 2
	CPTPLSet   = 3
)

// ReservationAction returns RREGA, RACQA or RRELA.
func (c *Command) ReservationAction() uint8 { return uint8(c.CDW10) & 7 }

// IgnoreExistingKey returns IEKEY.
func (c *Command) IgnoreExistingKey() bool { return c.CDW10&(1<<3) != 0 }

// PersistThroughPowerLoss returns CPTPL of Reservation Register.
func (c *Command) PersistThroughPowerLoss() uint8 { return uint8(c.CDW10 >> 30) }

// ReservationType returns RTYPE of Reservation Acquire and Release.
func (c *Command) ReservationType() ReservationType { return ReservationType(c.CDW10 >> 8) }

// ExtendedData returns EDS of Reservation Report: host identifiers are of 128 bits.
func (c *Command) ExtendedData() bool { return c.CDW11&1 != 0 }

// ReportBytes returns how much Reservation Report asks for: 4 to 2^34 bytes.
func (c *Command) ReportBytes() uint64 { return (uint64(c.CDW10) + 1) * 4 }

// ReservationKeys is the data of Reservation Register (CRKEY, NRKEY) and Acquire (CRKEY, PRKEY); Release has the first alone.
type ReservationKeys struct {
	Current uint64 // CRKEY
	Other   uint64 // NRKEY, PRKEY
}

// Bits of IdentifyNamespace.RESCAP.
const (
	RESCAPPersist = 1 << 0
	RESCAPTypes   = 0x7e   // all six
	RESCAPIEKEY   = 1 << 7 // IEKEY as of NVMe 1.3
)

// RegisteredController is an entry of what Reservation Report returns.
type RegisteredController struct {
	CNTLID uint16 // 0xFFFF: of a host that has no controller at the moment
	Holds  bool   // its host holds a reservation
	HostID [16]byte
	Key    uint64
}

// ReservationStatus is what Reservation Report returns, in a form for people. NVMe Base 2.0c 7.2.
type ReservationStatus struct {
	Generation  uint32
	Type        ReservationType
	Persist     bool // PTPLS
	Controllers []RegisteredController
}

// Encode returns the data structure, with host identifiers of 128 bits if extended, otherwise of 64.
func (s *ReservationStatus) Encode(extended bool) []byte {
	size := 24
	if extended {
		size = 64
	}
	b := make([]byte, size*(1+len(s.Controllers)))
	binary.LittleEndian.PutUint32(b, s.Generation)
	b[4] = uint8(s.Type)
	binary.LittleEndian.PutUint16(b[5:], uint16(len(s.Controllers)))
	b[9] = bool8(s.Persist)
	for i, c := range s.Controllers {
		e := b[size*(1+i):]
		binary.LittleEndian.PutUint16(e, c.CNTLID)
		e[2] = bool8(c.Holds)
		if extended {
			binary.LittleEndian.PutUint64(e[8:], c.Key)
			copy(e[16:], c.HostID[:])
		} else {
			copy(e[8:], c.HostID[:8])
			binary.LittleEndian.PutUint64(e[16:], c.Key)
		}
	}
	return b
}

// Decode is the reverse of Encode. Entries that b has no room for are left out.
func (s *ReservationStatus) Decode(b []byte, extended bool) {
	*s = ReservationStatus{}
	size := 24
	if extended {
		size = 64
	}
	if len(b) < size {
		return
	}
	s.Generation, s.Type, s.Persist = binary.LittleEndian.Uint32(b), ReservationType(b[4]), b[9]&1 != 0
	for i := range int(binary.LittleEndian.Uint16(b[5:])) {
		if len(b) < size*(2+i) {
			return
		}
		e := b[size*(1+i):]
		c := RegisteredController{CNTLID: binary.LittleEndian.Uint16(e), Holds: e[2]&1 != 0}
		if extended {
			c.Key = binary.LittleEndian.Uint64(e[8:])
			copy(c.HostID[:], e[16:32])
		} else {
			copy(c.HostID[:8], e[8:16])
			c.Key = binary.LittleEndian.Uint64(e[16:])
		}
		s.Controllers = append(s.Controllers, c)
	}
}

func bool8(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// Types of ReservationNotice, and the bits of feature 82h that mask them.
const (
	NoticeRegistrationPreempted = 1
	NoticeReservationReleased   = 2
	NoticeReservationPreempted  = 3
)

// ReservationNotice is log 80h, 64 bytes. NVMe Base 2.0c 5.16.1.23.
type ReservationNotice struct {
	Count     uint64 // of this page; 0: no page
	Type      uint8
	Available uint8 // pages after this one
	_         [2]byte
	NSID      uint32
	_         [48]byte
}

// EventReservation is AsyncEvent.Info of EventIO: log 80h has something.
const EventReservation = 0

// HostIDExtended is EXHID of feature 81h: the identifier is of 128 bits.
const HostIDExtended = 1 << 0
