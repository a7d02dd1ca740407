package vmlab

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/term"
)

// Dir is where the lab is.
func (l *Lab) Dir() string { return l.dir }

// QEMU is the command that QEMU runs by, before its arguments.
func (l *Lab) QEMU() []string { return program(l.root(), "qemu-system-x86_64").Args }

const motd = `
This is a stock kernel of Debian's; the disk is hostmed's. Try

  nvme list
  nvme id-ctrl /dev/nvme0 | less
  fio --name=v --filename=/dev/nvme0n1 --rw=randwrite --bs=4k --size=16M --iodepth=32 --ioengine=io_uring --direct=1 --verify=crc32c
  mkfs.ext4 -q /dev/nvme0n1 && mount /dev/nvme0n1 /mnt && df -h /mnt

poweroff -f, the end of this shell, or Ctrl-A X end the machine.

`

// Shell boots a machine whose console is the terminal, with a shell on it, and returns when the machine has ended.
func (l *Lab) Shell(ctx context.Context, c Config, stdout, stderr *os.File) error {
	c.Append += " vmlab=shell"
	if err := c.check(); err != nil {
		return err
	}
	accel, _, err := l.Accel(ctx)
	if err != nil {
		return err
	}
	s, err := newScratch()
	if err != nil {
		return err
	}
	defer s.remove()
	dir, text := s.path, s.file("motd")
	if err := os.WriteFile(text, []byte(motd), 0o644); err != nil {
		return err
	}
	c.Files = map[string]string{"/etc/motd": text}
	if err := l.prepare(ctx, &c, dir); err != nil {
		return err
	}
	args, err := c.arguments(l, accel, dir)
	if err != nil {
		return err
	}
	cmd := program(l.root(), "qemu-system-x86_64", append(args, "-serial", "mon:stdio")...)
	cmd.Dir = dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, stdout, stderr
	// In the terminal's foreground group, or it could not read from it.
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if fd := int(os.Stdin.Fd()); term.IsTerminal(fd) {
		state, err := term.GetState(fd)
		if err != nil {
			return err
		}
		defer func() { _ = term.Restore(fd, state) }() // QEMU does, unless it is killed
	}
	fmt.Fprintf(stderr, "vmlab: booting %s with %s\n", c.Machine, accel)
	p, err := start(cmd)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		p.kill()
		<-p.done
		return ctx.Err()
	}
}
