package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	readyWithin = 10 * time.Second
	stopWithin  = 10 * time.Second
	tailLines   = 20
)

// Daemon is a `hostmed serve` or a `guestdrv serve` that runs as a process of its own.
type Daemon struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	err  error         // of Wait; valid after done

	mu   sync.Mutex
	tail []string // last lines of its log
	log  io.Writer
}

// StartHostmed starts bin with "serve" and args and returns when it listens on all of its sockets, or with the last
// thing it said. The process is killed if this one is. log, which may be nil, gets its log too.
func StartHostmed(ctx context.Context, bin string, log io.Writer, args ...string) (*Daemon, error) {
	sockets := 0
	for i, a := range args {
		if a == "--socket" || strings.HasPrefix(a, "--socket=") {
			sockets++
		}
		if a == "--config" && i+1 < len(args) {
			doc, err := os.ReadFile(args[i+1])
			if err != nil {
				return nil, err
			}
			sockets += strings.Count(string(doc), "[[subsystem.controller]]")
		}
	}
	return start(ctx, "hostmed", bin, log, sockets, args)
}

// StartGuestdrv is StartHostmed for the other program, with --nbd or --ublk among args: one of them, since it returns when one server listens.
func StartGuestdrv(ctx context.Context, bin string, log io.Writer, args ...string) (*Daemon, error) {
	return start(ctx, "guestdrv", bin, log, 1, append(args, "--verbose"))
}

func start(ctx context.Context, name, bin string, log io.Writer, sockets int, args []string) (*Daemon, error) {
	d := &Daemon{name: name, cmd: exec.Command(bin, append([]string{"serve"}, args...)...), done: make(chan struct{}), log: log}
	// A group of its own: Ctrl-C is for the tool, which then ends its daemon in order.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	stderr, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	started, ready := make(chan error), make(chan struct{})
	go d.run(stderr, sockets, started, ready)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", bin, err)
	}
	select {
	case <-ready:
		return d, nil
	case <-d.done:
		return nil, fmt.Errorf("%s did not start: %s", name, d.lastWords())
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(readyWithin):
		err = fmt.Errorf("%s does not listen after %v: %s", name, readyWithin, d.lastWords())
	}
	return nil, errors.Join(err, d.Stop())
}

// run starts the process and stays until it has ended, on one thread: the death signal comes
// with the end of the thread that started it.
func (d *Daemon) run(stderr io.Reader, sockets int, started chan<- error, ready chan<- struct{}) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := d.cmd.Start(); err != nil {
		started <- err
		return
	}
	started <- nil
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		d.said(lines.Text())
		if sockets > 0 && strings.Contains(lines.Text(), "listening") {
			if sockets--; sockets == 0 {
				close(ready)
			}
		}
	}
	_, _ = io.Copy(io.Discard, stderr) // a line too long for the scanner must not block the process
	d.err = d.cmd.Wait()
	close(d.done)
}

func (d *Daemon) said(line string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tail = append(d.tail, line); len(d.tail) > tailLines {
		d.tail = d.tail[1:]
	}
	if d.log != nil {
		fmt.Fprintln(d.log, line)
	}
}

func (d *Daemon) lastWords() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.tail) == 0 {
		return "it said nothing"
	}
	return d.tail[len(d.tail)-1]
}

// PID returns the process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Log returns the last lines that the process logged.
func (d *Daemon) Log() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.tail, "\n")
}

// Stop ends the process with SIGTERM and waits for it. An exit status other than 0 is an error, with what was logged last.
func (d *Daemon) Stop() error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended
	select {
	case <-d.done:
	case <-time.After(stopWithin):
		_ = d.cmd.Process.Kill()
		<-d.done
		return fmt.Errorf("%s (pid %d) did not end within %v of SIGTERM and was killed: %s", d.name, d.PID(), stopWithin, d.lastWords())
	}
	if d.err != nil {
		return fmt.Errorf("%s (pid %d): %w: %s", d.name, d.PID(), d.err, d.lastWords())
	}
	return nil
}

// Binary returns the path of the program name of this module: in dir if dir is not empty, otherwise built into tmp.
func Binary(ctx context.Context, name, dir, tmp string) (string, error) {
	if dir != "" {
		p, err := filepath.Abs(filepath.Join(dir, name))
		if err == nil {
			_, err = os.Stat(p)
		}
		if err != nil {
			return "", fmt.Errorf("%w; build it with: make build", err)
		}
		return p, nil
	}
	out := filepath.Join(tmp, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", out, "github.com/shadowbell/shadowbell/tools/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build of %s: %w: %s", name, err, bytes.TrimSpace(msg))
	}
	return out, nil
}
