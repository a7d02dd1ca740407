package admin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	allOnes32 = ^uint32(0)
	allOnes64 = ^uint64(0)

	// A look at CSTS waits this long before the next, at first and in the end.
	firstLook = 50 * time.Microsecond
	lastLook  = 10 * time.Millisecond

	// What a controller may ask for at shutdown, at the most. NVMe Base 2.0c 3.6: RTD3E can be over an hour.
	minShutdown = time.Second
	maxShutdown = 5 * time.Second

	// unsaidReady is in place of CAP.TO = 0.
	unsaidReady = 5 * time.Second
)

// ErrFatal says that the controller reports Controller Fatal Status.
var ErrFatal = errors.New("the controller reports a fatal error (CSTS.CFS)")

// errAllOnes is a device that is there and answers nothing: registers that read as all ones.
var errAllOnes = fmt.Errorf("%w: its registers read as all ones", device.ErrGone)

// errAllZeroes is a place where nothing is, as some virtual machines have it after an unplug. CAP of a controller is never zero.
var errAllZeroes = fmt.Errorf("%w: its registers read as zeroes", device.ErrGone)

// checkCAP tells a device from what is left when it has gone.
func checkCAP(v uint64) error {
	switch v {
	case allOnes64:
		return fmt.Errorf("CAP=%#x: %w", v, errAllOnes)
	case 0:
		return fmt.Errorf("CAP=%#x: %w", v, errAllZeroes)
	}
	return nil
}

// registerTimeout is a controller whose registers do not become what they should: both a timeout and a deadline.
type registerTimeout struct{ seen string }

func (e *registerTimeout) Error() string { return e.seen }

func (e *registerTimeout) Is(target error) bool {
	return target == queue.ErrTimeout || target == context.DeadlineExceeded
}

func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// readCapabilities reads CAP and VS and refuses what this driver cannot work with.
func (a *Admin) readCapabilities() error {
	v, err := a.dev.Read64(nvme.RegCAP)
	if err != nil {
		return err
	}
	if err := checkCAP(v); err != nil {
		return err
	}
	vs, err := a.dev.Read32(nvme.RegVS)
	if err != nil {
		return err
	}
	a.cap, a.vs = nvme.CAP(v), nvme.Version(vs)
	switch {
	case a.cap.CSS()&(nvme.CAPCSSNVM|nvme.CAPCSSIOCS) == 0:
		return fmt.Errorf("the controller has no NVM command set: %v", a.cap)
	case a.cap.MPSMIN() != 0:
		return fmt.Errorf("the controller's smallest memory page is %d bytes, this driver's is %d: %v", 4096<<a.cap.MPSMIN(), pageSize, a.cap)
	case a.cap.MQES().Count() < 2:
		return fmt.Errorf("the controller's queues have one entry: %v", a.cap)
	}
	return nil
}

// disable brings the controller to CSTS.RDY = 0, whoever used it before. NVMe Base 2.0c 3.5.1.
func (a *Admin) disable(ctx context.Context) error {
	cc, err := a.config()
	if err != nil {
		return err
	}
	if cc.EN() {
		// A controller that is just becoming ready must get there first.
		csts, err := a.status()
		if err != nil {
			return err
		}
		if !csts.RDY() && !csts.CFS() && csts.SHST() == nvme.SHSTNormal {
			_ = a.waitStatus(ctx, "ready", a.readyLimit(), func(s nvme.CSTS) bool { return s.RDY() || s.CFS() })
		}
	}
	return a.clearEnable(ctx, cc, a.readyLimit())
}

// clearEnable sets CC.EN to 0 and waits for CSTS.RDY to follow.
func (a *Admin) clearEnable(ctx context.Context, cc nvme.CC, limit time.Duration) error {
	if cc.EN() {
		cc = cc.WithEN(false).WithSHN(nvme.SHNNone)
		if err := a.dev.Write32(nvme.RegCC, uint32(cc)); err != nil {
			return err
		}
	}
	return a.waitStatus(ctx, "disabled", limit, func(s nvme.CSTS) bool { return !s.RDY() })
}

// readyLimit is how long CSTS.RDY may take to follow CC.EN. A controller with CAP.TO = 0 has not said.
func (a *Admin) readyLimit() time.Duration {
	if a.cap.TO() == 0 {
		return unsaidReady
	}
	return a.cap.Timeout()
}

// config reads CC.
func (a *Admin) config() (nvme.CC, error) {
	v, err := a.dev.Read32(nvme.RegCC)
	if err != nil {
		return 0, err
	}
	if v == allOnes32 {
		return 0, fmt.Errorf("CC=%#x: %w", v, errAllOnes)
	}
	return nvme.CC(v), nil
}

