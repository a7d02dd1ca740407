package nvmecli

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// logs: smart-log, error-log, effects-log, fid-support-effects-log, fw-log, supported-log-pages, changed-ns-list-log, get-log.
func logs(t *testing.T, b *bench) {
	smartLog(t, b)
	errorLog(t, b)
	effectsLog(t, b)
	supportedLogs(t, b)
	events := b.events(t)
	if len(events["Power-on or Reset Event"]) == 0 || len(events["Timestamp Change Event"]) == 0 {
		t.Errorf("persistent-event-log: %v, and the controller was enabled and told the time", events)
	}

	fw := b.object(t, "nvme fw-log "+b.ctrl())[b.disks[0].Name].(map[string]any)
	if rev := fmt.Sprint(fw["Firmware Rev Slot 1"]); number(t, fw["Active Firmware Slot (afi)"]) != 1 || !strings.Contains(rev, "("+b.seen[0].ctrl.Firmware()) || len(fw) != 2 {
		t.Errorf("fw-log: %v, want revision %s in slot 1 and nothing else", fw, b.seen[0].ctrl.Firmware())
	}
	if changed := b.object(t, "nvme changed-ns-list-log "+b.ctrl())[b.disks[0].Name].(map[string]any); len(changed) != 0 {
		t.Errorf("changed-ns-list-log: %v, and nothing has changed", changed)
	}
}

// smart is the health log's counters.
func (b *bench) smart(t *testing.T) map[string]uint64 {
	t.Helper()
	m := map[string]uint64{}
	for k, v := range b.object(t, "nvme smart-log "+b.ctrl()) {
		m[k] = number(t, v)
	}
	return m
}

// smartLog: the counters move by exactly what fio does.
func smartLog(t *testing.T, b *bench) {
	socket := b.sub.Controllers[0].Socket
	before := b.smart(t)
	for k, want := range map[string]uint64{
		"critical_warning": 0, "temperature": 313, "avail_spare": 100, "spare_thresh": 10, "percent_used": 0, "data_units_written": 0,
		"host_write_commands": 0, "media_errors": 0, "unsafe_shutdowns": 0, "power_on_hours": 0, "warning_temp_time": 0, "critical_comp_time": 0,
	} {
		if before[k] != want {
			t.Errorf("smart-log of a fresh disk: %s is %d, want %d", k, before[k], want)
		}
	}
	b.says(t, "nvme smart-log "+b.ctrl(), "40 °C (313 K)", "available_spare				: 100%")

	b.Run(t, fmt.Sprintf("fio --name=w --filename=%s --rw=write --bs=64k --size=10M --direct=1 --ioengine=psync --minimal", b.block(1)))
	b.Run(t, fmt.Sprintf("fio --name=r --filename=%s --rw=randread --bs=4k --io_size=2M --size=10M --direct=1 --ioengine=psync --minimal", b.block(1)))
	after := b.smart(t)
	stats, err := b.daemon.Stats(socket)
	if err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]uint64{
		"host_write_commands": 160, "host_read_commands": 512, "num_err_log_entries": 0, "media_errors": 0, "power_cycles": 0, "unsafe_shutdowns": 0,
	} {
		if got := after[k] - before[k]; got != want {
			t.Errorf("smart-log: %s went up by %d, want %d", k, got, want)
		}
	}
	for k, bytes := range map[string]uint64{"data_units_written": 10 << 20, "data_units_read": stats.BytesRead} {
		if want := nvme.DataUnits(bytes).Lo; after[k] != want || want < 5 {
			t.Errorf("smart-log: %s is %d after %d bytes, want %d", k, after[k], bytes, want)
		}
	}
	if stats.BytesRead < 2<<20 || stats.Writes != 160 || stats.Errors != 0 {
		t.Errorf("hostmed counted %+v", stats)
	}
}

