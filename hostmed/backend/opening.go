package backend

import (
	"errors"
	"fmt"
	"time"
)

// Opening is a medium that is being opened. A device that died early keeps who opens it for as long as the kernel tries to reset what does not answer, a
// minute and more, in system calls that nothing ends: so they are made in a goroutine, and who cannot wait goes on without the medium.
type Opening struct {
	spec Spec
	done chan struct{} // closed when the rest is there
	b    Backend
	err  error
}

// ErrSlow says that a medium is not open yet.
var ErrSlow = errors.New("the medium is not open yet")

// Begin begins to open what s describes, by open, which is OpenSpec but for tests. What comes of it must be taken, by Within or Result.
func Begin(s Spec, open func(Spec) (Backend, error)) *Opening {
	o := &Opening{spec: s, done: make(chan struct{})}
	run := func() {
		defer close(o.done)
		o.b, o.err = open(s)
	}
	if s.Kind == KindNull || s.Kind == KindMem {
		run()
	} else {
		go run()
	}
	return o
}

// Within returns what has come of o. After patience it is an error that wraps ErrSlow, names the medium and says what it waits for; then there will be a result
// later.
func (o *Opening) Within(patience time.Duration) (Backend, error) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-o.done:
		return o.b, o.err
	case <-timer.C:
	}
	select {
	case <-o.done:
		return o.b, o.err
	default:
		return nil, fmt.Errorf("namespace %s: %w after %v: %s", o.spec, ErrSlow, patience, o.waitsFor())
	}
}

// Result waits for what comes of o.
func (o *Opening) Result() (Backend, error) {
	<-o.done
	return o.b, o.err
}

// waitsFor is what keeps an open, by what there is to wait for in it.
func (o *Opening) waitsFor() string {
	switch o.spec.Kind {
	case KindVFIO:
		return "it waits for the kernel, which resets the function before it hands it out and goes on for a minute if that does not answer, or for the controller to become ready (dmesg)"
	case KindNVMe:
		return "it waits for the device's answer to Identify and a read, or for the kernel's driver, which is resetting it (cat /sys/class/nvme/*/state, dmesg)"
	case KindBlock:
		return "it waits for the device, of which the kernel reads the partition table (dmesg)"
	}
	return "it waits for the file system that the file is on (is it a network's whose server is away?)"
}
