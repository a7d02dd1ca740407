package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

const (
	largeEnough = 10 << 20 // bytes of the default file
	diskSpace   = 1 << 30  // bytes of the sparse file, at least
	fileNSID    = "1"
	nullNSID    = "2"
)

// demo is one run and all that it has to take away again.
type demo struct {
	g    *grammar
	out  *cli.Output
	line *text.Line
	dir  string

	hostmed, guestdrv string
	file              string
	fileSize          int64
	daemons           []*process.Daemon
	device            string // of the daemon with shadow doorbells
	rows              []row
}

// row is one line of the table.
type row struct {
	doorbells string
	result    load.Result
}

func newDemo(ctx context.Context, g *grammar, out *cli.Output) (_ *demo, err error) {
	d := &demo{g: g, out: out, line: text.NewLine(out.Stderr, 0)}
	if d.dir, err = os.MkdirTemp("", "shadowbell-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.cleanUp(&err)
		}
	}()
	for name, to := range map[string]*string{"hostmed": &d.hostmed, "guestdrv": &d.guestdrv} {
		if *to, err = process.Binary(ctx, name, g.Bin, d.dir); err != nil {
			return nil, err
		}
	}
	if d.file = g.File; d.file == "" {
		if d.file, err = fileAtHand(ctx, d.guestdrv, d.hostmed); err != nil {
			return nil, err
		}
	}
	st, err := os.Stat(d.file)
	switch {
	case err != nil:
		return nil, cli.UsageError{Err: fmt.Errorf("the file to store: %w", err)}
	case !st.Mode().IsRegular():
		return nil, cli.Usagef("the file to store: %s is not a regular file", d.file)
	}
	d.fileSize = st.Size()
	return d, nil
}

// fileAtHand returns the first of some programs that is large enough.
func fileAtHand(ctx context.Context, programs ...string) (string, error) {
	if root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output(); err == nil {
		tools, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(root)), "pkg", "tool", "*", "*"))
		if err != nil {
			return "", err
		}
		programs = append(append(programs, filepath.Join(strings.TrimSpace(string(root)), "bin", "go")), tools...)
	}
	if self, err := os.Executable(); err == nil {
		programs = append(programs, self)
	}
	for _, p := range programs {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Size() > largeEnough {
			return p, nil
		}
	}
	return "", cli.Usagef("no program of more than %v is at hand to be stored: name a file, FILE=…", size.Bytes(largeEnough))
}

// cleanUp ends the daemons and removes the directory, whatever happened before.
func (d *demo) cleanUp(err *error) {
	d.line.Clear()
	for _, h := range d.daemons {
		*err = errors.Join(*err, h.Stop())
	}
	d.daemons = nil
	*err = errors.Join(*err, os.RemoveAll(d.dir))
}

func (d *demo) say(what, format string, args ...any) {
	d.line.Clear()
	fmt.Fprintf(d.out.Stdout, "  %-9s %s\n", what, fmt.Sprintf(format, args...))
}

// serve starts a hostmed of its own for each doorbell mode.
func (d *demo) serve(ctx context.Context, doorbells string, namespaces ...string) (*process.Daemon, string, error) {
	socket := filepath.Join(d.dir, doorbells+".sock")
	args := []string{"--socket", socket, "--doorbells", doorbells}
	for _, n := range namespaces {
		args = append(args, "--namespace", n)
	}
	h, err := process.StartHostmed(ctx, d.hostmed, nil, args...)
	if err != nil {
		return nil, "", err
	}
	d.daemons = append(d.daemons, h)
	return h, "vfio-user:" + socket, nil
}

func (d *demo) start(ctx context.Context) error {
	fmt.Fprintf(d.out.Stdout, "shadowbell: a driver in a sandbox and a mediator, with a doorbell page between them\n\n")
	space := max(diskSpace, size.Bytes(d.fileSize+1<<20)&^(1<<20-1))
	h, device, err := d.serve(ctx, "shadow",
		fmt.Sprintf("file:%s,size=%d", strings.ReplaceAll(filepath.Join(d.dir, "disk.img"), ",", ",,"), space), "null:size=1GiB")
	if err != nil {
		return err
	}
	d.device = device
	d.say("hostmed", "pid %d: a sparse file of %v and a null device on one controller", h.PID(), space)
	return nil
}

