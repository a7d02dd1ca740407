package trace

import (
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// NVM Command Set 1.0c: opcodes.
const (
	opFlush = 0x00
	opWrite = 0x01
	opRead  = 0x02
	opDSM   = 0x09
)

// block is how fio does direct I/O on a block device.
const block = "--direct=1 --ioengine=libaio --filename="

// test is a part of what a guest runs.
type test struct {
	name string
	run  func(*testing.T, *guest)
}

func TestStable(t *testing.T) {
	all(t, vmlab.Stable, test{"counts", counts}, test{"latency", latencies}, test{"highest rate", highestRate},
		test{"passthrough", passthrough}, test{"classic", classic}, test{"filters", filters}, test{"timeout", timeout}, test{"asynchronous event", asyncEvent}, test{"reset", reset})
}

// TestBackports has what hangs on the kernel.
func TestBackports(t *testing.T) {
	all(t, vmlab.Backports, test{"counts", counts}, test{"latency", latencies}, test{"highest rate", highestRate}, test{"passthrough", passthrough}, test{"reset", reset})
}

// all runs tests in one guest, since a boot takes longer than most of them.
func all(t *testing.T, kernel vmlab.Kernel, tests ...test) {
	g := boot(t, kernel)
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) { c.run(t, g) })
	}
	if !t.Failed() {
		g.CheckDmesg(t, "resetting controller", "Ignoring bogus Namespace Identifiers", "I/O tag .*timeout", "Abort status", "timeout, (aborting|completion polled|reset)", "I/O Cmd.*sct 0x0 / sc 0x7", "I/O error, dev nvme", "rescanning namespaces", "controller capabilities changed")
	}
}

// counts: by queue, opcode and size exactly what fio did, from two CPUs; each command once begun and once ended; nothing lost.
func counts(t *testing.T, g *guest) {
	disk := g.fast.Namespace(1)
	s := g.fio(t, "-events -doorbells", block+disk,
		"--name=read --cpus_allowed=0 --rw=randread --bs=4k --number_ios=700 --iodepth=4",
		"--name=write --cpus_allowed=1 --rw=randwrite --bs=16k --number_ios=300 --iodepth=2 --fsync=10",
		"--name=mixed --cpus_allowed=1 --rw=randrw --norandommap --bssplit=512/50:128k/50 --number_ios=400 --iodepth=3",
		"--name=trim --cpus_allowed=0 --rw=randtrim --bs=64k --number_ios=50 --iodepth=1 --ioengine=sync")
	dev, q := device(t, g.fast), [2]uint16{g.queueOf(t, disk, 0), g.queueOf(t, disk, 1)}
	read, write, mixed, trim := s.Jobs[0], s.Jobs[1], s.Jobs[2], s.Jobs[3]
	if read.Read.Total != 700 || write.Write.Total != 300 || mixed.Read.Total+mixed.Write.Total != 400 || trim.Trim.Total != 50 || write.Sync.Total == 0 {
		t.Fatalf("fio did other than it was told: %+v", s.Jobs)
	}
	got := s.counts()
	// The two sizes of mixed are in its bytes: 512a + 128Ki*b of a+b.
	small := func(n, bytes uint64) uint64 { return (n<<17 - bytes) / (1<<17 - 512) }
	mr, mw := small(mixed.Read.Total, mixed.Read.Bytes), small(mixed.Write.Total, mixed.Write.Bytes)
	want := map[trace.Key]uint64{
		{Device: dev, QID: q[0], Opcode: opRead, SizeClass: trace.SizeClassOf(4096)}:       700,
		{Device: dev, QID: q[1], Opcode: opWrite, SizeClass: trace.SizeClassOf(16384)}:     300,
		{Device: dev, QID: q[1], Opcode: opRead, SizeClass: trace.SizeClassOf(512)}:        mr,
		{Device: dev, QID: q[1], Opcode: opRead, SizeClass: trace.SizeClassOf(128 << 10)}:  mixed.Read.Total - mr,
		{Device: dev, QID: q[1], Opcode: opWrite, SizeClass: trace.SizeClassOf(512)}:       mw,
		{Device: dev, QID: q[1], Opcode: opWrite, SizeClass: trace.SizeClassOf(128 << 10)}: mixed.Write.Total - mw,
		{Device: dev, QID: q[0], Opcode: opDSM, SizeClass: trace.SizeClassOf(16)}:          50,
		{Device: dev, QID: q[1], Opcode: opFlush}:                                          write.Sync.Total,
	}
	// Where tracepoints may be preempted, a program and the one behind it can both be missed; that is counted.
	if g.preempts && s.Lost.Recursion > 0 && !maps.Equal(got, want) {
		t.Logf("lost %+v: counted %v, fio did %v", s.Lost, got, want)
		missed(t, got, want, s.Lost)
		return
	}
	if !maps.Equal(got, want) {
		t.Errorf("counted %v\nfio did  %v", got, want)
	}
	bytes := map[uint8]uint64{}
	for _, c := range s.Cells {
		bytes[c.Opcode] += c.Bytes
		if c.Errors != 0 || c.Retries != 0 {
			t.Errorf("%+v: %d errors, %d retries", c.Key, c.Errors, c.Retries)
		}
	}
	if r, w := read.Read.Bytes+mixed.Read.Bytes, write.Write.Bytes+mixed.Write.Bytes; bytes[opRead] != r || bytes[opWrite] != w {
		t.Errorf("%d bytes read, %d written; fio's are %d and %d", bytes[opRead], bytes[opWrite], r, w)
	}
	if s.Lost != (trace.Losses{}) && !(g.preempts && s.Lost == trace.Losses{Recursion: s.Lost.Recursion}) {
		t.Errorf("lost %+v", s.Lost)
	}
	total := uint64(0)
	for _, n := range want {
		total += n
	}
	checkQueues(t, s, total)
	checkEvents(t, s, total, disk)
	for _, h := range s.Hooks {
		if !h.Attached {
			t.Errorf("%s is not attached: %s", h.Name, h.Why)
		}
	}
	var above uint64
	for _, c := range s.Block {
		if c.Disk == filepath.Base(disk) {
			above += c.Count
		}
	}
	if above != total {
		t.Errorf("the block layer counted %d of %d", above, total)
	}
	if s.Header.Kernel == "" || len(s.Header.Devices) != 2 {
		t.Errorf("header %+v", s.Header)
	}
}

