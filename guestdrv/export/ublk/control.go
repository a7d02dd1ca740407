package ublk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/uring"
)

const (
	controlPath = "/dev/ublk-control"
	// commandWithin bounds a control command. Starting a device reads its partition table, stopping one writes back its caches.
	commandWithin = 2 * time.Minute
	// busyWithin is how long a device whose server has just died may take to be free.
	busyWithin = 15 * time.Second
	busyNap    = 20 * time.Millisecond
)

// Control is the control device, /dev/ublk-control. It keeps the credentials with which it was opened, so that a process which has given up its own can
// start and stop its device; what it can do with them is to send commands to that one file.
type Control struct {
	mu   sync.Mutex
	ring *uring.Ring
	cred uint16
	dead error // a command that never ended
}

// OpenControl opens it.
func OpenControl() (*Control, error) {
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("%s: %w; load the kernel's module: modprobe ublk_drv (CONFIG_BLK_DEV_UBLK, Linux 6.5)", controlPath, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w; it takes root", controlPath, err)
	}
	defer unix.Close(fd)
	r, err := uring.New(uring.Config{Entries: 4, SQE128: true, Disabled: true})
	if err != nil {
		return nil, err
	}
	c := &Control{ring: r}
	if c.cred, err = r.RegisterPersonality(); err == nil {
		err = restrict(r, []int{fd}, uring.OpURingCmd)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return c, nil
}

// restrict leaves ops on the files of fds, which it registers, and enables the ring.
func restrict(r *uring.Ring, fds []int, ops ...uint8) error {
	if err := r.RegisterFiles(fds); err != nil {
		return err
	}
	if err := r.Restrict(uring.Restrictions{Ops: ops, RegisteredFilesOnly: true}); err != nil {
		return err
	}
	if err := r.Enable(); err != nil {
		return err
	}
	return r.Restricted()
}

// FD returns the ring's descriptor, for a sandbox that lets io_uring_enter through.
func (c *Control) FD() int { return c.ring.FD() }

// Close closes it.
func (c *Control) Close() error { return c.ring.Close() }

// command executes a control command. buf is its argument, result, or both.
func (c *Control) command(op uint32, id uint32, data uint64, buf []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return c.dead
	}
	ended := make(chan error, 1)
	onThread(func() {
		ended <- c.execute(op, &ctrlCmd{id: id, len: uint16(len(buf)), addr: addressOf(buf), data: data})
	})
	err := <-ended
	runtime.KeepAlive(buf)
	if err != nil {
		return fmt.Errorf("ublk: %s: %w", commandName(op), err)
	}
	return nil
}

// onThread runs f on a thread that ends with it. The kernel executes control commands on worker threads, which it keeps, with the credentials of the
// day, for as long as the thread that submitted lives: a sandbox that drops privileges would find them.
func onThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		// Of all threads the first does not end. While this one has it, another goroutine cannot get it.
		done := make(chan struct{})
		onThread(func() { defer close(done); f() })
		<-done
		runtime.UnlockOSThread()
	}()
}

func (c *Control) execute(op uint32, cmd *ctrlCmd) error {
	s := c.ring.GetSQE()
	s.PrepCommand(0, op)
	s.Flags = uring.SQEFixedFile
	s.Personality = c.cred
	cmd.put(c.ring.Command(s))
	var out [1]uring.CQE
	for deadline := time.Now().Add(commandWithin); c.ring.Reap(out[:]) == 0; {
		if time.Now().After(deadline) {
			c.dead = fmt.Errorf("no end within %v: %w", commandWithin, os.ErrDeadlineExceeded)
			return c.dead
		}
		if _, err := c.ring.SubmitAndWaitFor(1, time.Second); err != nil {
			return err
		}
	}
	if errno := out[0].Errno(); errno != 0 {
		return errno
	}
	return nil
}

func commandName(op uint32) string {
	switch op {
	case cmdGetDevInfo:
		return "GET_DEV_INFO"
	case cmdAddDev:
		return "ADD_DEV"
	case cmdDelDev:
		return "DEL_DEV"
	case cmdStartDev:
		return "START_DEV"
	case cmdStopDev:
		return "STOP_DEV"
	case cmdSetParams:
		return "SET_PARAMS"
	case cmdGetParams:
		return "GET_PARAMS"
	case cmdStartRecovery:
		return "START_USER_RECOVERY"
	case cmdEndRecovery:
		return "END_USER_RECOVERY"
	case cmdGetFeatures:
		return "GET_FEATURES"
	case cmdDelDevAsync:
		return "DEL_DEV_ASYNC"
	case cmdUpdateSize:
		return "UPDATE_SIZE"
	}
	return fmt.Sprintf("command %#x", op)
}

// Features returns what the kernel's driver can do.
func (c *Control) Features() (Features, error) {
	var b [8]byte
	if err := c.command(cmdGetFeatures, anyID, 0, b[:]); err != nil {
		return 0, fmt.Errorf("%w; ublk is used from Linux 6.5 on", err)
	}
	return Features(le.Uint64(b[:])), nil
}

// Info returns what the kernel knows of device id. The error wraps ENODEV if there is none.
func (c *Control) Info(id uint32) (Info, error) {
	var b [devInfoSize]byte
	if err := c.command(cmdGetDevInfo, id, 0, b[:]); err != nil {
		return Info{}, fmt.Errorf("ublk device %d: %w", id, err)
	}
	return parseInfo(b[:]), nil
}

// Params returns what device id is like.
func (c *Control) Params(id uint32) (Params, error) {
	var b [paramsSize]byte
	le.PutUint32(b[:], paramsSize)
	if err := c.command(cmdGetParams, id, 0, b[:]); err != nil {
		return Params{}, fmt.Errorf("ublk device %d: %w", id, err)
	}
	return parseParams(b[:]), nil
}

// Delete stops device id, whoever serves it, and deletes it.
func (c *Control) Delete(id uint32) error {
	return errors.Join(c.stop(id), c.delete(id))
}

func (c *Control) stop(id uint32) error { return c.command(cmdStopDev, id, 0, nil) }

// delete does not wait until the last user of the block device has closed it, where the kernel lets us: that may be never.
func (c *Control) delete(id uint32) error {
	err := c.command(cmdDelDevAsync, id, 0, nil)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		err = c.command(cmdDelDev, id, 0, nil)
	}
	return err
}

// whileBusy repeats f for as long as the kernel is not yet done with what was before.
func whileBusy(f func() error) error {
	for deadline := time.Now().Add(busyWithin); ; time.Sleep(busyNap) {
		err := f()
		busy := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST)
		if !busy || time.Now().After(deadline) {
			return err
		}
	}
}
