package vmlab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/tools/vmlab/internal/wire"
)

// VM is a machine that runs, or has run.
type VM struct {
	lab     *Lab
	config  Config
	accel   string
	scratch *scratch
	proc    *child
	console *console
	qmp     *qmp
	agent   *client

	mu       sync.Mutex
	ports    [maxPorts + 1]bool // root ports in use; the last stands for none
	events   int                // QMP events that Event has seen
	bootTime time.Duration
}

// Result is what a command printed and how it ended.
type Result struct {
	Stdout, Stderr string
	Exit           int
}

// Start boots a machine and returns when its agent answers. The caller must Close it.
func (l *Lab) Start(ctx context.Context, c Config) (*VM, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	for tries := 1; ; tries++ {
		vm, err := l.start(ctx, c)
		if err == nil || tries == maxTries || !strings.Contains(err.Error(), stalePatch) {
			return vm, err
		}
		fmt.Fprintln(l.log, "vmlab: the emulator has run code that the guest's kernel had just changed, and it died of that: booting once more")
	}
}

// A kernel changes its own code while it boots, with a breakpoint in it as long as that takes. QEMU 11.1 with a thread for each virtual
// CPU sometimes runs the breakpoint when it is gone already: once in some tens of boots on a busy machine.
const (
	stalePatch = "Oops: int3"
	maxTries   = 3
)

func (l *Lab) start(ctx context.Context, c Config) (_ *VM, err error) {
	accel, _, err := l.Accel(ctx)
	if err != nil {
		return nil, err
	}
	vm := &VM{lab: l, config: c, accel: accel, console: &console{}}
	if vm.scratch, err = newScratch(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			vm.Close()
		}
	}()
	if err := l.prepare(ctx, &c, vm.scratch.path); err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := vm.launch(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Within)
	defer cancel()
	if _, err := vm.qmp.do(ctx, "qmp_capabilities", nil); err != nil {
		return nil, vm.explain(err)
	}
	// QEMU has it in memory by now, and it is large should nobody be left to remove it.
	if err := os.Remove(vm.scratch.file(initrdFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if !c.NoAgent {
		if err := vm.agent.started(ctx, 1); err != nil {
			return nil, vm.explain(fmt.Errorf("the guest's agent did not answer: %w", err))
		}
	}
	vm.bootTime = time.Since(begin)
	return vm, nil
}

// launch starts QEMU with two socket pairs, for QMP and for the agent: nothing is left in the file system.
func (vm *VM) launch() error {
	args, err := vm.config.arguments(vm.lab, vm.accel, vm.scratch.path)
	if err != nil {
		return err
	}
	qmpConn, qmpFile, err := socketPair("qmp")
	if err != nil {
		return err
	}
	defer qmpFile.Close()
	agentConn, agentFile, err := socketPair("agent")
	if err != nil {
		qmpConn.Close()
		return err
	}
	defer agentFile.Close()
	vm.qmp, vm.agent = newQMP(qmpConn), newClient(agentConn)
	args = append(args,
		"-serial", "stdio",
		"-chardev", "socket,id=qmp,fd=3", "-object", "monitor-qmp,id=monitor,chardev=qmp",
		"-device", fmt.Sprintf("virtio-serial-pci,addr=%#x", agentSlot), "-chardev", "socket,id=agent,fd=4", "-device", "virtserialport,chardev=agent,name="+wire.Port)
	cmd := program(vm.lab.root(), "qemu-system-x86_64", args...)
	cmd.Dir = vm.scratch.path
	cmd.Stdout, cmd.Stderr = vm.console, vm.console
	cmd.ExtraFiles = []*os.File{qmpFile, agentFile}
	vm.proc, err = start(cmd)
	return err
}

// socketPair returns a connection and, for a child, the file of its other end.
func socketPair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}

// Exec runs a shell command in the guest. It is killed at the deadline of ctx, or after a minute.
// Exit codes other than 0 are no error.
func (vm *VM) Exec(ctx context.Context, command string) (Result, error) {
	return vm.ExecInput(ctx, command, nil)
}