// missed checks that what was not counted is counted as lost. An end without its start, or the other way round, loses both.
func missed(t *testing.T, got, want map[trace.Key]uint64, lost trace.Losses) {
	t.Helper()
	missing := uint64(0)
	for k, n := range want {
		if got[k] > n {
			t.Errorf("%+v: counted %d of %d", k, got[k], n)
		}
		missing += n - got[k]
		delete(got, k)
	}
	if len(got) > 0 || missing > lost.Recursion+lost.Map {
		t.Errorf("%d are missing, lost %+v; and there is %v", missing, lost, got)
	}
}

// checkQueues compares what queues count among themselves and with the total.
func checkQueues(t *testing.T, s *seen, total uint64) {
	t.Helper()
	var started, ended, publishes uint64
	for _, q := range s.Queues {
		started += q.Started
		ended += q.Ended
		publishes += q.Publishes
		if q.Started == 0 {
			continue
		}
		if q.Depth != 0 || q.Orphans != 0 || q.Replaced != 0 || q.DepthMax < 1 || q.DepthMax > 8 {
			t.Errorf("%+v", q)
		}
		if q.Publishes == 0 || q.Publishes > q.Started || q.Interrupts == 0 || q.Interrupts > q.Ended {
			t.Errorf("queue %d: %d tail moves and %d interrupts for %d commands", q.QID, q.Publishes, q.Interrupts, q.Started)
		}
	}
	if started != total || ended != total {
		t.Errorf("%d started, %d ended of %d; the tails were moved %d times", started, ended, total, publishes)
	}
}

