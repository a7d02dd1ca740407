package guestbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// open makes the four ways ready in the guest: three of the controllers go to VFIO, and two of these are served.
func (r *rig) open(ctx context.Context, say func(string)) error {
	say("taking the controllers")
	if err := r.sh(ctx, "modprobe -a vfio_iommu_type1 vfio-pci ublk_drv nbd"); err != nil {
		return err
	}
	for i, way := range Ways {
		disk, err := r.vm.DiskAt(ctx, i)
		if err != nil {
			return err
		}
		if way == Kernel {
			r.target[way] = disk.Namespace(1)
			continue
		}
		r.target[way] = "vfio:" + disk.PCI
		if err := r.sh(ctx, "guestdrv bind "+disk.PCI); err != nil {
			return err
		}
	}
	say("starting guestdrv serve")
	for _, s := range []struct {
		way   Way
		flags string
		block string
		after string // once the server is up; the shell has an nbd-client of its own, which knows no unix sockets
	}{
		{Ublk, "--ublk --id 0", "/dev/ublkb0", ""},
		{NBD, "--nbd unix:/tmp/nbd.sock", "/dev/nbd0", "/usr/sbin/nbd-client -unix /tmp/nbd.sock /dev/nbd0 >&2"},
	} {
		if err := r.serve(ctx, r.target[s.way], s.flags, s.block, s.after); err != nil {
			return fmt.Errorf("%s: %w", s.way, err)
		}
		r.target[s.way] = s.block
	}
	return nil
}

// serve starts guestdrv serve in the guest, runs what makes the block device of it, and waits until that has its size.
func (r *rig) serve(ctx context.Context, device, flags, block, after string) error {
	up := "[ -e " + block + " ]"
	if after != "" {
		up = "[ -S /tmp/nbd.sock ]"
	}
	log := "/tmp" + block + ".log"
	script := fmt.Sprintf(`mkdir -p /tmp/dev
setsid guestdrv serve %s %s >%s 2>&1 </dev/null &
server=$!
i=0
until %s; do
	i=$((i+1))
	if [ $i -gt 300 ] || ! kill -0 $server; then cat %s >&2; exit 1; fi
	sleep 0.1
done
%s
i=0
until [ "$(blockdev --getsize64 %s)" = %d ]; do
	i=$((i+1))
	if [ $i -gt 100 ]; then cat %s >&2; blockdev --getsize64 %s >&2; exit 1; fi
	sleep 0.1
done`, device, flags, log, up, log, after, block, diskBytes, log, block)
	return r.sh(ctx, script)
}

func (r *rig) sh(ctx context.Context, command string) error {
	res, err := r.vm.Exec(ctx, command)
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("guest: %s: exit %d: %s%s", command, res.Exit, res.Stdout, res.Stderr)
	}
	return err
}

// settle is how long a load has run before the guest's CPU time is looked at, its start-up behind it; margin is what
// is left at the end.
const (
	settle = 1500 * time.Millisecond
	margin = 200 * time.Millisecond
)

// one measures one job on one way.
func (r *rig) one(ctx context.Context, way Way, job Job) (Figure, error) {
	seconds := max(1, int(r.cfg.Runtime.Seconds()))
	load, parse := fioCommand(r.target[way], job, seconds), parseFio
	if way == Library {
		load, parse = libraryCommand(r.target[way], job, seconds), parseLibrary
	}
	before, err := r.m.Stats(r.socket[way])
	if err != nil {
		return Figure{}, err
	}
	// The load runs in the background, so that the CPU time between two points in the midst of it can be read.
	window := time.Duration(seconds)*time.Second - margin
	script := fmt.Sprintf(`%s >/tmp/load.json 2>/tmp/load.err & load=$!
sleep %.1f
head -1 /proc/stat
sleep %.1f
head -1 /proc/stat
wait $load || { cat /tmp/load.json /tmp/load.err >&2; exit 1; }
cat /tmp/load.json`, load, settle.Seconds(), window.Seconds())
	ctx, cancel := context.WithTimeout(ctx, time.Minute+3*r.cfg.Runtime)
	defer cancel()
	res, err := r.vm.Exec(ctx, script)
	if err != nil {
		return Figure{}, err
	}
	if res.Exit != 0 {
		return Figure{}, fmt.Errorf("exit %d: %s", res.Exit, res.Stderr)
	}
	after, err := r.m.Stats(r.socket[way])
	if err != nil {
		return Figure{}, err
	}
	busy, rest, err := parseBusy(res.Stdout)
	if err != nil {
		return Figure{}, err
	}
	f, err := parse([]byte(rest))
	if err != nil {
		return f, err
	}
	f.CPU = busy * float64(r.cfg.CPUs) * 1e6 / f.IOPS
	d := after.Sub(before)
	if d.Errors != 0 || d.Commands() == 0 {
		return f, fmt.Errorf("%d commands, %d of them failed", d.Commands(), d.Errors)
	}
	f.MMIO = float64(d.SQDoorbells+d.CQDoorbells) / float64(d.Commands())
	return f, nil
}