// ExecInput is Exec with standard input.
func (vm *VM) ExecInput(ctx context.Context, command string, stdin []byte) (Result, error) {
	limit := time.Minute
	if d, ok := ctx.Deadline(); ok {
		limit = time.Until(d)
		// The agent's own report of a command that is killed says more than ours.
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(context.WithoutCancel(ctx), d.Add(grace))
		defer cancel()
	}
	r, err := vm.agent.do(ctx, wire.Request{Op: "run", Command: command, Data: stdin, Limit: limit})
	res := Result{Stdout: string(r.Stdout), Stderr: string(r.Stderr), Exit: r.Exit}
	if err != nil {
		err = vm.explain(fmt.Errorf("guest: %s: %w", command, err))
		if tail := lastLines(res.Stdout+res.Stderr, 20); tail != "" {
			err = fmt.Errorf("%w\nthe command said:\n%s", err, tail)
		}
	}
	return res, err
}

// ReadFile returns a file of the guest, of up to some MiB.
func (vm *VM) ReadFile(ctx context.Context, path string) ([]byte, error) {
	r, err := vm.agent.do(ctx, wire.Request{Op: "read", Path: path, Limit: time.Minute})
	return r.Data, err
}

// WriteFile makes a file in the guest, with its directories.
func (vm *VM) WriteFile(ctx context.Context, path string, data []byte, mode os.FileMode) error {
	_, err := vm.agent.do(ctx, wire.Request{Op: "write", Path: path, Data: data, Mode: uint32(mode.Perm()), Limit: time.Minute})
	return err
}

// QMP runs a command of QEMU's and returns its result.
func (vm *VM) QMP(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := vm.qmp.do(ctx, command, arguments)
	if err != nil {
		err = vm.explain(err)
	}
	return out, err
}

// Event waits for QEMU's next event of that name, such as RESET: a minute at most unless ctx says otherwise.
func (vm *VM) Event(ctx context.Context, name string) (Event, error) {
	ctx, cancel := limited(ctx, time.Minute)
	defer cancel()
	vm.mu.Lock()
	from := vm.events
	vm.mu.Unlock()
	e, next, err := vm.qmp.event(ctx, name, from)
	vm.mu.Lock()
	vm.events = max(vm.events, next)
	vm.mu.Unlock()
	return e, err
}

// Restarted runs do, which makes the guest restart (Config.Reboot), and waits for its agent to come back.
func (vm *VM) Restarted(ctx context.Context, do func() error) error {
	n := vm.agent.startsSoFar()
	if err := do(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, vm.config.Within)
	defer cancel()
	if err := vm.agent.started(ctx, n+1); err != nil {
		return vm.explain(fmt.Errorf("the guest did not come back: %w", err))
	}
	return nil
}

// limited gives ctx a deadline if it has none.
func limited(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, d)
}

// BootTime is how long it took from the start of QEMU until the agent answered.
func (vm *VM) BootTime() time.Duration { return vm.bootTime }

// Accel is "kvm" or "tcg".
func (vm *VM) Accel() string { return vm.accel }

// PID is QEMU's.
func (vm *VM) PID() int { return vm.proc.cmd.Process.Pid }

// Console returns what the machine and QEMU printed so far.
func (vm *VM) Console() string { return vm.console.String() }

// Ended tells whether QEMU has ended.
func (vm *VM) Ended() bool {
	select {
	case <-vm.proc.done:
		return true
	default:
		return false
	}
}

// Wait waits until QEMU has ended, a minute at most unless ctx says otherwise, and returns how.
func (vm *VM) Wait(ctx context.Context) error {
	ctx, cancel := limited(ctx, time.Minute)
	defer cancel()
	select {
	case <-vm.proc.done:
		if vm.proc.err != nil {
			return vm.explain(fmt.Errorf("QEMU: %w", vm.proc.err))
		}
		return nil
	case <-ctx.Done():
		return vm.explain(fmt.Errorf("QEMU has not ended: %w", ctx.Err()))
	}
}

// Poweroff makes the guest write back its caches and switch itself off, which shuts its devices down, and waits for the end of QEMU. Its services
// are not asked: where there is systemd, run systemctl poweroff and Wait.
func (vm *VM) Poweroff(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := vm.agent.do(ctx, wire.Request{Op: "poweroff", Limit: time.Minute}); !errors.Is(err, errEnded) {
		return vm.explain(fmt.Errorf("power off: %w", err))
	}
	return vm.Wait(ctx)
}