// checkEvents pairs Starts and Ends and compares them with what was aggregated.
func checkEvents(t *testing.T, s *seen, total uint64, disk string) {
	t.Helper()
	type id struct{ device, qid, cid uint16 }
	open := map[id]trace.Event{}
	n := map[trace.Kind]uint64{}
	sums := map[trace.Key]int64{}
	for _, e := range s.Events {
		n[e.Kind]++
		at := id{e.Device, e.QID, e.CID}
		switch e.Kind {
		case trace.Start:
			if old, ok := open[at]; ok {
				t.Errorf("begun twice: %+v, %+v", old, e)
			}
			open[at] = e
		case trace.End:
			begin, ok := open[at]
			delete(open, at)
			if !ok || begin.Time+e.Latency != e.Time || begin.SLBA != e.SLBA || begin.Opcode != e.Opcode || begin.CDW10 != e.CDW10 {
				t.Errorf("an end %+v of %+v", e, begin)
			}
			sums[trace.Key{Device: e.Device, QID: e.QID, Opcode: e.Opcode, SizeClass: trace.SizeClassOf(e.Bytes)}] += e.Latency
			fallthrough
		default:
			if e.Kind == trace.Doorbell {
				continue
			}
			if e.Disk != filepath.Base(disk) || e.NSID != 1 || e.TID == 0 || e.Status != 0 || (e.Blocks > 0 && e.SLBA+uint64(e.Blocks) > diskMiB<<20/512) {
				t.Errorf("%+v", e)
			}
		}
		// What others run for it, such as trims, begins in a thread of the kernel's.
		if e.Kind == trace.Start && (e.Opcode == opRead || e.Opcode == opWrite) && e.Comm != "fio" {
			t.Errorf("begun by %q: %+v", e.Comm, e)
		}
	}
	if n[trace.Start] != total || n[trace.End] != total || n[trace.Doorbell] != total || len(open) > 0 {
		t.Errorf("events %v of %d commands; %d never ended", n, total, len(open))
	}
	for _, c := range s.Cells {
		if got := time.Duration(sums[c.Key]); got != c.Latency.Sum() {
			t.Errorf("%+v: the events took %v, the histogram has %v", c.Key, got, c.Latency.Sum())
		}
	}
}

// classic is the way on a kernel without BTF: the same counts, less beside them.
func classic(t *testing.T, g *guest) {
	disk := g.fast.Namespace(1)
	s := g.fio(t, "-classic -events", block+disk,
		"--name=read --cpus_allowed=0 --rw=randread --bs=4k --number_ios=600 --iodepth=4", "--name=write --cpus_allowed=1 --rw=randwrite --bs=8k --number_ios=400 --iodepth=4")
	dev := device(t, g.fast)
	want := map[trace.Key]uint64{
		{Device: dev, QID: g.queueOf(t, disk, 0), Opcode: opRead, SizeClass: trace.SizeClassOf(4096)}:  600,
		{Device: dev, QID: g.queueOf(t, disk, 1), Opcode: opWrite, SizeClass: trace.SizeClassOf(8192)}: 400,
	}
	// The kernel runs no BPF program of a classic tracepoint while another runs on the CPU: what that costs is counted.
	missed(t, s.counts(), want, s.Lost)
	for name, h := range s.Hooks {
		if want := map[trace.Part]bool{trace.NVMe: h.Without == "commands" || h.Without == "SQ head and tail" || h.Without == "asynchronous events", trace.Block: true}[h.Part]; h.Attached != want {
			t.Errorf("%s: %+v", name, h)
		}
		if h.Part == trace.NVMe && h.Attached && h.How != trace.Tracepoint {
			t.Errorf("%s: %+v", name, h)
		}
	}
	for _, e := range s.Events {
		if e.Disk != filepath.Base(disk) || e.Comm == "" || e.NSID != 1 || (e.Bytes != 4096 && e.Bytes != 8192) {
			t.Fatalf("%+v", e)
		}
	}
}

// passthrough: io_uring's user_data is found for each command that goes by the character device.
func passthrough(t *testing.T, g *guest) {
	s := g.fio(t, "-events", "--filename="+fmt.Sprintf("/dev/ng%sn1", g.fast.Name[len("nvme"):]),
		"--name=read --ioengine=io_uring_cmd --cmd_type=nvme --rw=randread --bs=4k --number_ios=500 --iodepth=4")
	if n := s.Jobs[0].Read.Total; n != 500 || s.latencyOf(device(t, g.fast), opRead).Count() != 500 {
		t.Errorf("fio did %d, %d were counted", n, s.latencyOf(device(t, g.fast), opRead).Count())
	}
	known := 0
	for _, e := range s.Events {
		if e.Kind == trace.End && e.QID > 0 && e.UserData != 0 {
			known++
		}
	}
	if known != 500 {
		t.Errorf("the user_data of %d of 500 is known", known)
	}
}

