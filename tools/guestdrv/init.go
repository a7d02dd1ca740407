package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// initCmd is guestdrv as the first process of a microVM whose only disk it drives.
type initCmd struct {
	Device    string   `required:"" placeholder:"DEVICE" help:"The disk's controller, such as sysfs:0000:00:02.0."`
	Unbind    bool     `help:"Take the function from the kernel driver that has it. Without this a function with a driver is an error."`
	Module    []string `placeholder:"FILE" help:"Kernel modules to load, in this order: .ko, or packed as far as the kernel unpacks them itself. (default: all in /lib/modules/guestdrv, by name)"`
	HugePages int      `name:"hugepages" default:"-1" placeholder:"N" help:"Huge pages to reserve for DMA memory; -1: as many as it takes, if the device is not behind VFIO (${default})."`

	Queues int    `default:"0" placeholder:"N" help:"As for serve."`
	Depth  int    `default:"64" placeholder:"N" help:"As for serve."`
	NSID   uint32 `name:"nsid" default:"1" placeholder:"N" help:"The namespace (${default})."`

	Sandbox string `default:"on" enum:"on,off" placeholder:"on|off" help:"As for serve."`

	Root     string `default:"/disk" placeholder:"DIR" help:"Where the file system is mounted (${default})."`
	FSType   string `name:"fstype" default:"ext4" placeholder:"TYPE" help:"Its type (${default})."`
	ReadOnly bool   `help:"Mount it read-only."`
	Chroot   bool   `default:"true" negatable:"" help:"Run the program with the file system as its root (${default})."`

	AtEnd     string `default:"poweroff" enum:"poweroff,reboot,halt" placeholder:"WHAT" help:"After the program: poweroff, reboot or halt (${default}). Firecracker ends by reboot."`
	OnFailure string `default:"poweroff" placeholder:"WHAT" help:"After a failure: poweroff, reboot, halt, or a program to run, such as /bin/sh (${default})."`

	Program []string `arg:"" passthrough:"" help:"The program and its arguments."`
}

const (
	initProgram  = "init"
	moduleDir    = "/lib/modules/guestdrv"
	kernelPrefix = "shadowbell."
	diskWithin   = 90 * time.Second
	endWithin    = 30 * time.Second
	politeFor    = 2 * time.Second
	hugePageSize = 2 << 20
	// A server that ends by itself is started again, so often within so long.
	serverLives = 5
	serverSpan  = time.Minute
)

// isInit tells whether this process is the machine's first, started by the kernel under the name init.
func isInit() bool { return os.Getpid() == 1 && filepath.Base(os.Args[0]) == initProgram }

// runInit is main for the first process. It never returns: a kernel without one panics.
//
//	/proc, /sys, /dev; modules; the function; guestdrv serve --ublk, locked in its box, as a child; mount; the program;
//	unmount; SIGTERM for the server; power off
func runInit(p cli.Program, g *grammar) {
	out := &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}
	code := cli.Failure
	if err := mountBasics(); err != nil {
		fmt.Fprintf(os.Stderr, "guestdrv: init: %v\n", err)
	} else if line, err := os.ReadFile("/proc/cmdline"); err != nil {
		fmt.Fprintf(os.Stderr, "guestdrv: init: %v\n", err)
	} else if args, err := kernelArgs(string(line)); err != nil {
		fmt.Fprintf(os.Stderr, "guestdrv: init: kernel command line: %v\n", err)
	} else {
		code = p.Run(append([]string{initProgram}, args...), out)
	}
	end := g.Init.AtEnd
	if code != cli.OK {
		end = g.Init.OnFailure
	}
	finish(end)
}

// finish ends the machine.
func finish(how string) {
	unix.Sync()
	switch how {
	case "reboot":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "halt":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_HALT)
	case "", "poweroff":
	default:
		r := newReaper()
		if _, ended, err := r.start(how, []string{how}, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}}); err != nil {
			fmt.Fprintf(os.Stderr, "guestdrv: init: %s: %v\n", how, err)
		} else {
			<-ended
		}
		unix.Sync()
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // a machine that cannot switch itself off
	select {}
}

