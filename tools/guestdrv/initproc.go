package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device/pcifn"
)

// reaper is the duty of a first process: it waits for all children, its own and those that others have left.
type reaper struct {
	mu      sync.Mutex // held over a start, so that no end comes before it is waited for
	waiting map[int]chan syscall.WaitStatus
	some    chan struct{} // there may be children
}

func newReaper() *reaper {
	r := &reaper{waiting: map[int]chan syscall.WaitStatus{}, some: make(chan struct{}, 1)}
	go r.loop()
	return r
}

func (r *reaper) loop() {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			<-r.some // ECHILD: there is none; whose parent has died becomes ours only while there is one
		case ws.Exited() || ws.Signaled():
			r.mu.Lock()
			if c := r.waiting[pid]; c != nil {
				c <- ws
				delete(r.waiting, pid)
			}
			r.mu.Unlock()
		}
	}
}

// start starts a program and returns its process and where its end comes.
func (r *reaper) start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, err
	}
	ended := make(chan syscall.WaitStatus, 1)
	r.waiting[pid] = ended
	select {
	case r.some <- struct{}{}:
	default:
	}
	return pid, ended, nil
}

// killOthers signals every process but this one, the kernel's, and those of the server's session.
func killOthers(server int, signal syscall.Signal) {
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range names {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == 1 {
			continue
		}
		if _, err := os.Readlink(filepath.Join(dir, "exe")); err != nil {
			continue // the kernel's
		}
		if sid, err := unix.Getsid(pid); err == nil && sid == server {
			continue
		}
		_ = unix.Kill(pid, signal)
	}
}

// basics are what every program expects of a machine.
var basics = []struct{ source, target, fstype string }{
	{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"},
}

func mountBasics() error {
	for _, b := range basics {
		if err := os.MkdirAll(b.target, 0o755); err != nil {
			return err
		}
		// A kernel may have mounted /dev itself.
		if err := unix.Mount(b.source, b.target, b.fstype, unix.MS_NOSUID, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", b.target, err)
		}
	}
	return nil
}

// bindBasics shows them in root, where it has directories for them.
func bindBasics(root string) error {
	for _, b := range basics {
		target := filepath.Join(root, b.target)
		if st, err := os.Stat(target); err != nil || !st.IsDir() {
			continue
		}
		if err := unix.Mount(b.target, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("binding %s: %w", target, err)
		}
	}
	return nil
}

func unbindBasics(root string) {
	for _, b := range basics {
		_ = unix.Unmount(filepath.Join(root, b.target), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
}

func devNull() uintptr {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	return uintptr(fd)
}

// loadModule loads a kernel module. One that is there already is fine.
func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	const moduleInitCompressedFile = 4
	flags := 0
	if ext := filepath.Ext(name); ext != ".ko" {
		flags = moduleInitCompressedFile
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	switch {
	case err == nil || errors.Is(err, unix.EEXIST):
		return nil
	case flags != 0 && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)):
		return fmt.Errorf("module %s: %w; this kernel does not unpack it: put it into the initramfs unpacked", name, err)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("module %s: %w; it needs a module that is not loaded: name that before it", name, err)
	}
	return fmt.Errorf("module %s: %w", name, err)
}

// stopDMA takes the right to reach memory away from a function that is not behind an IOMMU.
func stopDMA(device string) error {
	scheme, address, _ := strings.Cut(device, ":")
	if scheme != "sysfs" && scheme != "pci" {
		return nil
	}
	return pcifn.StopDMA(address)
}

// kernelArgs makes guestdrv init's arguments from the kernel's command line: shadowbell.NAME=VALUE is --NAME=VALUE, shadowbell.NAME is --NAME, and
// what comes after -- is taken as it is. Quotes hold words together, as they do for the kernel.
func kernelArgs(line string) ([]string, error) {
	words, err := splitWords(strings.TrimSpace(line))
	if err != nil {
		return nil, err
	}
	var args []string
	for n, w := range words {
		if w == "--" {
			return append(args, words[n+1:]...), nil
		}
		if name, ok := strings.CutPrefix(w, kernelPrefix); ok {
			args = append(args, "--"+name)
		}
	}
	return args, nil
}

func splitWords(line string) (words []string, err error) {
	var word bytes.Buffer
	in, quoted := false, false
	for _, c := range []byte(line) {
		switch {
		case c == '"':
			in, quoted = true, !quoted
		case !quoted && (c == ' ' || c == '\t' || c == '\n'):
			if in {
				words = append(words, word.String())
				word.Reset()
			}
			in = false
		default:
			in = true
			word.WriteByte(c)
		}
	}
	if quoted {
		return nil, errors.New("a quote without its end")
	}
	if in {
		words = append(words, word.String())
	}
	return words, nil
}