// filters are the kernel's: what they leave out is neither counted nor an event.
func filters(t *testing.T, g *guest) {
	disk := g.fast.Namespace(1)
	q := g.queueOf(t, disk, 1)
	s := g.fio(t, fmt.Sprintf("-events -min-latency 1ns -queue %d -opcode %d", q, opRead), block+disk, "--rw=randrw --bs=4k --number_ios=400 --iodepth=2",
		"--name=one --cpus_allowed=0", "--name=two --cpus_allowed=1")
	want := s.Jobs[1].Read.Total
	if got := s.counts(); len(got) != 1 || got[trace.Key{Device: device(t, g.fast), QID: q, Opcode: opRead, SizeClass: trace.SizeClassOf(4096)}] != want {
		t.Errorf("counted %v, want %d reads of queue %d", got, want, q)
	}
	if uint64(len(s.Events)) != want {
		t.Errorf("%d events of %d", len(s.Events), want)
	}
	for _, e := range s.Events {
		if e.Kind != trace.End || e.QID != q || e.Opcode != opRead { // a least latency leaves Starts out
			t.Fatalf("%+v", e)
		}
	}
}

// latencies are fio's, within a tenth, where the device is what takes the time: fio's own are longer by what it takes to see a completion, which on an emulated
// CPU is longer than a fast device takes. A machine that is busy otherwise makes only that longer, so one good run of three says it. Each thread has one
// command at a time: of several, fio takes the last ones as long as the very last.
func latencies(t *testing.T, g *guest) {
	const runs = 3
	for run := 1; ; run++ {
		s := g.fio(t, "", block+g.slow.Namespace(1), "--name=x --ioengine=psync --thread --numjobs=8 --group_reporting --rw=randrw --bs=4k --number_ios=62")
		far := 0
		for opcode, f := range map[uint8]fioSide{opRead: s.Jobs[0].Read, opWrite: s.Jobs[0].Write} {
			h := s.latencyOf(device(t, g.slow), opcode)
			if h.Count() != f.Total {
				t.Errorf("opcode %d: %d of %d", opcode, h.Count(), f.Total)
			}
			near := func(what string, got time.Duration, fio float64) {
				t.Logf("opcode %d, %s: %v, fio has %v", opcode, what, got, time.Duration(fio))
				if math.Abs(float64(got)-fio) > fio/10 {
					far++
				}
			}
			near("mean", h.Mean(), f.CLat.Mean)
			for _, q := range []float64{0.5, 0.9, 0.99} {
				near(fmt.Sprintf("%g %%", q*100), h.Quantile(q), float64(f.CLat.Percentile[fmt.Sprintf("%f", q*100)]))
			}
		}
		if far == 0 {
			return
		}
		if run == runs {
			t.Fatalf("%d are further from fio's than a tenth, for the %dth time", far, run)
		}
	}
}

// highestRate: nothing is lost that is not counted as lost, even with a ring buffer that is much too small.
func highestRate(t *testing.T, g *guest) {
	const load = "--rw=randread --bs=512 --iodepth=32 --time_based --runtime=2 --name=a --cpus_allowed=0 --name=b --cpus_allowed=1"
	for _, flags := range []string{"-events", "-events -ring 16384"} {
		s := g.fio(t, flags, block+g.fast.Namespace(1), load)
		did := s.Jobs[0].Read.Total + s.Jobs[1].Read.Total
		counted := s.latencyOf(device(t, g.fast), opRead).Count()
		t.Logf("%q: fio did %d, %d were counted, %d events, lost %+v", flags, did, counted, len(s.Events), s.Lost)
		if counted > did || counted+s.Lost.Map+s.Lost.Recursion < did {
			t.Errorf("%q: fio did %d, %d were counted, lost %+v", flags, did, counted, s.Lost)
		}
		// Each command has two events, except those that a program missed.
		if events := uint64(len(s.Events)) + s.Lost.Ring; events > 2*did || events+2*(s.Lost.Map+s.Lost.Recursion) < 2*did {
			t.Errorf("%q: fio did %d, %d events, lost %+v", flags, did, len(s.Events), s.Lost)
		}
		if small := flags != "-events"; small && s.Lost.Ring == 0 {
			t.Errorf("%q: a ring of 16 KiB lost nothing of %d events", flags, 2*did)
		}
	}
}

