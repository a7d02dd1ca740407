package suite

import (
	"bytes"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Log pages. NVMe Base 2.0c 5.16.

var logCases = []Case{
	{
		ID: "log.mandatory", Ref: "NVMe Base 2.0c 3.1.2.1.2",
		Text: "the Error Information, SMART and Firmware Slot logs can be read",
		run: func(c *ctl) {
			c.log(nvme.LogError, 0, 64)
			c.log(nvme.LogSMART, 0, 512)
			c.log(nvme.LogFirmwareSlot, 0, 512)
		},
	},
	{
		ID: "log.reserved", Ref: "NVMe Base 2.0c 5.16",
		Text: "a log page that is not supported is Invalid Field in Command or Invalid Log Page",
		run: func(c *ctl) {
			for _, lid := range []nvme.LogPage{0x1F, 0x6F, 0xBF} {
				cmd, _ := c.logCmd(lid, 0, 0, 64, true)
				c.refused(cmd, nvme.StatusInvalidField, nvme.StatusInvalidLogPage)
			}
		},
	},
	{
		ID: "log.length", Ref: "NVMe Base 2.0c 5.16",
		Text: "Get Log Page writes the dwords that NUMD says and none after them",
		run: func(c *ctl) {
			for _, n := range []uint64{4, 8, 500, 512} {
				cmd, d := c.logCmd(nvme.LogFirmwareSlot, 0, 0, n, true)
				c.ok(cmd)
				c.check(d.guarded(), "bytes behind the %d asked for were written", n)
			}
		},
	},
	{
		ID: "log.offset", Ref: "NVMe Base 2.0c 5.16", needs: lpa(nvme.LPAExtended, "Extended Data"),
		Text: "a part of a log page is the same as that part of the whole",
		run: func(c *ctl) {
			whole := c.log(nvme.LogFirmwareSlot, 0, 512)
			for _, off := range []uint64{0, 4, 8, 64, 508} {
				got := c.log(nvme.LogFirmwareSlot, off, 512-off)
				c.check(bytes.Equal(got, whole[off:]), "from byte %d: % x, want % x", off, got[:4], whole[off:off+4])
			}
		},
	},
	{
		ID: "log.offset.beyond", Ref: "NVMe Base 2.0c 5.16", needs: lpa(nvme.LPAExtended, "Extended Data"),
		Text: "an offset behind the end of the log page is Invalid Field in Command",
		run: func(c *ctl) {
			for _, off := range []uint64{516, 1 << 20, 1<<40 + 512, ^uint64(3)} {
				cmd, _ := c.logCmd(nvme.LogFirmwareSlot, 0, off, 4, true)
				c.refused(cmd, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "log.offset.index", Ref: "NVMe Base 2.0c 5.16", needs: join(lpa(nvme.LPAExtended, "Extended Data"), lpa(nvme.LPASupportedPages, "Supported Log Pages")),
		Text: "an index as the offset (OT=1) of a log page that has none (IOS=0) is Invalid Field in Command",
		run: func(c *ctl) {
			l := new(nvme.SupportedLogPages)
			copy(l.Bytes()[:], c.log(nvme.LogSupported, 0, 1024))
			for _, lid := range []nvme.LogPage{nvme.LogError, nvme.LogSMART, nvme.LogFirmwareSlot} {
				if l.Page[lid]&nvme.LogSupportsOffset != 0 {
					continue
				}
				cmd, _ := c.logCmd(lid, nvme.NSIDAll, 0, 64, true)
				cmd.CDW14 |= 1 << 23
				c.refused(cmd, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "log.mdts", Ref: "NVMe Base 2.0c 5.16, 5.17.2.1", needs: join(needMDTS, lpa(nvme.LPAExtended, "Extended Data")),
		Text: "a log page longer than MDTS is Invalid Field in Command",
		run: func(c *ctl) {
			cmd, d := c.logCmd(nvme.LogError, 0, 0, 64, true)
			c.must(cmd.SetGetLogPage(nvme.LogError, 0, 0, c.mdts()+4, true))
			c.refused(d.on(cmd), nvme.StatusInvalidField)
		},
	},
	{
		ID: "log.error.size", Ref: "NVMe Base 2.0c 5.16.1.2",
		Text: "the error log has ELPE+1 entries, the newest first",
		run: func(c *ctl) {
			for range 3 {
				c.identifyRefused(0xBF, 0, nvme.StatusInvalidField)
			}
			p := c.log(nvme.LogError, 0, min(64*uint64(c.facts.id.ELPE.Count()), 64*64))
			last := ^uint64(0)
			for i := 0; i < len(p); i += 64 {
				count := le.Uint64(p[i:])
				if count == 0 {
					c.check(bytes.Count(p[i:], []byte{0}) == len(p)-i, "entry %d is invalid (count 0), and what follows is not zero", i/64)
					break
				}
				c.check(count < last, "entry %d has count %d, the one before %d", i/64, count, last)
				last = count
			}
		},
	},
	{
		ID: "log.error.entry", Ref: "NVMe Base 2.0c 5.16.1.2, 3.3.3.2.1",
		Text: "a completion with the More bit has an entry in the error log: its SQ, CID and status",
		run: func(c *ctl) {
			before := c.newestError().Count
			cmd, _ := c.identifyCmd(0xBF, 0)
			cid := c.adm.submit(cmd)
			cpl := c.adm.wait(cid)
			if !cpl.Status().More() {
				c.skipf("its completions do not say More")
			}
			e := c.newestError()
			c.check(e.Count > before, "the newest entry has count %d, before the error %d", e.Count, before)
			c.check(e.SQID == 0 && e.CID == cid && e.Status().Code() == cpl.Status().Code(), "entry: SQ %d CID %#x status %s, the command: SQ 0 CID %#x status %s",
				e.SQID, e.CID, status(e.Status().Code()), cid, status(cpl.Status().Code()))
		},
	},
	{
		ID: "log.error.io", Ref: "NVMe Base 2.0c 5.16.1.2, 3.3.3.2.1", needs: needNS,
		Text: "a failed I/O command with the More bit has an entry in the error log: its SQ, CID, namespace and LBA",
		run: func(c *ctl) {
			cmd := c.read(c.facts.blocks, 1, c.data(c.facts.lba))
			cid := c.q().submit(cmd)
			cpl := c.q().wait(cid)
			c.q().want(&cmd, cpl, nvme.StatusLBAOutOfRange)
			if !cpl.Status().More() {
				c.skipf("its completions do not say More")
			}
			e := c.newestError()
			c.check(e.SQID == 1 && e.CID == cid && e.Status().Code() == cpl.Status().Code() && e.NSID == c.facts.nsid,
				"entry: SQ %d CID %#x status %s namespace %d, the command: SQ 1 CID %#x status %s namespace %d",
				e.SQID, e.CID, status(e.Status().Code()), e.NSID, cid, status(cpl.Status().Code()), c.facts.nsid)
		},
	},
	{
		ID: "log.smart.sane", Ref: "NVMe Base 2.0c 5.16.1.3",
		Text: "the SMART log has a temperature, spare of at most 100 % and no reserved warning bit",
		run: func(c *ctl) {
			s := c.smart()
			c.check(s.Temperature() > 0 && s.Temperature() < 500, "%d K", s.Temperature())
			c.check(s.AvailableSpare <= 100 && s.SpareThreshold <= 100, "spare %d %%, threshold %d %%", s.AvailableSpare, s.SpareThreshold)
			c.check(s.CriticalWarning&^0x3F == 0, "critical warning %#x", s.CriticalWarning)
		},
	},
	{
		ID: "log.smart.reads", Ref: "NVMe Base 2.0c 5.16.1.3", needs: needNS,
		Text: "reads move Host Read Commands by as many, and Data Units Read by thousands of 512 bytes",
		run: func(c *ctl) {
			before := c.smart()
			n := 2 << 20 / (8 * c.facts.lba)
			d := c.data(8 * c.facts.lba)
			for range n {
				c.q().ok(c.read(0, 8, d))
			}
			after := c.smart()
			units := after.DataUnitsRead.Lo - before.DataUnitsRead.Lo
			c.check(after.HostReads.Lo-before.HostReads.Lo == n, "%d commands, the count moved by %d", n, after.HostReads.Lo-before.HostReads.Lo)
			c.check(units == 4 || units == 5, "2 MiB are 4.1 units, the count moved by %d", units)
		},
	},
	{
		ID: "log.smart.writes", Ref: "NVMe Base 2.0c 5.16.1.3", needs: needNS, does: writes,
		Text: "writes move Host Write Commands by as many, and Data Units Written by thousands of 512 bytes",
		run: func(c *ctl) {
			before := c.smart()
			n := 2 << 20 / (8 * c.facts.lba)
			d := c.data(8 * c.facts.lba)
			for range n {
				c.q().ok(c.write(0, 8, d))
			}
			after := c.smart()
			units := after.DataUnitsWritten.Lo - before.DataUnitsWritten.Lo
			c.check(after.HostWrites.Lo-before.HostWrites.Lo == n, "%d commands, the count moved by %d", n, after.HostWrites.Lo-before.HostWrites.Lo)
			c.check(units == 4 || units == 5, "2 MiB are 4.1 units, the count moved by %d", units)
		},
	},
	{
		ID: "log.smart.errors", Ref: "NVMe Base 2.0c 5.16.1.3",
		Text: "Number of Error Information Log Entries moves with the error log",
		run: func(c *ctl) {
			before, count := c.smart(), c.newestError().Count
			c.identifyRefused(0xBF, 0, nvme.StatusInvalidField)
			after := c.smart()
			added := c.newestError().Count - count
			c.check(after.ErrorLogEntries.Lo-before.ErrorLogEntries.Lo == added, "the error log got %d entries, SMART says %d", added, after.ErrorLogEntries.Lo-before.ErrorLogEntries.Lo)
		},
	},
	{
		ID: "log.smart.namespace", Ref: "NVMe Base 2.0c 5.16, 5.16.1.3", needs: needNS,
		Text: "SMART of one namespace can be read if LPA bit 0 says so, and is Invalid Field in Command if not",
		run: func(c *ctl) {
			cmd, _ := c.logCmd(nvme.LogSMART, c.facts.nsid, 0, 512, true)
			if c.facts.id.LPA&nvme.LPASmartPerNamespace != 0 {
				c.ok(cmd)
				return
			}
			c.refused(cmd, nvme.StatusInvalidField)
		},
	},
	{
		ID: "log.firmware", Ref: "NVMe Base 2.0c 5.16.1.4",
		Text: "the active firmware slot holds the revision that Identify says",
		run: func(c *ctl) {
			l := new(nvme.FirmwareSlotLog)
			copy(l.Bytes()[:], c.log(nvme.LogFirmwareSlot, 0, 512))
			slot := l.AFI & 7
			c.check(slot >= 1 && slot <= c.facts.id.FRMW>>nvme.FRMWSlotsShift&7, "AFI=%#x, FRMW=%#x", l.AFI, c.facts.id.FRMW)
			c.check(l.Slot[slot-1] == c.facts.id.FR, "slot %d has %q, FR is %q", slot, l.Slot[slot-1], c.facts.id.FR)
		},
	},
	{
		ID: "log.changed-namespaces", Ref: "NVMe Base 2.0c 5.16.1.5",
		Text:  "the Changed Namespace List is empty after it was read",
		needs: bitNeed("OAES.Namespace Attribute Notices is 0", func(f *facts) bool { return nvme.EventConfig(f.id.OAES)&nvme.EventConfigNamespace != 0 }),
		run: func(c *ctl) {
			cmd, _ := c.logCmd(nvme.LogChangedNamespaces, 0, 0, pageSize, false)
			c.ok(cmd)
			p := c.log(nvme.LogChangedNamespaces, 0, pageSize)
			c.check(bytes.Count(p, []byte{0}) == len(p), "it begins with %d", le.Uint32(p))
		},
	},
	{
		ID: "log.effects", Ref: "NVMe Base 2.0c 5.16.1.6", needs: lpa(nvme.LPACommandEffects, "Commands Supported and Effects"),
		Text: "the effects log says that mandatory commands are supported, and optional ones as OACS and ONCS do",
		run: func(c *ctl) {
			l := new(nvme.CommandEffects)
			copy(l.Bytes()[:], c.log(nvme.LogCommandEffects, 0, pageSize))
			for _, op := range []uint8{
				nvme.AdminDeleteSQ, nvme.AdminCreateSQ, nvme.AdminGetLogPage, nvme.AdminDeleteCQ, nvme.AdminCreateCQ, nvme.AdminIdentify,
				nvme.AdminAbort, nvme.AdminSetFeatures, nvme.AdminGetFeatures, nvme.AdminAsyncEventRequest,
			} {
				c.check(l.Admin[op]&nvme.EffectSupported != 0, "%s is not supported", nvme.AdminOpcodeName(op))
			}
			for _, op := range []uint8{nvme.IOFlush, nvme.IORead, nvme.IOWrite} {
				c.check(l.IO[op]&nvme.EffectSupported != 0, "%s is not supported", nvme.IOOpcodeName(op))
			}
			for _, o := range optionalIO {
				offered, said := c.facts.id.ONCS&o.bit != 0, l.IO[o.op]&nvme.EffectSupported != 0
				c.check(offered == said, "%s: ONCS says %v, the log %v", nvme.IOOpcodeName(o.op), offered, said)
			}
			for bit, op := range map[uint16]uint8{
				nvme.OACSFormat: nvme.AdminFormatNVM, nvme.OACSNamespaces: nvme.AdminNamespaceManagement, nvme.OACSDoorbellBuf: nvme.AdminDoorbellBufferConfig,
			} {
				offered, said := c.facts.id.OACS&bit != 0, l.Admin[op]&nvme.EffectSupported != 0
				c.check(offered == said, "%s: OACS says %v, the log %v", nvme.AdminOpcodeName(op), offered, said)
			}
			c.check(l.IO[nvme.IOWrite]&nvme.EffectBlockContent != 0, "Write does not change logical block content (LBCC=0)")
		},
	},
	{
		ID: "log.supported", Ref: "NVMe Base 2.0c 5.16.1.1", needs: lpa(nvme.LPASupportedPages, "Supported Log Pages"),
		Text: "Supported Log Pages lists the mandatory ones, and what it does not list cannot be read",
		run: func(c *ctl) {
			l := new(nvme.SupportedLogPages)
			copy(l.Bytes()[:], c.log(nvme.LogSupported, 0, 1024))
			for _, lid := range []nvme.LogPage{nvme.LogSupported, nvme.LogError, nvme.LogSMART, nvme.LogFirmwareSlot} {
				c.check(l.Page[lid]&nvme.LogSupports != 0, "%v is not listed", lid)
			}
			for lid := range nvme.LogPage(0xC0) {
				if l.Page[lid]&nvme.LogSupports == 0 {
					cmd, _ := c.logCmd(lid, 0, 0, 4, true)
					c.refused(cmd, nvme.StatusInvalidField, nvme.StatusInvalidLogPage)
				}
			}
		},
	},
	{
		ID: "log.features", Ref: "NVMe Base 2.0c 5.16.1.18", needs: version(2, 0),
		Text: "Feature Identifiers Supported and Effects lists the mandatory features",
		run: func(c *ctl) {
			p := c.log(nvme.LogFeatureEffects, 0, 1024)
			for _, fid := range mandatoryFeatures {
				c.check(le.Uint32(p[4*int(fid):])&1 != 0, "%v is not listed", fid)
			}
		},
	},
	{
		ID: "log.telemetry", Ref: "NVMe Base 2.0c 5.16.1.8", needs: lpa(nvme.LPATelemetry, "Telemetry"),
		Text: "the telemetry logs begin with their own identifier, and their areas do not shrink from 1 to 3",
		run: func(c *ctl) {
			for _, lid := range []nvme.LogPage{nvme.LogTelemetryHost, nvme.LogTelemetryCtrl} {
				p := c.log(lid, 0, 512)
				a, b, d := le.Uint16(p[8:]), le.Uint16(p[10:]), le.Uint16(p[12:])
				c.check(p[0] == byte(lid), "%v begins with %#x", lid, p[0])
				c.check(a <= b && b <= d, "%v: last blocks %d, %d, %d", lid, a, b, d)
			}
		},
	},
}

// optionalIO are the I/O commands that ONCS offers.
var optionalIO = []struct {
	bit uint16
	op  uint8
}{
	{nvme.ONCSCompare, nvme.IOCompare}, {nvme.ONCSWriteUncorrectable, nvme.IOWriteUncorrectable}, {nvme.ONCSDSM, nvme.IODSM},
	{nvme.ONCSWriteZeroes, nvme.IOWriteZeroes}, {nvme.ONCSVerify, nvme.IOVerify}, {nvme.ONCSCopy, nvme.IOCopy},
	{nvme.ONCSReservations, nvme.IOReservationReport},
}

// logCmd returns a Get Log Page of n bytes from off, and where they go.
func (c *ctl) logCmd(lid nvme.LogPage, nsid uint32, off, n uint64, retain bool) (nvme.Command, *data) {
	d := c.data(n)
	var cmd nvme.Command
	c.must(cmd.SetGetLogPage(lid, nsid, off, n, retain))
	return d.on(cmd), d
}

// log returns n bytes of a log page of the controller, from off. It does not clear events, and must succeed.
func (c *ctl) log(lid nvme.LogPage, off, n uint64) []byte {
	cmd, d := c.logCmd(lid, nvme.NSIDAll, off, n, true)
	c.ok(cmd)
	return d.get()
}

// clearLog reads a log page so that its event may come again.
func (c *ctl) clearLog(lid nvme.LogPage) {
	cmd, _ := c.logCmd(lid, nvme.NSIDAll, 0, 512, false)
	c.ok(cmd)
}

func (c *ctl) smart() *nvme.SMARTLog {
	s := new(nvme.SMARTLog)
	copy(s.Bytes()[:], c.log(nvme.LogSMART, 0, 512))
	return s
}

func (c *ctl) newestError() *nvme.ErrorLogEntry {
	e := new(nvme.ErrorLogEntry)
	copy(e.Bytes()[:], c.log(nvme.LogError, 0, 64))
	return e
}

// mdts returns the most bytes that a command may move.
func (c *ctl) mdts() uint64 { return c.facts.id.MaxTransfer(c.facts.cap.MPSMIN()) }
