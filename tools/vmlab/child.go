package vmlab

import (
	"context"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// child is a program in a process group of its own, which is killed when this process ends, however it ends.
type child struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; valid after done
}

func start(cmd *exec.Cmd) (*child, error) {
	p := &child{cmd: cmd, done: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	go func() {
		// The death signal comes with the end of the thread that started the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	return p, <-started
}

// kill ends the whole group at once.
func (p *child) kill() {
	if p.cmd.SysProcAttr.Setpgid {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
	_ = p.cmd.Process.Kill()
}

// Program returns the command of a program of the lab's packages, such as fio, qemu-img or nbdinfo, to run on this machine.
func (l *Lab) Program(name string, args ...string) *exec.Cmd { return program(l.root(), name, args...) }

// program returns the command of a program of the unpacked packages. It runs with their libraries on whatever the machine
// has: by their own dynamic linker, in no chroot.
func program(root, name string, args ...string) *exec.Cmd {
	path := filepath.Join(root, "usr/bin", name)
	if strings.Contains(name, "/") {
		path = filepath.Join(root, name)
	}
	lib := filepath.Join(root, libDir)
	libs := strings.Join([]string{lib, lib + "/systemd", lib + "/ceph"}, ":")
	return exec.Command(filepath.Join(lib, loader), append([]string{"--library-path", libs, "--argv0", name, path}, args...)...)
}

const (
	libDir = "usr/lib/x86_64-linux-gnu"
	loader = "ld-linux-x86-64.so.2"
)

// output runs a program of the unpacked packages to its end.
func output(ctx context.Context, root, name string, args ...string) (string, error) {
	return command(ctx, program(root, name, args...))
}

// lastLines returns the last n lines of s that are not empty, indented by nothing.
func lastLines(s string, n int) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines[max(len(lines)-n, 0):], "\n")
}