// timeout: the slow disk gets less time than it needs, and the kernel, which looks once a second, finds commands that are late.
func timeout(t *testing.T, g *guest) {
	g.Run(t, fmt.Sprintf("echo 40 > /sys/block/%s/queue/io_timeout", filepath.Base(g.slow.Namespace(1))))
	s := g.fio(t, "-events", block+g.slow.Namespace(1), "--name=x --ioengine=psync --thread --numjobs=8 --group_reporting --rw=randread --bs=4k --time_based --runtime=2 --continue_on_error=io")
	var timeouts, events, failed, errors, again, retries uint64
	for _, q := range s.Queues {
		if q.Device == device(t, g.slow) {
			timeouts += q.Timeouts
		}
	}
	for _, c := range s.Cells {
		if c.QID > 0 {
			errors += c.Errors
			retries += c.Retries
		}
	}
	for _, e := range s.Events {
		if e.Kind == trace.End && e.QID > 0 && e.Status != 0 {
			failed++
		}
		if e.Kind == trace.End && e.QID > 0 && e.Retries > 0 {
			again++
		}
		if e.Kind != trace.Timeout || e.Device != device(t, g.slow) {
			continue
		}
		events++
		if e.QID > 0 && (e.Opcode != opRead || e.Latency < int64(40*time.Millisecond)) {
			t.Errorf("%+v", e)
		}
	}
	// The driver has late commands aborted, which fails them, and tries again some times before fio hears of it.
	if failed == 0 || errors != failed || failed < s.Jobs[0].Errors || again == 0 || again != retries {
		t.Errorf("%d commands failed, %d were counted, fio has %d; %d were tried again, %d were counted", failed, errors, s.Jobs[0].Errors, again, retries)
	}
	if timeouts == 0 || events != timeouts || s.Hooks["nvme_timeout()"].Hits != timeouts {
		t.Errorf("%d timeouts, %d events, %d hits", timeouts, events, s.Hooks["nvme_timeout()"].Hits)
	}
}

// asyncEvent: a namespace that goes and comes back makes the controller say so. NVMe Base 2.0c figure 145: Namespace Attribute Changed is a notice (2), information 0.
func asyncEvent(t *testing.T, g *guest) {
	// counted gives its privileges up, and admin commands need them.
	g.Run(t, fmt.Sprintf("c=$(cat /sys/class/nvme/%[1]s/cntlid); rm -f /tmp/record; counted -events -file /tmp/record -- sleep 2 >/tmp/report & "+
		"while [ ! -e /tmp/record ]; do sleep 0.1; done; sleep 0.2; nvme detach-ns /dev/%[1]s -n 1 -c $c && nvme attach-ns /dev/%[1]s -n 1 -c $c && wait $!", g.slow.Name))
	s := new(seen)
	s.replay(t, g.file(t, "/tmp/record"))
	var counted, events uint64
	for _, q := range s.Queues {
		counted += q.AERs
		if q.AERs > 0 && (q.QID != 0 || q.Device != device(t, g.slow)) {
			t.Errorf("%+v", q)
		}
	}
	for _, e := range s.Events {
		if e.Kind != trace.AsyncEvent {
			continue
		}
		events++
		if e.Device != device(t, g.slow) || e.QID != 0 || e.Result&0xffff != 2 {
			t.Errorf("%+v", e)
		}
	}
	if counted == 0 || events != counted {
		t.Errorf("%d asynchronous events, %d in the ring", counted, events)
	}
}

// reset: a reset of the controller is seen, and its admin commands.
func reset(t *testing.T, g *guest) {
	out := g.Run(t, fmt.Sprintf("counted -events -file /tmp/record -- sh -c 'echo 1 > /sys/class/nvme/%s/reset_controller' >/tmp/report; cat /tmp/report", g.fast.Name))
	s := new(seen)
	s.replay(t, g.file(t, "/tmp/record"))
	var resets, events uint64
	for _, q := range s.Queues {
		if q.Device == device(t, g.fast) {
			resets += q.Resets
		}
	}
	admin := 0
	for _, e := range s.Events {
		if e.Kind == trace.Reset && e.Device == device(t, g.fast) {
			events++
		}
		if e.Kind == trace.End && e.QID == 0 && e.Disk == "" {
			admin++
		}
	}
	if resets != 1 || events != 1 || admin < 5 {
		t.Errorf("%d resets, %d events of it, %d admin commands: %s", resets, events, admin, out)
	}
}