// errorLog: the newest entries are the errors that were provoked, with queue, status, block and the byte that was wrong.
func errorLog(t *testing.T, b *bench) {
	type entry struct {
		Count    uint64 `json:"error_count"`
		SQID     uint16
		Status   nvme.Status `json:"status_field"`
		Phase    int         `json:"phase_tag"`
		Location uint16      `json:"parm_error_location"`
		LBA      uint64
		NSID     uint32
	}
	before := b.smart(t)["num_err_log_entries"]
	const blocks = 64 << 20 / 512
	b.fails(t, nvme.StatusInvalidOpcode, "nvme admin-passthru "+b.ctrl()+" --opcode=0x99")
	b.fails(t, nvme.StatusInvalidOpcode, "nvme io-passthru "+b.block(1)+" --opcode=0x99 --namespace-id=1")
	b.fails(t, nvme.StatusLBAOutOfRange, fmt.Sprintf("nvme io-passthru %s --opcode=2 --namespace-id=1 --data-len=4096 --read --cdw10=%d --cdw12=7", b.block(1), blocks-7))
	b.fails(t, nvme.StatusInvalidField, "nvme get-feature "+b.ctrl()+" -f 0x7f")

	var log struct{ Errors []entry }
	b.json(t, &log, "nvme error-log "+b.ctrl()+" -e 5")
	want := []entry{ // the newest first
		{Count: before + 4, SQID: 0, Status: nvme.StatusInvalidField, Location: 40, NSID: nvme.NSIDAll},
		{Count: before + 3, SQID: 1, Status: nvme.StatusLBAOutOfRange, Location: 40, LBA: blocks - 7, NSID: 1},
		{Count: before + 2, SQID: 1, Status: nvme.StatusInvalidOpcode, NSID: 1},
		{Count: before + 1, SQID: 0, Status: nvme.StatusInvalidOpcode},
	}
	if len(log.Errors) != 5 {
		t.Fatalf("error-log -e 5: %d entries", len(log.Errors))
	}
	for i, w := range want {
		got := log.Errors[i]
		if got.SQID > 0 && w.SQID > 0 {
			got.SQID = 1 // that of the CPU it ran on
		}
		if !got.Status.DNR() || !got.Status.More() {
			t.Errorf("error-log: entry %d has status %v, want do-not-retry and more", i, got.Status)
		}
		if got.Status = got.Status.Code(); got != w {
			t.Errorf("error-log: entry %d is %+v, want %+v", i, got, w)
		}
	}
	if got := b.smart(t)["num_err_log_entries"] - before; got != 4 {
		t.Errorf("smart-log: num_err_log_entries went up by %d, want 4", got)
	}
	b.says(t, "nvme error-log "+b.ctrl()+" -e 1", "error_count\t: "+fmt.Sprint(before+4), "Invalid Field in Command")
}

func merged(a, b map[string]any) map[string]any {
	m := maps.Clone(a)
	maps.Copy(m, b)
	return m
}

var effectsKey = regexp.MustCompile(`^(ACS|IOCS)_(\d+) `)

// effects returns effects by opcode.
func (b *bench) effects(t *testing.T, command string) (admin, io map[uint8]uint64) {
	t.Helper()
	var sets []struct {
		CSI   int            `json:"command_set_identifier"`
		Admin map[string]any `json:"admin_cmd_set"`
		IO    map[string]any `json:"io_cmd_set"`
	}
	b.json(t, &sets, command)
	if len(sets) != 2 {
		t.Fatalf("%s: %+v, want the NVM and the zoned command set", command, sets)
	}
	admin, io = map[uint8]uint64{}, map[uint8]uint64{}
	for _, set := range sets {
		if set.CSI != int(nvme.CSINVM) {
			if len(set.IO) > 0 {
				t.Errorf("%s: I/O commands of command set %d: %v", command, set.CSI, set.IO)
			}
			continue
		}
		for k, v := range merged(set.Admin, set.IO) {
			x := effectsKey.FindStringSubmatch(k)
			if x == nil {
				t.Fatalf("%s: what is %q?", command, k)
			}
			into := admin
			if x[1] == "IOCS" {
				into = io
			}
			var op uint8
			fmt.Sscan(x[2], &op)
			into[op] = number(t, v)
		}
	}
	return admin, io
}

