package tracedemo

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/doorbells"
)

// Pictures are files to draw into, by names that end in .svg or .png.
type Pictures struct {
	Heat string // nvmetrace latency --plot
	Path string // nvmetrace path --plot
}

// Demo boots a guest, puts a load on its disks, and prints what nvmetrace top, latency and path show of it. say is told what is being done.
func Demo(ctx context.Context, lab *vmlab.Lab, pictures Pictures, out io.Writer, say func(string)) error {
	accel, _, err := lab.Accel(ctx)
	if err != nil {
		return err
	}
	return boot(ctx, lab, 3, say, func(r *rig) error {
		say("fio, nvmetrace top and latency: half a minute")
		if err := r.kernelQueues(ctx, out, pictures.Heat); err != nil {
			return fmt.Errorf("nvmetrace top and latency: %w", err)
		}
		say("hostmed and two guests of its, nvmetrace path")
		if err := r.path(ctx, out, pictures.Path, doorbells.Poll(accel)); err != nil {
			return fmt.Errorf("nvmetrace path: %w", err)
		}
		return nil
	})
}

// show prints a command and what it printed.
func show(out io.Writer, command, text string) error {
	_, err := fmt.Fprintf(out, "$ %s\n%s\n\n", command, strings.TrimRight(text, "\n"))
	return err
}

// kernelQueues has steady reads, beside which large writes come in bursts.
func (r *rig) kernelQueues(ctx context.Context, out io.Writer, picture string) error {
	const top, latency = "nvmetrace top --interval 3s --duration 6s", "nvmetrace latency --duration 24s --step 400ms --plot "
	const mark = "=== latency"
	file := "/tmp/heat" + filepath.Ext(picture)
	printed, err := r.exec(ctx, 3*time.Minute, fmt.Sprintf(`fio --ioengine=libaio --direct=1 --time_based --runtime=40 --filename=%s --output=/tmp/fio.json --output-format=json \
	--name=reads --rw=randread --bs=4k --iodepth=2 \
	--name=bursts --rw=randwrite --bs=32k --iodepth=8 --thinktime=3s --thinktime_blocks=600 & fio=$!
sleep 2
%s%s >/tmp/latency 2>/tmp/err & latency=$!
sleep 2
%s || exit 1
wait $latency || { cat /tmp/err >&2; exit 1; }
echo '%s'
cat /tmp/latency
kill $fio; wait $fio; true`, r.disks[0], latency, file, top, mark))
	if err != nil {
		return err
	}
	tops, latencies, _ := strings.Cut(printed, mark+"\n")
	if err := show(out, top, tops); err != nil {
		return err
	}
	if err := show(out, latency+filepath.Base(picture), latencies); err != nil {
		return err
	}
	return r.take(ctx, file, picture)
}

// path has hostmed serve a disk by each of two backends, and a guest for each.
func (r *rig) path(ctx context.Context, out io.Writer, picture string, poll time.Duration) error {
	const path = "nvmetrace path --control /tmp/control --plot "
	// The guests take turns, so that what else the machine does falls on both.
	var guests, benches strings.Builder
	for turn := range 4 {
		for i := range 2 {
			record := fmt.Sprintf("/dev/shm/guest%d.%d", i, turn)
			guests.WriteString(" --guest " + record)
			fmt.Fprintf(&benches, "guestdrv bench vfio-user:/tmp/%d.sock --events %s --rw randread --bs 4k --qd 1 --jobs 1 --runtime 2s >/tmp/bench 2>&1 || { cat /tmp/bench >&2; exit 1; }\n", i, record)
		}
	}
	file := "/tmp/path" + filepath.Ext(picture)
	char := strings.Replace(r.disks[1], "/dev/nvme", "/dev/ng", 1)
	config := fmt.Sprintf("control = \"/tmp/control\"\npoll = %q\n", poll)
	for i, spec := range []string{"nvme:" + char, "block:" + r.disks[2]} {
		config += fmt.Sprintf("[[subsystem]]\n[[subsystem.controller]]\nsocket = \"/tmp/%d.sock\"\n[[subsystem.namespace]]\nspec = %q\n", i, spec)
	}
	if err := r.vm.WriteFile(ctx, "/tmp/hostmed.toml", []byte(config), 0o600); err != nil {
		return err
	}
	printed, err := r.exec(ctx, 3*time.Minute, fmt.Sprintf(`setsid hostmed serve --config /tmp/hostmed.toml >/tmp/hostmed.log 2>&1 </dev/null & hostmed=$!
until [ -S /tmp/control ] && [ -S /tmp/1.sock ]; do kill -0 $hostmed || { cat /tmp/hostmed.log >&2; exit 1; }; sleep 0.05; done
%s%s%s >/tmp/out 2>/tmp/err & path=$!
until grep -q following /tmp/err; do kill -0 $path || { cat /tmp/err >&2; exit 1; }; sleep 0.05; done
%skill -INT $path; wait $path || { cat /tmp/err >&2; exit 1; }
cat /tmp/out
kill $hostmed; wait $hostmed; true`, path, file, guests.String(), benches.String()))
	if err != nil {
		return err
	}
	if err := show(out, path+filepath.Base(picture)+" --guest /dev/shm/guest0.0 --guest …", printed); err != nil {
		return err
	}
	return r.take(ctx, file, picture)
}

// take copies a file out of the guest.
func (r *rig) take(ctx context.Context, from, to string) error {
	b, err := r.vm.ReadFile(ctx, from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}
