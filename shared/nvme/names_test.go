package nvme

import (
	"fmt"
	"strings"
	"testing"
)

func TestStatusString(t *testing.T) {
	tests := []struct {
		s    Status
		want string
	}{
		{StatusSuccess, "Success (0/00h)"},
		{StatusInvalidField, "Invalid Field in Command (0/02h)"},
		{StatusInvalidField.WithDNR(), "Invalid Field in Command (0/02h, DNR)"},
		{StatusPRPOffsetInvalid, "PRP Offset Invalid (0/13h)"},
		{StatusInterrupted | 2<<11, "Command Interrupted (0/21h, CRD=2)"},
		{StatusDoorbellMemoryInvalid.WithDNR().WithMore(), "Doorbell Memory Invalid (1/C0h, M, DNR)"},
		{StatusCompareFailure, "Compare Failure (2/85h)"},
		{StatusHostPathError, "Host Pathing Error (3/70h)"},
		{0x7FF, "Vendor Specific (7/FFh)"},
		{0x2C5, "Vendor Specific (2/C5h)"},
		{0x017, "Unknown Status (0/17h)"},
		{0x400, "Unknown Status (4/00h)"},
		{0x7FFF, "Vendor Specific (7/FFh, CRD=3, M, DNR)"},
		{0xFFFF, "Vendor Specific (7/FFh, CRD=3, M, DNR)"},
	}
	for _, tt := range tests {
		if got := tt.s.String(); got != tt.want {
			t.Errorf("%#x: %q, want %q", uint16(tt.s), got, tt.want)
		}
	}
}

// The values come from the specification's figures, by hand and not from the table under test.
func TestStatusValues(t *testing.T) {
	for s, want := range map[Status][2]uint8{
		StatusSuccess: {0, 0x00}, StatusInvalidOpcode: {0, 0x01}, StatusInvalidField: {0, 0x02}, StatusCIDConflict: {0, 0x03},
		StatusDataTransferError: {0, 0x04}, StatusInternalError: {0, 0x06}, StatusAbortRequested: {0, 0x07}, StatusAbortSQDeleted: {0, 0x08},
		StatusInvalidNamespace: {0, 0x0B}, StatusSequenceError: {0, 0x0C}, StatusSGLTypeInvalid: {0, 0x11}, StatusPRPOffsetInvalid: {0, 0x13},
		StatusNamespaceWriteProtected: {0, 0x20}, StatusInterrupted: {0, 0x21}, StatusMediaNotReady: {0, 0x24},
		StatusLBAOutOfRange: {0, 0x80}, StatusCapacityExceeded: {0, 0x81}, StatusNamespaceNotReady: {0, 0x82}, StatusFormatInProgress: {0, 0x84},
		StatusInvalidCQ: {1, 0x00}, StatusInvalidQueueID: {1, 0x01}, StatusInvalidQueueSize: {1, 0x02}, StatusAbortLimit: {1, 0x03},
		StatusAERLimit: {1, 0x05}, StatusInvalidFirmwareSlot: {1, 0x06}, StatusInvalidVector: {1, 0x08}, StatusInvalidLogPage: {1, 0x09},
		StatusInvalidFormat: {1, 0x0A}, StatusInvalidQueueDeletion: {1, 0x0C}, StatusFeatureNotSaveable: {1, 0x0D},
		StatusFeatureNotChangeable: {1, 0x0E}, StatusFeatureNotPerNamespace: {1, 0x0F}, StatusNamespaceNotAttached: {1, 0x1A},
		StatusSelfTestInProgress: {1, 0x1D}, StatusCommandSetNotSupported: {1, 0x29}, StatusInvalidCommandSet: {1, 0x2C},
		StatusConflictingAttributes: {1, 0x80}, StatusInvalidProtectionInfo: {1, 0x81}, StatusReadOnly: {1, 0x82}, StatusCommandSizeLimit: {1, 0x83},
		StatusDoorbellMemoryInvalid: {1, 0xC0},
		StatusWriteFault:            {2, 0x80}, StatusUnrecoveredRead: {2, 0x81}, StatusCompareFailure: {2, 0x85}, StatusAccessDenied: {2, 0x86},
		StatusDeallocated: {2, 0x87}, StatusInternalPathError: {3, 0x00}, StatusHostPathError: {3, 0x70}, StatusAbortedByHost: {3, 0x71},
	} {
		if s.SCT() != want[0] || s.SC() != want[1] {
			t.Errorf("%v is %d/%02Xh, want %d/%02Xh", s, s.SCT(), s.SC(), want[0], want[1])
		}
	}
}

func TestStatusBits(t *testing.T) {
	s := StatusLBAOutOfRange
	if s.DNR() || s.More() || s.CRD() != 0 || s.OK() {
		t.Errorf("bare %v has extras", s)
	}
	s = s.WithDNR().WithMore() | 3<<11
	if !s.DNR() || !s.More() || s.CRD() != 3 || s.Code() != StatusLBAOutOfRange {
		t.Errorf("%v", s)
	}
	if !(StatusSuccess | StatusDNR).OK() {
		t.Error("a success with DNR is no success")
	}
}