// guest runs guestdrv and returns what it printed. Ctrl-C reaches it as SIGTERM from here.
func (d *demo) guest(ctx context.Context, args ...string) (stdout, stderr []byte, err error) {
	cmd := exec.CommandContext(ctx, d.guestdrv, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Run(); err != nil {
		return nil, nil, fmt.Errorf("guestdrv %s: %w: %s", args[0], err, lastLine(e.String()))
	}
	return o.Bytes(), e.Bytes(), nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func (d *demo) storeAndReadBack(ctx context.Context) error {
	d.line.Set("storing " + d.file)
	begin := time.Now()
	_, report, err := d.guest(ctx, "write", d.device, "--nsid", fileNSID, "--file", d.file, "--sandbox-report")
	if err != nil {
		return err
	}
	locked, missing := sandboxLines(string(report))
	d.say("guestdrv", "locked up by %s", strings.Join(locked, ", "))
	for _, m := range missing {
		d.say("", "without %s", m)
	}
	d.say("store", "%s, %s, in %s", d.file, size.Bytes(d.fileSize).Human(), text.Duration(time.Since(begin)))

	back := filepath.Join(d.dir, "back")
	begin = time.Now()
	if _, _, err := d.guest(ctx, "read", d.device, "--nsid", fileNSID, "--length", fmt.Sprint(d.fileSize), "--file", back); err != nil {
		return err
	}
	took := time.Since(begin)
	want, err := hashFile(d.file)
	if err != nil {
		return err
	}
	got, err := hashFile(back)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("what was read back is not what was stored: sha256 %x, not %x", got, want)
	}
	d.say("read", "%s in %s; sha256 %x… is the same", size.Bytes(d.fileSize).Human(), text.Duration(took), want[:8])
	return nil
}

// sandboxLines sorts the sandbox's report, one line for each layer.
func sandboxLines(report string) (locked, missing []string) {
	for line := range strings.Lines(report) {
		layer, state, ok := strings.Cut(strings.TrimSpace(line), ": ")
		switch {
		case !ok || layer == "guestdrv":
		case strings.HasPrefix(state, "NOT in force"):
			missing = append(missing, layer+strings.TrimPrefix(state, "NOT in force"))
		default:
			locked = append(locked, layer)
		}
	}
	return locked, missing
}

func hashFile(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// measure repeats the experiment of 2014: the same load with each doorbell a message, then with a shared page, and each time
// what both sides cost when the load has ended and they stay attached.
func (d *demo) measure(ctx context.Context) error {
	fmt.Fprintf(d.out.Stdout, "\n  The experiment of 2014: 4 KiB random read, queue depth 32, 4 jobs, null device, %v each\n\n", d.g.Runtime)
	for _, doorbells := range []string{"trap", "shadow"} {
		device, nsid := d.device, nullNSID
		if doorbells == "trap" {
			_, trapDevice, err := d.serve(ctx, doorbells, "null:size=1GiB")
			if err != nil {
				return err
			}
			device, nsid = trapDevice, "1"
		}
		d.line.Set(fmt.Sprintf("measuring with doorbells by %s, then idle, %v each", doorbells, d.g.Runtime))
		args := []string{"bench", device, "--nsid", nsid, "--rw", "randread", "--bs", "4k", "--qd", "32", "--jobs", "4",
			// As a block layer that knows of one request at a time: the driver of 2014 rang for each command.
			"--batch", "1",
			"--runtime", d.g.Runtime.String(), "--idle", d.g.Runtime.String(), "--json"}
		stdout, _, err := d.guest(ctx, args...)
		if err != nil {
			return err
		}
		r := row{doorbells: doorbells}
		if err := json.Unmarshal(stdout, &r.result); err != nil {
			return fmt.Errorf("guestdrv bench printed no result: %w", err)
		}
		d.rows = append(d.rows, r)
	}
	return nil
}

func (d *demo) show() error {
	d.line.Clear()
	_, err := fmt.Fprint(d.out.Stdout, table(d.rows)+"\n"+chart(d.rows, text.Width(d.out.Stdout), text.HasUnicode(d.out.Stdout)))
	return err
}
