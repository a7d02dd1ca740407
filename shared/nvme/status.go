package nvme

import (
	"strconv"
	"strings"
)

// Status is the 15-bit status field of a completion without the phase: SC in
// bits 7:0, SCT in bits 10:8, CRD in bits 12:11, M in bit 13, DNR in bit 14. NVMe Base 2.0c 3.3.3.2.1.
type Status uint16

// Fields of Status.
const (
	StatusCodeMask Status = 0x7FF  // SCT and SC
	StatusCRDMask  Status = 0x1800 // command retry delay
	StatusMore     Status = 1 << 13
	StatusDNR      Status = 1 << 14
)

// Status code types.
const (
	SCTGeneric  = 0
	SCTCommand  = 1
	SCTMedia    = 2
	SCTPath     = 3
	SCTVendor   = 7
	sctShift    = 8
	sctMask     = 7
	crdShift    = 11
	crdMask     = 3
	vendorSCMin = 0xC0 // of every status code type
)

// SC returns the status code.
func (s Status) SC() uint8 { return uint8(s) }

// SCT returns the status code type, 0 to 7.
func (s Status) SCT() uint8 { return uint8(s>>sctShift) & sctMask }

// Code returns s without CRD, M and DNR, to compare with the constants.
func (s Status) Code() Status { return s & StatusCodeMask }

// CRD returns the command retry delay: 0 is none, 1 to 3 choose CRDT1 to CRDT3 of Identify Controller.
func (s Status) CRD() uint8 { return uint8(s>>crdShift) & crdMask }

// More says that the error log has more about it.
func (s Status) More() bool { return s&StatusMore != 0 }

// DNR says that the same command would fail again.
func (s Status) DNR() bool { return s&StatusDNR != 0 }

// WithDNR returns s with the do-not-retry bit.
func (s Status) WithDNR() Status { return s | StatusDNR }

// WithMore returns s with the more bit.
func (s Status) WithMore() Status { return s | StatusMore }

// OK says that the command succeeded.
func (s Status) OK() bool { return s.Code() == StatusSuccess }

// Name returns the specification's name of the code, or what range it is in.
func (s Status) Name() string {
	if n := statusNames[s.Code()]; n != "" {
		return n
	}
	if s.SCT() == SCTVendor || s.SC() >= vendorSCMin {
		return "Vendor Specific"
	}
	return "Unknown Status"
}

// String prints s as "Invalid Field in Command (0/02h, DNR)".
func (s Status) String() string { return string(s.AppendTo(nil)) }

// AppendTo appends what String returns.
func (s Status) AppendTo(b []byte) []byte {
	b = append(b, s.Name()...)
	b = append(b, ' ', '(', '0'+s.SCT(), '/')
	b = append(b, hex8(s.SC())...)
	if s.CRD() != 0 {
		b = append(b, ", CRD="...)
		b = append(b, '0'+s.CRD())
	}
	if s.More() {
		b = append(b, ", M"...)
	}
	if s.DNR() {
		b = append(b, ", DNR"...)
	}
	return append(b, ')')
}

// ParseStatus takes what Name prints, in any case and with dashes for spaces ("unrecovered-read-error"), or a status code type and a
// status code in hexadecimal, as String has them ("2/81h", "2/81"). Fields beside those two are not set. It returns false if there is no such
// status.
func ParseStatus(s string) (Status, bool) {
	name := strings.ReplaceAll(s, "-", " ")
	for code, n := range statusNames {
		if n != "" && strings.EqualFold(strings.ReplaceAll(n, "-", " "), name) {
			return Status(code), true
		}
	}
	sct, sc, _ := strings.Cut(s, "/")
	t, err := strconv.ParseUint(sct, 10, 3)
	c, err2 := strconv.ParseUint(strings.TrimSuffix(sc, "h"), 16, 8)
	if err != nil || err2 != nil {
		return 0, false
	}
	return Status(t<<sctShift | c), true
}