func TestNamesAreUnique(t *testing.T) {
	unique := func(kind string, names []string) {
		seen := map[string]int{}
		for i, n := range names {
			if n == "" {
				continue
			}
			if j, dup := seen[n]; dup {
				t.Errorf("%s %#x and %#x are both %q", kind, j, i, n)
			}
			seen[n] = i
		}
	}
	unique("status", statusNames[:])
	unique("admin opcode", adminOpcodeNames[:])
	unique("I/O opcode", ioOpcodeNames[:])
}

func TestOpcodeNames(t *testing.T) {
	for got, want := range map[string]string{
		AdminOpcodeName(AdminDoorbellBufferConfig): "Doorbell Buffer Config",
		AdminOpcodeName(0x7C):                      "Doorbell Buffer Config",
		AdminOpcodeName(0xC0):                      "Set Doorbell Memory (2014)",
		AdminOpcodeName(0xFE):                      "Admin Opcode FEh",
		IOOpcodeName(IODSM):                        "Dataset Management",
		IOOpcodeName(0x00):                         "Flush",
		IOOpcodeName(0x99):                         "I/O Opcode 99h",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestNamedOpcodes(t *testing.T) {
	last, n := -1, 0
	for op, name := range IOOpcodes() {
		if int(op) <= last || name != IOOpcodeName(op) || strings.Contains(name, "Opcode") {
			t.Errorf("%#x: %q after %#x", op, name, last)
		}
		last, n = int(op), n+1
	}
	if n != 16 || last != IOZoneAppend {
		t.Errorf("%d I/O opcodes have names, the last is %#x", n, last)
	}
	for op, name := range AdminOpcodes() {
		if op != AdminDeleteSQ || name != "Delete I/O Submission Queue" {
			t.Errorf("the first is %#x, %q", op, name)
		}
		break
	}
}

// Every value has some name, and none that the reader must guess at.
func TestEveryValuePrints(t *testing.T) {
	for i := range 256 {
		v := uint8(i)
		for _, s := range []string{
			AdminOpcodeName(v), IOOpcodeName(v), CNS(v).String(), CSI(v).String(), FeatureID(v).String(), LogPage(v).String(), EventType(v).String(),
		} {
			if s == "" || strings.ContainsAny(s, "%\x00") {
				t.Errorf("%#x prints as %q", v, s)
			}
		}
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		CNSNamespaceDescriptors.String(): "Namespace Identification Descriptors",
		CNS(0x77).String():               "CNS 77h",
		CSIZoned.String():                "Zoned Namespace",
		CSIKV.String():                   "Key Value",
		CSINVM.String():                  "NVM",
		CSI(9).String():                  "CSI 09h",
		FeatureQuiet.String():            "Quiet Polling (shadowbell)",
		FeatureID(0xC5).String():         "Feature C5h",
		LogCommandEffects.String():       "Commands Supported and Effects",
		LogPage(0xC1).String():           "Log C1h",
		EventIO.String():                 "I/O Command Specific",
		EventVendor.String():             "Vendor Specific",
		EventType(5).String():            "Event Type 05h",
		MakeAsyncEvent(EventError, EventErrorDoorbellValue, LogError).String(): "Error: Invalid Doorbell Write Value, log 01h",
		MakeAsyncEvent(EventSMART, 9, LogSMART).String():                       "SMART / Health: Info 09h, log 02h",
		MakeAsyncEvent(EventVendor, 1, 0xC0).String():                          "Vendor Specific: Info 01h, log C0h",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	e := MakeAsyncEvent(EventNotice, EventNoticeNamespace, LogChangedNamespaces)
	if e != 0x040002 || e.Type() != EventNotice || e.Info() != 0 || e.Log() != LogChangedNamespaces {
		t.Errorf("%#x: %v", uint32(e), e)
	}
}

func TestParseStatus(t *testing.T) {
	for s := range StatusCodeMask + 1 {
		if statusNames[s] == "" {
			continue
		}
		for _, in := range []string{
			s.Name(), strings.ToLower(strings.ReplaceAll(s.Name(), " ", "-")), fmt.Sprintf("%d/%02Xh", s.SCT(), s.SC()), fmt.Sprintf("%d/%x", s.SCT(), s.SC()),
		} {
			if got, ok := ParseStatus(in); !ok || got != s && statusNames[got] != statusNames[s] {
				t.Errorf("%q is %v, %v, want %v", in, got, ok, s)
			}
		}
	}
	for _, in := range []string{"", "bad luck", "8/00", "2/100", "2", "/", "x/1", "2/81hh", "-1/1"} {
		if got, ok := ParseStatus(in); ok {
			t.Errorf("%q is %v", in, got)
		}
	}
}
