package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// admin is an admin command's end.
func admin(opcode uint8, nsid uint32, words ...uint32) trace.Event {
	e := trace.Event{Kind: trace.End, Opcode: opcode, NSID: nsid, CID: 0x1007, Time: 1e9, Latency: 250_000}
	copy(e.CDW10[:], words)
	return e
}

func TestEventsAreDecoded(t *testing.T) {
	_, rd := command(3, 0x2001, read, 0x1000, 8, 0, 83_100)
	_, failed := command(3, 0x2002, write, 16, 2048, 0, 12*time.Millisecond)
	failed.Status, failed.Retries, failed.Comm = uint16(nvme.StatusUnrecoveredRead.WithDNR()), 2, "a\x1b[31mb"
	_, flush := command(1, 3, 0, 0, 0, 0, time.Millisecond)
	start, _ := command(3, 0x2001, read, 0x1000, 8, 0, 83_100)
	for _, c := range []struct {
		e    trace.Event
		line string
	}{
		{rd, "0.000083 nvme0 3 0x2001 4 KiB 83.1 us fio/77 READ nsid=1 slba=0x1000 nlb=8 -> ok"},
		{start, "0.000000 nvme0 3 0x2001 4 KiB fio/77 > READ nsid=1 slba=0x1000 nlb=8"},
		{failed, "1 MiB 12.0 ms a?[31mb/77 WRITE nsid=1 slba=0x10 nlb=2048 -> Unrecovered Read Error (2/81h, DNR), try 3"},
		{flush, "0x0003 1.00 ms fio/77 FLUSH nsid=1 -> ok"},
		{admin(nvme.AdminIdentify, 0, 1), `1.000000 nvme0 0 0x1007 250 us IDENTIFY cns="Controller" nsid=0 csi=0 -> ok`},
		{admin(nvme.AdminGetLogPage, nvme.NSIDAll, 0x007f0002), `GET LOG PAGE lid="SMART / Health Information" nsid=all bytes=512 lpo=0x0 -> ok`},
		{admin(nvme.AdminSetFeatures, 0, 7, 0x00030003), `SET FEATURES fid="Number of Queues" nsid=0 cdw11=0x30003`},
		// The tracepoint has no addresses: none is made up.
		{admin(nvme.AdminCreateSQ, 0, 0x03ff0001, 0x00010001), "CREATE I/O SUBMISSION QUEUE qid=1 qsize=1024 PC cqid=1 qprio=0 -> ok"},
		{admin(nvme.AdminDoorbellBufferConfig, 0), "DOORBELL BUFFER CONFIG -> ok"},
		{admin(0xFE, 0), "OPCODE FEh"},
		{trace.Event{Kind: trace.Timeout, QID: 2, CID: 5, Opcode: read, NSID: 1}, "nvme0 2 0x0005 TIMEOUT of READ nsid=1 slba=0x0 nlb=1"},
		{trace.Event{Kind: trace.Reset, Device: 3}, "nvme3 0 RESET of the controller"},
		{trace.Event{Kind: trace.AsyncEvent, Result: uint64(nvme.MakeAsyncEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError))}, "ASYNCHRONOUS EVENT Error: Invalid Doorbell Write Value, log 01h"},
		{trace.Event{Kind: trace.Doorbell, QID: 4, SQHead: 17, SQTail: 19}, "nvme0 4 SQ head 17 tail 19"},
		{trace.Event{Kind: 99}, "event of kind 99"},
	} {
		if got := strings.Join(strings.Fields(eventLine(&c.e, 0)), " "); !strings.Contains(got, c.line) {
			t.Errorf("got  %s\nwant %s", got, c.line)
		}
	}
}

func TestSnoop(t *testing.T) {
	f := newFake()
	f.use(t)
	for i := range 3 {
		s, e := command(1, uint16(i), read, uint64(i), 8, time.Duration(i)*time.Second, time.Millisecond)
		f.add(s, e)
	}
	id := admin(nvme.AdminIdentify, 0, 1)
	id.Status = uint16(nvme.StatusInvalidField)
	f.add(id, trace.Event{Kind: trace.Doorbell, QID: 1})
	f.lost.Ring = 5
	code, stdout, stderr := run(t, "snoop", "--count", "4")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	has(t, stdout, "TIME s DEVICE QUEUE CID BYTES", "0.000000 nvme0 1 0x0000 4 KiB 1.00 ms fio/77 READ", "1.000000 nvme0 1 0x0001", "READ", "IDENTIFY")
	hasNot(t, stdout, "> READ", "SQ head")
	if want := "nvmetrace: 4 events, 1 commands failed; LOST: 5 events found no room in the ring buffer\n"; stderr != want {
		t.Errorf("%q, want %q", stderr, want)
	}
	if !f.opened.Events || f.opened.Doorbells || !f.closed {
		t.Errorf("opened with %+v, closed %v", f.opened, f.closed)
	}
}

// TestSnoopEnds: by itself after --duration, with nothing to print too.
func TestSnoopEnds(t *testing.T) {
	f := newFake()
	f.use(t)
	code, stdout, stderr := run(t, "snoop", "--duration", "30ms", "--admin")
	if code != 0 || stdout != "" || stderr != "nvmetrace: 0 events, 0 commands failed, nothing lost\n" {
		t.Errorf("exit %d: %q %q", code, stdout, stderr)
	}
	if len(f.opened.Queues) != 1 || f.opened.Queues[0] != 0 {
		t.Errorf("opened with %+v", f.opened)
	}
}

func TestSnoopJSON(t *testing.T) {
	f := newFake()
	f.use(t)
	s, e := command(2, 7, write, 0x123456789, 8, time.Second, time.Millisecond)
	f.add(s, e)
	f.add(admin(nvme.AdminIdentify, 0, 1))
	code, stdout, stderr := run(t, "snoop", "--count", "3", "--starts", "--json")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	var all []map[string]any
	for d := json.NewDecoder(strings.NewReader(stdout)); d.More(); {
		var m map[string]any
		if err := d.Decode(&m); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		all = append(all, m)
	}
	if len(all) != 3 || all[0]["kind"] != "start" || all[0]["latency_ns"] != nil {
		t.Fatalf("%s", stdout)
	}
	for k, want := range map[string]any{
		"kind": "end", "device": "nvme0", "qid": 2.0, "cid": 7.0, "opcode": 1.0, "command": "Write", "nsid": 1.0, "slba": float64(0x123456789), "blocks": 8.0,
		"bytes": 4096.0, "latency_ns": 1e6, "status": 0.0, "status_name": "ok", "comm": "fio", "tid": 77.0, "disk": "nvme0n1", "time_ns": 1.001e9,
	} {
		if all[1][k] != want {
			t.Errorf("%s is %v, want %v", k, all[1][k], want)
		}
	}
	if all[2]["command"] != "Identify" || all[2]["slba"] != nil {
		t.Errorf("%v", all[2])
	}
}
