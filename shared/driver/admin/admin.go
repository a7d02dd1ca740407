// Package admin is a driver's dealings with the controller as a whole: enable and shutdown by registers, the admin queue and
// its commands, Identify, queue creation, Doorbell Buffer Config, asynchronous events.
//
// In the order of events and files:
//
//	Open       disable, admin queue, enable                registers.go, admin.go
//	Exec       one admin command, from any goroutine       exec.go
//	Identify…  what the controller is, checked             identify.go
//	ShareDoorbells, Publishers                             doorbells.go
//	CreatePair, DeletePair                                 queues.go
//	WatchEvents                                            events.go
//	Stop, Restart  a controller that has got stuck         reset.go
//	Shutdown, Close                                        registers.go
//
// The controller is not trusted. What it says of itself bounds what this side does, never how much memory it takes or how long it
// waits. I/O commands are not here.
package admin

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const (
	// depth is the number of entries of the admin queues.
	depth = 32
	// pageSize is CC.MPS in bytes: what the controller's PRPs are made of.
	pageSize = 4096
)

// Config says what an Admin works with.
type Config struct {
	Device   device.Device
	Pool     *dma.Pool
	EventFD  int           // of interrupt vector 0, which becomes the Admin's; -1: there is none
	Timeout  time.Duration // of each command
	Logger   Logger
	Failed   func(error) // told once why the admin queue failed
	Weighted bool        // weighted round robin with urgent priority class (CC.AMS); Open fails if CAP.AMS has it not,

	Unsupported error // with an error that wraps this one
	Health      bool  // events of the controller's health are asked for: spare, temperature, reliability

	// Refused makes the error of a command that ended with a status other than success.
	Refused func(nvme.Command, nvme.Status) error
}

// Logger takes what nobody waits to be told, as a message with keys and values after it.
type Logger interface {
	Debug(msg string, args ...any)
	Warn(msg string, args ...any)
}

// Admin is an enabled controller. It is safe for concurrent use.
type Admin struct {
	cfg Config
	dev device.Device
	log Logger

	cap nvme.CAP
	vs  nvme.Version
	id  atomic.Pointer[nvme.IdentifyController]

	lane *lane.Lane
	mem  dma.Block

	page pages // the shared doorbell pages

	events events
}

// Open resets and enables the controller. On an error it is left disabled, as far as it can be reached.
func Open(ctx context.Context, cfg Config) (*Admin, error) {
	a := &Admin{cfg: cfg, dev: cfg.Device, log: cfg.Logger}
	if err := a.readCapabilities(); err != nil {
		a.closeFD()
		return nil, err
	}
	if cfg.Weighted && a.cap.AMS()&nvme.CAPAMSWeighted == 0 {
		a.closeFD()
		return nil, fmt.Errorf("weighted round robin (CAP.AMS %#x): %w", a.cap.AMS(), cfg.Unsupported)
	}
	if err := a.disable(ctx); err != nil {
		a.closeFD()
		return nil, err
	}
	if err := a.openQueue(); err != nil {
		return nil, err
	}
	if err := a.enable(ctx); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

func (a *Admin) closeFD() { closeFD(a.cfg.EventFD) }

// openQueue makes queue 0. It is never shadowed: its doorbells are registers (R16).
func (a *Admin) openQueue() error {
	mem, err := a.cfg.Pool.Take(2 * pageSize)
	if err != nil {
		a.closeFD()
		return fmt.Errorf("admin queue: %w", err)
	}
	a.mem = mem
	region, err := a.cfg.Pool.Region(mem)
	if err == nil {
		err = region.Zero(0, mem.Len)
	}
	var sq, cq *shm.Region
	if err == nil {
		sq, err = region.View(0, pageSize)
	}
	if err == nil {
		cq, err = region.View(pageSize, pageSize)
	}
	if err != nil {
		a.closeFD()
		return err
	}
	tail, head := a.registerPublishers(0)
	q, err := queue.New(queue.Config{QID: 0, Size: depth, SQ: sq, CQ: cq, Tail: tail, Head: head, EventFD: -1})
	if err != nil {
		a.closeFD()
		return err
	}
	a.lane, err = lane.New(lane.Config{
		Queue: q, Head: head, QID: 0, EventFD: a.cfg.EventFD, Timeout: a.cfg.Timeout, Failed: a.cfg.Failed,
	})
	return err
}

// Capabilities returns CAP as it was read at Open; Restart insists on it.
func (a *Admin) Capabilities() nvme.CAP { return a.cap }

// Version returns VS as it was read at Open.
func (a *Admin) Version() nvme.Version { return a.vs }

// Identity returns Identify Controller as the last Identify has read it, or nil.
func (a *Admin) Identity() *nvme.IdentifyController { return a.id.Load() }

// Lane returns the admin queue, for its deadlines, its failure and its counts.
func (a *Admin) Lane() *lane.Lane { return a.lane }

// Close ends the goroutines and fails commands under way. The device is not told; see Shutdown.
func (a *Admin) Close() {
	a.events.end()
	a.lane.Close()
	a.events.running.Wait()
}

// Drop gives the commands that were under way, and the queue's memory, back to the pool. The device can write none of it any
// more, and Close was called.
func (a *Admin) Drop() {
	a.lane.Drop()
	a.cfg.Pool.Give(a.mem)
	a.page.give(a.cfg.Pool)
}