// effectsLog: what Identify promises is what the log says, and nothing that it does not promise.
func effectsLog(t *testing.T, b *bench) {
	id := b.seen[0].ctrl
	admin, io := b.effects(t, "nvme effects-log "+b.ctrl())
	for _, c := range []struct {
		in      map[uint8]uint64
		opcode  uint8
		promise bool
	}{
		{admin, nvme.AdminIdentify, true},
		{admin, nvme.AdminGetLogPage, true},
		{admin, nvme.AdminAbort, true},
		{admin, nvme.AdminKeepAlive, true},
		{admin, nvme.AdminAsyncEventRequest, true},
		{admin, nvme.AdminDoorbellBufferConfig, id.OACS&nvme.OACSDoorbellBuf != 0},
		{admin, nvme.AdminFormatNVM, id.OACS&nvme.OACSFormat != 0},
		{admin, nvme.AdminNamespaceManagement, id.OACS&nvme.OACSNamespaces != 0},
		{admin, nvme.AdminNamespaceAttachment, id.OACS&nvme.OACSNamespaces != 0},
		{admin, nvme.AdminGetLBAStatus, id.OACS&nvme.OACSLBAStatus != 0},
		{admin, nvme.AdminDeviceSelfTest, id.OACS&nvme.OACSSelfTest != 0},
		{admin, nvme.AdminSanitize, id.SANICAP != 0},
		{io, nvme.IOFlush, true},
		{io, nvme.IORead, true},
		{io, nvme.IOWrite, true},
		{io, nvme.IOCompare, id.ONCS&nvme.ONCSCompare != 0},
		{io, nvme.IODSM, id.ONCS&nvme.ONCSDSM != 0},
		{io, nvme.IOWriteZeroes, id.ONCS&nvme.ONCSWriteZeroes != 0},
		{io, nvme.IOWriteUncorrectable, id.ONCS&nvme.ONCSWriteUncorrectable != 0},
		{io, nvme.IOVerify, id.ONCS&nvme.ONCSVerify != 0},
		{io, nvme.IOCopy, id.ONCS&nvme.ONCSCopy != 0},
		{io, nvme.IOReservationRegister, id.ONCS&nvme.ONCSReservations != 0},
		{io, nvme.IOReservationReport, id.ONCS&nvme.ONCSReservations != 0},
		{io, nvme.IOReservationAcquire, id.ONCS&nvme.ONCSReservations != 0},
		{io, nvme.IOReservationRelease, id.ONCS&nvme.ONCSReservations != 0},
	} {
		if says := c.in[c.opcode]&nvme.EffectSupported != 0; says != c.promise {
			t.Errorf("effects-log: opcode %02xh supported: %v, Identify says %v", c.opcode, says, c.promise)
		}
	}
	for _, op := range []uint8{nvme.IOWrite, nvme.IOWriteZeroes, nvme.IODSM} {
		if io[op]&nvme.EffectBlockContent == 0 {
			t.Errorf("effects-log: opcode %02xh changes no block: %#x", op, io[op])
		}
	}
	if io[nvme.IORead]&nvme.EffectBlockContent != 0 {
		t.Error("effects-log: Read changes blocks")
	}
	b.says(t, "nvme effects-log -H "+b.ctrl(), "Identify", "LBCC+")
	fids := b.Run(t, "nvme fid-support-effects-log "+b.ctrl())
	for fid := range 0x100 {
		want := map[int]int{1: 1, 2: 1, 4: 1, 5: 2, 7: 1, 8: 1, 9: 1, 0xa: 1, 0xb: 1, 0xc: 1, 0xe: 1, 0xf: 1, 0x16: 1, 0x19: 1}[fid] // 2: of namespaces
		if fid == 6 && id.VWC&nvme.VWCPresent != 0 {
			want = 1
		}
		says := strings.Contains(fids, fmt.Sprintf("FID %02x -> Support Effects Log: 00200001", fid))
		saysNamespace := strings.Contains(fids, fmt.Sprintf("FID %02x -> Support Effects Log: 00100001", fid))
		if fid < 0x20 && (says != (want == 1) || saysNamespace != (want == 2)) {
			t.Errorf("fid-support-effects-log: feature %02xh: of the controller %v, of namespaces %v:\n%s", fid, says, saysNamespace, fids)
		}
	}
}