// enable writes the admin queue's place and CC, and waits for CSTS.RDY = 1.
func (a *Admin) enable(ctx context.Context) error {
	sizeZ, _ := nvme.ToZeroBased16(depth)
	aqa := nvme.AQA(0).WithASQS(sizeZ).WithACQS(sizeZ)
	cc := nvme.CC(0).WithEN(true).WithIOSQES(6).WithIOCQES(4)
	if a.cap.CSS()&nvme.CAPCSSIOCS != 0 && a.cap.CSS()&nvme.CAPCSSNVM == 0 {
		cc = cc.WithCSS(nvme.CSSIOCS)
	}
	if a.cfg.Weighted {
		cc = cc.WithAMS(nvme.AMSWeighted)
	}
	if err := a.dev.Write32(nvme.RegAQA, uint32(aqa)); err != nil {
		return err
	}
	if err := a.dev.Write64(nvme.RegASQ, a.cfg.Pool.IOVA(a.mem.Off)); err != nil {
		return err
	}
	if err := a.dev.Write64(nvme.RegACQ, a.cfg.Pool.IOVA(a.mem.Off+pageSize)); err != nil {
		return err
	}
	if err := a.dev.Write32(nvme.RegCC, uint32(cc)); err != nil {
		return err
	}
	var fatal error
	err := a.waitStatus(ctx, "ready", a.readyLimit(), func(s nvme.CSTS) bool {
		if s.CFS() {
			fatal = fmt.Errorf("enabling the controller: %v, %v: %w", s, cc, ErrFatal)
		}
		return s.RDY() || s.CFS()
	})
	return errors.Join(err, fatal)
}

func (a *Admin) status() (nvme.CSTS, error) {
	v, err := a.dev.Read32(nvme.RegCSTS)
	if err != nil {
		return 0, err
	}
	if v == allOnes32 {
		return 0, fmt.Errorf("CSTS=%#x: %w", v, errAllOnes)
	}
	return nvme.CSTS(v), nil
}

// waitStatus waits until CSTS is as wanted. The error says what was seen.
func (a *Admin) waitStatus(ctx context.Context, what string, limit time.Duration, good func(nvme.CSTS) bool) error {
	begin := time.Now()
	timer := time.NewTimer(firstLook)
	defer timer.Stop()
	for pause := firstLook; ; pause = min(2*pause, lastLook) {
		csts, err := a.status()
		if err != nil {
			return err
		}
		if good(csts) {
			return nil
		}
		if spent := time.Since(begin); spent > limit {
			cc, _ := a.dev.Read32(nvme.RegCC)
			return &registerTimeout{fmt.Sprintf("controller not %s: CSTS=%#x after %.1f s, CC=%#x", what, uint32(csts), spent.Seconds(), cc)}
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the controller to be %s: CSTS=%#x: %w", what, uint32(csts), context.Cause(ctx))
		case <-a.dev.Done():
			return a.dev.Err()
		}
	}
}

// Diagnose says in an error what the registers tell about a controller that let a command time out. It takes up to a second.
func (a *Admin) Diagnose() error {
	type answer struct {
		csts uint32
		err  error
	}
	got := make(chan answer, 1)
	go func() { // ends with the register access, which has its own limit
		v, err := a.dev.Read32(nvme.RegCSTS)
		got <- answer{v, err}
	}()
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case r := <-got:
		switch {
		case r.err != nil:
			return r.err
		case r.csts == allOnes32:
			return fmt.Errorf("CSTS=%#x: %w", r.csts, errAllOnes)
		case nvme.CSTS(r.csts).CFS():
			return fmt.Errorf("%v: %w", nvme.CSTS(r.csts), ErrFatal)
		}
		return fmt.Errorf("the controller is alive: %v", nvme.CSTS(r.csts))
	case <-timer.C:
		return errors.New("its registers do not answer either")
	}
}

// Shutdown tells the controller to make everything durable (CC.SHN), then disables it. Each step has a limit of some seconds.
// When it returns nil the controller touches memory no more.
func (a *Admin) Shutdown() error {
	cc, err := a.config()
	if err != nil {
		return err
	}
	if cc.EN() {
		cc = cc.WithSHN(nvme.SHNNormal)
		if err := a.dev.Write32(nvme.RegCC, uint32(cc)); err != nil {
			return err
		}
		limit := minShutdown
		if id := a.Identity(); id != nil {
			limit = min(max(time.Duration(id.RTD3E)*time.Microsecond, minShutdown), maxShutdown)
		}
		err = a.waitStatus(context.Background(), "shut down", limit, func(s nvme.CSTS) bool {
			return s.SHST() == nvme.SHSTComplete || s.CFS()
		})
	}
	cc = cc.WithEN(false).WithSHN(nvme.SHNNone)
	if writeErr := a.dev.Write32(nvme.RegCC, uint32(cc)); writeErr != nil {
		return errors.Join(err, writeErr)
	}
	limit := min(a.readyLimit(), maxShutdown)
	return errors.Join(err, a.waitStatus(context.Background(), "disabled", limit, func(s nvme.CSTS) bool { return !s.RDY() }))
}