func fioCommand(device string, job Job, seconds int) string {
	// The ramp is as long as what comes before the CPU time is looked at.
	return fmt.Sprintf("fio --name=x --filename=%s --rw=%s --bs=%s --iodepth=%d --ioengine=libaio --direct=1 --time_based --ramp_time=1 --runtime=%d --output-format=json",
		device, job.RW, job.BS, job.Depth, seconds)
}

func libraryCommand(device string, job Job, seconds int) string {
	return fmt.Sprintf("guestdrv bench %s --rw %s --bs %s --qd %d --jobs 1 --runtime %ds --json", device, job.RW, job.BS, job.Depth, seconds+2)
}

// parseBusy reads the two lines of /proc/stat at the start of text, and returns the part of the time that the CPUs were busy
// between them, and what follows.
func parseBusy(text string) (busy float64, rest string, err error) {
	var total, idle [2]uint64
	rest = text
	for i := range 2 {
		line, tail, ok := strings.Cut(rest, "\n")
		fields := strings.Fields(line)
		if !ok || len(fields) < 8 || fields[0] != "cpu" {
			return 0, "", fmt.Errorf("%q is not the first line of /proc/stat", line)
		}
		for k, f := range fields[1:8] { // what follows is part of these: guest, guest_nice; steal is the eighth
			n, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				return 0, "", fmt.Errorf("/proc/stat: %q: %w", line, err)
			}
			total[i] += n
			if k == 3 || k == 4 { // idle, iowait
				idle[i] += n
			}
		}
		rest = tail
	}
	if total[1] <= total[0] {
		return 0, "", errors.New("/proc/stat: no time has passed")
	}
	return 1 - float64(idle[1]-idle[0])/float64(total[1]-total[0]), rest, nil
}

func parseFio(b []byte) (Figure, error) {
	type side struct {
		IOPS float64
		Lat  struct {
			Percentile map[string]float64
		} `json:"clat_ns"`
	}
	var out struct {
		Jobs []struct {
			Error       int
			Read, Write side
		}
	}
	// fio may print notes before the object.
	if i := strings.IndexByte(string(b), '{'); i > 0 {
		b = b[i:]
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return Figure{}, fmt.Errorf("fio: %w: %s", err, b)
	}
	if len(out.Jobs) != 1 || out.Jobs[0].Error != 0 {
		return Figure{}, fmt.Errorf("fio: %s", b)
	}
	s := out.Jobs[0].Read
	if s.IOPS == 0 {
		s = out.Jobs[0].Write
	}
	return checked(Figure{IOPS: s.IOPS, P50: s.Lat.Percentile["50.000000"] / 1e3, P99: s.Lat.Percentile["99.000000"] / 1e3})
}

func parseLibrary(b []byte) (Figure, error) {
	var out struct {
		IOPS   float64
		Errors uint64
		Lat    struct{ P50, P99 float64 } `json:"lat_ns"`
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return Figure{}, fmt.Errorf("guestdrv bench: %w: %s", err, b)
	}
	if out.Errors > 0 {
		return Figure{}, fmt.Errorf("guestdrv bench: %s", b)
	}
	return checked(Figure{IOPS: out.IOPS, P50: out.Lat.P50 / 1e3, P99: out.Lat.P99 / 1e3})
}

// checked refuses a load that has not measured anything.
func checked(f Figure) (Figure, error) {
	if f.IOPS <= 0 || f.P50 <= 0 || f.P99 < f.P50 {
		return f, fmt.Errorf("nothing was measured: %+v", f)
	}
	return f, nil
}