var eventType = regexp.MustCompile(`(?m)^Event Type: (.*)\(0x[0-9a-f]+\)$`)

// events reads the persistent event log, and returns its entries by type.
func (b *bench) events(t *testing.T) map[string][]string {
	t.Helper()
	// nvme-cli leaves out an entry that ends where the log does.
	read := "nvme persistent-event-log " + b.ctrl() + " -a "
	out := b.Run(t, read+"1 >/dev/null && n=$("+read+"0 -l 512 | sed -n 's/^Total Log Length : //p') && "+read+"0 -l $((n+4)) && "+read+"2 >/dev/null")
	all := map[string][]string{}
	entries := strings.Split(out, "Event Number: ")
	for _, e := range entries[1:] {
		if m := eventType.FindStringSubmatch(e); m != nil {
			all[m[1]] = append(all[m[1]], e)
		}
	}
	for _, want := range []string{fmt.Sprintf("Total Number of Events: %d\n", len(entries)-1), b.sub.Serial, b.sub.Model, b.sub.NQN} {
		if !strings.Contains(entries[0], want) {
			t.Errorf("persistent-event-log does not say %q:\n%s", want, entries[0])
		}
	}
	return all
}

// supportedLogs: exactly the pages that supported-log-pages lists can be read.
func supportedLogs(t *testing.T, b *bench) {
	var pages struct {
		List []map[string]any `json:"supported_logs"`
	}
	b.json(t, &pages, "nvme supported-log-pages "+b.ctrl())
	listed := map[int]bool{}
	for _, p := range pages.List {
		for k, v := range p {
			var lid int
			if _, err := fmt.Sscanf(k, "lid_0x%x ", &lid); err != nil || number(t, v)&nvme.LogSupports == 0 {
				t.Errorf("supported-log-pages: %q: %v", k, v)
			}
			listed[lid] = true
		}
	}
	out := b.Run(t, "for l in $(seq 0 32) 128 129 192; do nvme get-log "+b.ctrl()+" --log-id=$l --lsp=$([ $l = 13 ] && echo 3 || echo 0) --log-len=64 --raw-binary --rae >/dev/null 2>&1 && echo $l; done; nvme persistent-event-log "+b.ctrl()+" -a 2 >/dev/null")
	readable := map[int]bool{}
	for _, f := range strings.Fields(out) {
		var lid int
		fmt.Sscan(f, &lid)
		readable[lid] = true
	}
	for lid := range 256 {
		if listed[lid] != readable[lid] {
			t.Errorf("log %02xh (%v): listed %v, readable %v", lid, nvme.LogPage(lid), listed[lid], readable[lid])
		}
	}
	for _, lid := range []nvme.LogPage{nvme.LogSupported, nvme.LogError, nvme.LogSMART, nvme.LogFirmwareSlot, nvme.LogChangedNamespaces, nvme.LogCommandEffects} {
		if !listed[int(lid)] {
			t.Errorf("supported-log-pages lacks %v", lid)
		}
	}
	if !listed[int(nvme.LogTelemetryHost)] {
		return
	}
	b.Run(t, "nvme telemetry-log "+b.ctrl()+" --host-generate=1 --output-file=/tmp/telemetry")
	data := b.get(t, "/tmp/telemetry")
	if len(data) < 1024 || len(data)%512 != 0 || data[0] != byte(nvme.LogTelemetryHost) || !bytes.Equal(data[5:8], b.seen[0].ctrl.IEEE[:]) {
		t.Fatalf("telemetry-log: %d bytes, beginning % x", len(data), data[:min(len(data), 16)])
	}
	last := binary.LittleEndian.Uint16(data[12:])
	if len(data) != 512*(1+int(last)) || !bytes.Contains(data, []byte(b.sub.NQN)) && !bytes.Contains(data, []byte(b.sub.Serial)) {
		t.Errorf("telemetry-log: %d bytes, last block of area 3 is %d:\n%.400q", len(data), last, data[512:])
	}
}