// Kill ends QEMU with SIGKILL: a machine that loses power.
func (vm *VM) Kill() {
	vm.proc.kill()
	<-vm.proc.done
}

// Close kills what still runs and removes the machine's directory.
func (vm *VM) Close() error {
	if vm.proc != nil {
		vm.Kill()
	}
	if vm.qmp != nil {
		vm.qmp.conn.Close()
		vm.agent.conn.Close()
	}
	return vm.scratch.remove()
}

const tailLines = 60

// explain adds what is known to an error: how QEMU ended, and the end of the console.
func (vm *VM) explain(err error) error {
	if vm.proc != nil {
		select {
		case <-vm.proc.done:
			if vm.proc.err != nil {
				err = fmt.Errorf("%w; QEMU: %w", err, vm.proc.err)
			} else {
				err = fmt.Errorf("%w; QEMU has ended", err)
			}
		case <-time.After(100 * time.Millisecond): // its connections end a little before it does
		}
	}
	if tail := lastLines(vm.Console(), tailLines); tail != "" {
		return fmt.Errorf("%w\nend of the console:\n%s", err, tail)
	}
	return fmt.Errorf("%w; the console is empty", err)
}

// console keeps what is printed, up to a limit: the newest.
type console struct {
	mu   sync.Mutex
	text []byte
}

const consoleLimit = 4 << 20

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.text = append(c.text, b...); len(c.text) > consoleLimit {
		c.text = bytes.Clone(c.text[len(c.text)-consoleLimit/2:])
	}
	return len(b), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.ReplaceAll(string(c.text), "\r", "")
}

// prepare makes the files of a machine: its initramfs and its flash.
func (l *Lab) prepare(ctx context.Context, c *Config, dir string) error {
	if c.Firmware == OVMF {
		b, err := os.ReadFile(filepath.Join(l.root(), "usr/share/OVMF/OVMF_VARS_4M.fd"))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, flashFile), b, 0o600); err != nil {
			return err
		}
	}
	if c.Boot != Direct {
		return nil
	}
	f, err := os.Create(filepath.Join(dir, initrdFile))
	if err != nil {
		return err
	}
	defer f.Close()
	if c.Initramfs != nil {
		return errors.Join(c.Initramfs.write(ctx, l, f), f.Close())
	}
	base := []string{filepath.Join(l.dir, "initramfs")}
	if c.Kernel == Backports {
		base = append(base, filepath.Join(l.kernelDir(c.Kernel), moduleArchive))
	}
	for _, name := range base {
		if err := appendFile(f, name); err != nil {
			return err
		}
	}
	a := newArchive(f)
	for _, d := range []string{"usr", "usr/bin", "usr/sbin", "etc", "root"} {
		a.dirs[d] = true
	}
	for _, p := range append([]string{"vmlab/agent"}, c.Programs...) {
		bin, err := buildProgram(ctx, p)
		if err != nil {
			return err
		}
		if err := a.content("usr/bin/"+strings.ReplaceAll(p, "/", "-"), cpio.TypeReg|0o755, bin); err != nil {
			return err
		}
	}
	for to, from := range c.Files {
		if err := a.file(strings.TrimPrefix(to, "/"), from); err != nil {
			return err
		}
	}
	return errors.Join(a.w.Close(), f.Close())
}

func appendFile(w io.Writer, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// built has the programs that this process has built so far.
var built struct {
	sync.Mutex
	programs map[string][]byte
}

// buildProgram builds a program of tools/, static, once per process.
func buildProgram(ctx context.Context, name string) ([]byte, error) {
	built.Lock()
	defer built.Unlock()
	if b := built.programs[name]; b != nil {
		return b, nil
	}
	tmp, err := newScratch()
	if err != nil {
		return nil, err
	}
	defer tmp.remove()
	out := tmp.file("program")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, "github.com/shadowbell/shadowbell/tools/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, err := command(ctx, cmd); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	if built.programs == nil {
		built.programs = map[string][]byte{}
	}
	built.programs[name] = b
	return b, nil
}

func (l *Lab) root() string { return filepath.Join(l.dir, "root") }