// Run is the life of the machine, from modules to the unmounted disk.
func (i *initCmd) Run(ctx context.Context, out *cli.Output) error {
	if os.Getpid() != 1 {
		return cli.Usagef("guestdrv init is the first process of a microVM: copy guestdrv to /init of an initramfs (docs/microvm.md)")
	}
	fmt.Fprintf(out.Stderr, "guestdrv: init: begins %.3f s after the kernel's start\n", sinceBoot().Seconds())
	// Ctrl-Alt-Del becomes a SIGINT, which is handed on like the others.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	if len(i.Module) == 0 {
		i.Module, _ = filepath.Glob(filepath.Join(moduleDir, "*.ko*"))
	}
	for _, m := range i.Module {
		if err := loadModule(m); err != nil {
			return err
		}
	}
	if err := i.takeDevice(); err != nil {
		return err
	}
	if err := i.reserveHugePages(); err != nil {
		return err
	}
	m := &machine{cmd: i, out: out, reaper: newReaper(), signals: make(chan os.Signal, 16)}
	signal.Notify(m.signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR)
	return m.run()
}

// takeDevice takes the function from its kernel driver if that was asked for.
func (i *initCmd) takeDevice() error {
	_, address, _ := strings.Cut(i.Device, ":")
	address, _, _ = strings.Cut(address, ",")
	if !i.Unbind {
		return nil
	}
	driver := pcifn.None
	if strings.HasPrefix(i.Device, "vfio:") {
		driver = pcifn.VFIO
	}
	return pcifn.Bind(address, driver)
}

// serveArgs is the command line of the server.
func (i *initCmd) serveArgs() []string {
	args := []string{"guestdrv", "serve", i.Device, "--ublk", "--id=0", "--keep", "--nsid=" + strconv.FormatUint(uint64(i.NSID), 10),
		"--queues=" + strconv.Itoa(i.Queues), "--depth=" + strconv.Itoa(i.Depth), "--sandbox=" + i.Sandbox}
	if i.ReadOnly {
		args = append(args, "--read-only")
	}
	return args
}

// reserveHugePages makes the pool that DMA memory without an IOMMU comes from.
func (i *initCmd) reserveHugePages() error {
	n := i.HugePages
	if n < 0 {
		if !strings.HasPrefix(i.Device, "sysfs:") && !strings.HasPrefix(i.Device, "pci:") {
			return nil
		}
		n = int((ublkDMA(ublkQueues(i.Queues), i.Depth, ublkDefaultIO)+hugePageSize-1)/hugePageSize) + 1
	}
	const pool = "/proc/sys/vm/nr_hugepages"
	if err := os.WriteFile(pool, []byte(strconv.Itoa(n)), 0o644); err != nil {
		return fmt.Errorf("reserving %d huge pages: %w", n, err)
	}
	got, err := os.ReadFile(pool)
	if err != nil {
		return err
	}
	if have, _ := strconv.Atoi(strings.TrimSpace(string(got))); have < n {
		return fmt.Errorf("%d of %d huge pages of 2 MiB could be had: give the machine more memory, or use less --queues or --depth", have, n)
	}
	return nil
}

// machine is what runs between the disk and the end.
type machine struct {
	cmd     *initCmd
	out     *cli.Output
	reaper  *reaper
	signals chan os.Signal

	server  int // its process
	ended   <-chan syscall.WaitStatus
	starts  []time.Time
	stopped bool
}

func (m *machine) run() (err error) {
	disk, err := m.startServer()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.stopServer()) }()
	if err := os.MkdirAll(m.cmd.Root, 0o755); err != nil {
		return err
	}
	flags := uintptr(0)
	if m.cmd.ReadOnly {
		flags = unix.MS_RDONLY
	}
	if err := unix.Mount(disk, m.cmd.Root, m.cmd.FSType, flags, ""); err != nil {
		return fmt.Errorf("mounting %s as %s: %w; its first blocks may hold another file system, or none", disk, m.cmd.FSType, err)
	}
	fmt.Fprintf(m.out.Stderr, "guestdrv: init: %s is mounted on %s, %.3f s after the kernel's start\n", disk, m.cmd.Root, sinceBoot().Seconds())
	err = m.runProgram()
	return errors.Join(err, m.unmount())
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

