package nvme

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
