package backends

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// limitLoad is more than the limits of this file let go, and a fraction of what the disks can.
const limitLoad = "guestdrv bench %s --json --rw %s --bs 4k --jobs 2 --qd 8 --runtime %s"

// limit is what a load of 4 KiB commands meets.
type limit struct{ rate, burst float64 } // commands a second, and at once

// keeps checks what a load did by a limit. That it is never exceeded holds on any machine: what was granted from the first command to the last completion, a
// full bucket and the part of a command that was being saved beside it, is all there is. That it is used takes a machine which runs everybody now and then.
func (l limit) keeps(t *testing.T, j *job) {
	t.Helper()
	f := parseFigures(t, j.wait())
	if f.Errors != 0 || f.Trouble != nil {
		t.Fatalf("%s: %s", j.command, j.r.Stdout)
	}
	n := f.IOPS * f.Seconds
	t.Logf("%.0f commands in %.2f s, limit %.0f a second and %.0f at once", n, f.Seconds, l.rate, l.burst)
	if n > l.rate*f.Seconds+l.burst+1 {
		t.Errorf("%s: %.0f commands in %.2f s are more than %.0f a second and %.0f at once", j.command, n, f.Seconds, l.rate, l.burst)
	}
	if n < l.rate*f.Seconds/4 {
		t.Errorf("%s: %.0f commands in %.2f s, limit %.0f a second", j.command, n, f.Seconds, l.rate)
	}
}

// TestLimits: three guests at once on real disks, by block:, nvme: and vfio:, each with another limit, which SIGHUP changes while they work. What was held back is counted.
func TestLimits(t *testing.T) {
	h := open(t)
	kernels, ours := h.disk(t, diskConfig{sizeMiB: 160, partitions: []int{32, 64}}), h.disk(t, diskConfig{sizeMiB: 64})
	h.vfio(t, ours)
	specs := []string{
		"block:" + kernels.part(1),
		fmt.Sprintf("nvme:%s,offset=%d,size=32MiB", kernels.char(), kernels.partAt(t, 2)),
		"vfio:" + ours.PCI,
	}
	config := func(limits ...string) (doc string) {
		for i, l := range limits {
			doc += fmt.Sprintf("[[subsystem]]\n[[subsystem.controller]]\nsocket = \"SOCKET%d\"\n[[subsystem.namespace]]\nspec = %q\nlimits = { %s }\n", i, specs[i], l)
		}
		return doc
	}
	m := h.mediate(t, config(`iops = 100, iops_burst = 20`, `bandwidth = "400KiB", bandwidth_burst = "80KiB"`, `read_iops = 100, read_iops_burst = 20`))
	change := func(limits ...string) {
		t.Helper()
		m.configure(t, config(limits...))
		before := strings.TrimSpace(h.Run(t, "grep -c reloaded "+m.log+" || true"))
		h.Run(t, "kill -HUP $(cat "+m.pid+")")
		h.until(t, "hostmed does not say that it has reloaded", fmt.Sprintf("[ $(grep -c reloaded %s) -gt %s ]", m.log, before))
	}
	loads := func(kind, runtime string) (jobs []*job) {
		for i := range specs {
			jobs = append(jobs, h.start(t, fmt.Sprintf(limitLoad, m.device(i), kind, runtime)))
		}
		return jobs
	}
	for _, j := range loads("randread", "3s") {
		limit{100, 20}.keeps(t, j)
	}

	// Four times as much while they work: more than the old limits allow, and no more than the new ones.
	jobs := loads("randread", "5s")
	time.Sleep(1500 * time.Millisecond)
	change(`iops = 400, iops_burst = 20`, `bandwidth = "1600KiB", bandwidth_burst = "80KiB"`, `read_iops = 400, read_iops_burst = 20`)
	for _, j := range jobs {
		limit{400, 20}.keeps(t, j)
		if f := parseFigures(t, j.wait()); f.IOPS*f.Seconds < 100*f.Seconds+20+1 {
			t.Errorf("%s: %.0f commands in %.2f s: the change does not count", j.command, f.IOPS*f.Seconds, f.Seconds)
		}
	}

	// Reads that wait hold back no writes, not even in the same queue.
	change(`read_iops = 1, read_iops_burst = 1`, `read_iops = 1, read_iops_burst = 1`, `read_iops = 1, read_iops_burst = 1`)
	for i, spec := range specs {
		var b struct {
			Reads, Writes int
			Seconds       float64
		}
		if err := json.Unmarshal([]byte(h.Run(t, guestCommand+" beside "+m.device(i))), &b); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d writes and %d of 12 reads in %.2f s", spec, b.Writes, b.Reads, b.Seconds)
		if float64(b.Reads) > b.Seconds+1+1 {
			t.Errorf("%s: %d reads in %.2f s at 1 a second", spec, b.Reads, b.Seconds)
		}
		if b.Reads == 12 {
			t.Errorf("%s: the writes waited for the reads", spec)
		}
	}
	m.stop(t)
	for i, s := range m.sockets {
		lines := h.Run(t, fmt.Sprintf("grep -c -- '%s.* throttled=[1-9]' %s || true", s, m.log))
		if strings.TrimSpace(lines) != "3" {
			t.Errorf("of guest %d's three times hostmed has counted in %s what it held back", i, strings.TrimSpace(lines))
		}
	}
	h.CheckDmesg(t, "Ignoring bogus Namespace Identifiers")
}