// startServer starts guestdrv serve and waits for the block device's name.
func (m *machine) startServer() (string, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	m.starts = append(m.starts, time.Now())
	pid, ended, err := m.reaper.start("/proc/self/exe", m.cmd.serveArgs(), &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{devNull(), w.Fd(), 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	w.Close()
	if err != nil {
		return "", fmt.Errorf("starting guestdrv serve: %w", err)
	}
	m.server, m.ended = pid, ended
	name := make(chan string, 1)
	go func() {
		s := bufio.NewScanner(r)
		if s.Scan() {
			name <- s.Text()
		}
		close(name)
		_, _ = io.Copy(io.Discard, r)
	}()
	select {
	case n, ok := <-name:
		if ok && strings.HasPrefix(n, "/dev/") {
			return n, nil
		}
	case <-time.After(diskWithin):
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	ws := <-m.ended
	return "", fmt.Errorf("guestdrv serve %s has made no block device: %s", m.cmd.Device, describe(ws))
}

// stopServer ends it in order.
func (m *machine) stopServer() error {
	m.stopped = true
	_ = unix.Kill(m.server, unix.SIGTERM)
	select {
	case ws := <-m.ended:
		if ws.Exited() && ws.ExitStatus() == 0 {
			return nil
		}
		return fmt.Errorf("guestdrv serve ended badly: %s", describe(ws))
	case <-time.After(endWithin):
		_ = unix.Kill(m.server, unix.SIGKILL)
		return fmt.Errorf("guestdrv serve has not ended within %v of SIGTERM", endWithin)
	}
}

// runProgram runs the program to its end. Signals for the machine are the program's; a server that dies is started again, and the program's
// requests wait for it.
func (m *machine) runProgram() error {
	attr := &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Dir: "/", Sys: &syscall.SysProcAttr{Setsid: true}}
	if m.cmd.Chroot {
		attr.Sys.Chroot = m.cmd.Root
		if err := bindBasics(m.cmd.Root); err != nil {
			return err
		}
	}
	name := m.cmd.Program[0]
	pid, ended, err := m.reaper.start(name, m.cmd.Program, attr)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for {
		select {
		case ws := <-ended:
			fmt.Fprintf(m.out.Stderr, "guestdrv: init: %s: %s, %.3f s after the kernel's start\n", name, describe(ws), sinceBoot().Seconds())
			if ws.Exited() && ws.ExitStatus() == 0 {
				return nil
			}
			return fmt.Errorf("%s: %s", name, describe(ws))
		case s := <-m.signals:
			if s == unix.SIGPWR {
				s = unix.SIGTERM
			}
			_ = unix.Kill(pid, s.(syscall.Signal))
		case ws := <-m.ended:
			fmt.Fprintf(m.out.Stderr, "guestdrv: init: guestdrv serve has ended: %s; starting it again\n", describe(ws))
			if err := m.restartServer(); err != nil {
				_ = unix.Kill(pid, unix.SIGKILL)
				return err
			}
		}
	}
}

// restartServer starts the server again, which takes the block device over.
func (m *machine) restartServer() error {
	if n := len(m.starts); n >= serverLives && time.Since(m.starts[n-serverLives]) < serverSpan {
		return fmt.Errorf("guestdrv serve has ended %d times within %v", serverLives, serverSpan)
	}
	// Without an IOMMU the function still has the dead process's memory. It lies in huge pages, which nobody but the server uses here.
	if err := stopDMA(m.cmd.Device); err != nil {
		return err
	}
	_, err := m.startServer()
	return err
}

// unmount ends what still uses the file system, and unmounts it.
func (m *machine) unmount() error {
	if m.cmd.Chroot {
		unbindBasics(m.cmd.Root)
	}
	unix.Sync() // also what a mount elsewhere would keep from being written now
	err := unix.Unmount(m.cmd.Root, 0)
	for _, signal := range []syscall.Signal{unix.SIGTERM, unix.SIGKILL} {
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		killOthers(m.server, signal)
		for deadline := time.Now().Add(politeFor); time.Now().Before(deadline) && errors.Is(err, unix.EBUSY); time.Sleep(10 * time.Millisecond) {
			err = unix.Unmount(m.cmd.Root, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("unmounting %s: %w", m.cmd.Root, err)
	}
	fmt.Fprintf(m.out.Stderr, "guestdrv: init: %s is unmounted\n", m.cmd.Root)
	return nil
}

func describe(ws syscall.WaitStatus) string {
	if ws.Signaled() {
		return fmt.Sprintf("killed by signal %d (%v)", int(ws.Signal()), ws.Signal())
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}
