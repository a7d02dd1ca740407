package faulty

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
)

// lines are the interrupts: the device signals eventfds of its own, and a goroutine hands each on.
type lines struct {
	from []int // the device's
	to   []int // duplicates of the driver's
	quit int   // an eventfd that ends the goroutine; valid if from is not empty
}

// Interrupts gives the driver eventfds that the wrapper signals in the device's place.
func (d *Device) Interrupts(n int) ([]int, error) {
	from, err := d.dev.Interrupts(n)
	if err != nil || n == 0 {
		return from, err
	}
	l := lines{from: from, quit: -1}
	driver, err := device.EventFDs(n, n, l.open)
	if err != nil {
		l.close()
		return nil, err
	}
	d.lines = l
	d.running.Go(d.forward)
	return driver, nil
}

// open makes what lines needs, beside the driver's eventfds.
func (l *lines) open(driver []int) (err error) {
	if l.quit, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	l.to, err = device.Duplicates(driver)
	return err
}

// forward hands interrupts on until stop.
func (d *Device) forward() {
	l := &d.lines
	polls := []unix.PollFd{{Fd: int32(l.quit), Events: unix.POLLIN}}
	for _, fd := range l.from {
		polls = append(polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	var count [8]byte
	for {
		if _, err := unix.Poll(polls, -1); err != nil && err != unix.EINTR {
			return
		}
		if polls[0].Revents != 0 {
			return
		}
		for i := range l.from {
			if polls[i+1].Revents == 0 {
				continue
			}
			if n, err := unix.Read(l.from[i], count[:]); n != 8 || err != nil {
				continue
			}
			if d.unplugged() {
				continue
			}
			if h := d.hook().Interrupt; h == nil || h(i) {
				one := [8]byte{1}
				_, _ = unix.Write(l.to[i], one[:]) // full: it is readable already
			}
		}
	}
}

func (l *lines) stop() {
	if len(l.from) > 0 {
		one := [8]byte{1}
		_, _ = unix.Write(l.quit, one[:])
	}
}

func (l *lines) close() {
	for _, list := range [][]int{l.from, l.to} {
		for _, fd := range list {
			unix.Close(fd)
		}
	}
	if len(l.from) > 0 && l.quit >= 0 {
		unix.Close(l.quit)
	}
	*l = lines{}
}
