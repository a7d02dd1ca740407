package guestdrv_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// sentinels are the errors that callers tell apart: each is itself and none of the others.
var sentinels = map[string]error{
	"ErrTimeout": guestdrv.ErrTimeout, "ErrProtocol": guestdrv.ErrProtocol, "ErrGone": guestdrv.ErrGone, "ErrFatal": guestdrv.ErrFatal,
	"ErrReset": guestdrv.ErrReset, "ErrClosed": guestdrv.ErrClosed, "ErrNoMemory": guestdrv.ErrNoMemory, "ErrUnaligned": guestdrv.ErrUnaligned,
	"ErrRange": guestdrv.ErrRange, "ErrUnsupported": guestdrv.ErrUnsupported, "ErrNoNamespace": guestdrv.ErrNoNamespace,
}

// mustBeOnly checks that err wraps the sentinel want and no other; "" is none.
func mustBeOnly(t *testing.T, err error, want string) {
	t.Helper()
	for name, sentinel := range sentinels {
		if is := errors.Is(err, sentinel); is != (name == want) {
			t.Errorf("errors.Is(%q, %s) is %v", err, name, is)
		}
	}
}

func TestErrorsAreToldApart(t *testing.T) {
	for name, err := range sentinels {
		mustBeOnly(t, fmt.Errorf("call: %w", err), name)
	}
}

// failing is a device that ends the commands of one opcode with a status.
func failing(admin bool, opcode uint8, status nvme.Status) nvmetest.Config {
	var cfg nvmetest.Config
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if (qid == 0) == admin && cmd.Opcode == opcode {
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: status}
		}
		return nvmetest.Verdict{}
	}
	return cfg
}

func TestStatusErrorSaysWhatTheControllerSaid(t *testing.T) {
	read := func(c opened) error {
		_, err := namespace(t, c, 1).ReadAt(make([]byte, 512), 512)
		return err
	}
	write := func(c opened) error {
		_, err := namespace(t, c, 1).WriteAt(make([]byte, 512), 0)
		return err
	}
	flush := func(c opened) error { return namespace(t, c, 1).Flush(ctx) }
	discard := func(c opened) error { return namespace(t, c, 1).Discard(ctx, 0, 4096) }
	log := func(c opened) error {
		_, err := c.Admin(ctx, &nvme.Command{Opcode: nvme.AdminGetLogPage}, make([]byte, 512))
		return err
	}
	pair := func(c opened) error {
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 8})
		if err == nil {
			p.Close()
		}
		return err
	}
	for _, tc := range []struct {
		name   string
		admin  bool
		opcode uint8
		status nvme.Status
		do     func(opened) error
		late   bool // the device only fails the command once it is open
		sct    uint8
		sc     uint8
		dnr    bool
		text   string
	}{
		{"read", false, nvme.IORead, nvme.StatusUnrecoveredRead, read, false, nvme.SCTMedia, 0x81, false, "slba=0x1"},
		{"write", false, nvme.IOWrite, nvme.StatusWriteFault.WithDNR(), write, false, nvme.SCTMedia, 0x80, true, "DNR"},
		{"flush", false, nvme.IOFlush, nvme.StatusInternalError, flush, false, nvme.SCTGeneric, 0x06, false, "Internal"},
		{"discard", false, nvme.IODSM, nvme.StatusInvalidField.WithDNR().WithMore(), discard, false, nvme.SCTGeneric, 0x02, true, "Invalid Field"},
		{"admin", true, nvme.AdminGetLogPage, nvme.StatusInvalidField.WithDNR(), log, false, nvme.SCTGeneric, 0x02, true, "Invalid Field"},
		{"the driver's own admin command", true, nvme.AdminCreateSQ, nvme.StatusInvalidQueueSize.WithDNR(), pair, true, nvme.SCTCommand, 0x02, true, "Invalid Queue Size"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := failing(tc.admin, tc.opcode, tc.status)
			if tc.late {
				refuse, made := cfg.Command, 0
				cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
					if qid == 0 && cmd.Opcode == tc.opcode {
						if made++; made <= testOptions().Queues {
							return nvmetest.Verdict{}
						}
					}
					return refuse(qid, cmd)
				}
			}
			c := openInProc(t, cfg, testOptions())
			err := tc.do(c)
			var se *guestdrv.StatusError
			if !errors.As(err, &se) {
				t.Fatalf("%v is no *StatusError", err)
			}
			if se.Status != tc.status || se.SCT() != tc.sct || se.SC() != tc.sc || se.DNR() != tc.dnr || se.Retriable() == tc.dnr {
				t.Errorf("status %v, SCT %d, SC %#x, DNR %v, retriable %v", se.Status, se.SCT(), se.SC(), se.DNR(), se.Retriable())
			}
			if se.Admin != tc.admin || se.Command.Opcode != tc.opcode {
				t.Errorf("command %s, admin %v", se.Command.Describe(se.Admin), se.Admin)
			}
			if !strings.Contains(err.Error(), tc.text) {
				t.Errorf("%q does not say %q", err, tc.text)
			}
			// The status as shared/nvme knows it.
			var wire *nvme.StatusError
			if !errors.As(err, &wire) || wire.Status != tc.status || nvme.StatusOf(err) != tc.status {
				t.Errorf("nvme.StatusOf says %v", nvme.StatusOf(err))
			}
			mustBeOnly(t, err, "")
			if err := c.Err(); err != nil {
				t.Errorf("the controller has failed: %v", err)
			}
		})
	}
}

// Open's own commands are told apart too.
func TestOpenRefusedIsAStatusError(t *testing.T) {
	err := openFails(t, failing(true, nvme.AdminIdentify, nvme.StatusInvalidField.WithDNR()), testOptions())
	var se *guestdrv.StatusError
	if !errors.As(err, &se) || !se.Admin || se.Command.Opcode != nvme.AdminIdentify || !se.DNR() {
		t.Fatalf("%v", err)
	}
}

func TestErrorsOfCalls(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	ns := namespace(t, c, 1)
	_, unaligned := ns.ReadAt(make([]byte, 100), 0)
	_, beyond := ns.WriteAt(make([]byte, 512), ns.Size())
	_, nobody := c.Namespace(7)
	_, huge := c.Alloc(1 << 30)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	ended := ns.Flush(cancelled)
	late, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
	defer cancel()
	overdue := ns.Flush(late)
	for _, tc := range []struct {
		err  error
		want string
		is   error
	}{
		{unaligned, "ErrUnaligned", guestdrv.ErrUnaligned},
		{beyond, "ErrRange", guestdrv.ErrRange},
		{nobody, "ErrNoNamespace", guestdrv.ErrNoNamespace},
		{huge, "ErrNoMemory", guestdrv.ErrNoMemory},
		{ended, "", context.Canceled},
		{overdue, "", context.DeadlineExceeded},
	} {
		mustBeOnly(t, tc.err, tc.want)
		if !errors.Is(tc.err, tc.is) {
			t.Errorf("%v is not %v", tc.err, tc.is)
		}
	}
	if err := c.Err(); err != nil {
		t.Errorf("the controller has failed: %v", err)
	}
	c.Close()
	_, err := ns.ReadAt(make([]byte, 512), 0)
	mustBeOnly(t, err, "ErrClosed")
	mustBeOnly(t, c.Err(), "ErrClosed")
}
