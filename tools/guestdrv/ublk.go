package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/guestdrv/export/ublk"
	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

// ublkFlags are those of serve --ublk.
type ublkFlags struct {
	Ublk      bool       `help:"Give the namespace to the kernel as the block device /dev/ublkbN, whose name is printed when it is there. Needs Linux 6.5 with ublk_drv, and root."`
	ID        int        `name:"id" default:"-1" placeholder:"N" help:"ublk: N of /dev/ublkbN; -1: the first free one, or the one that waits for this namespace (${default})."`
	Recover   int        `default:"-1" placeholder:"N" help:"ublk: take over /dev/ublkbN, whose server has died, or fail. Without it that is done for a device of the same namespace."`
	UblkDepth int        `name:"depth" default:"64" placeholder:"N" help:"ublk: requests of one queue that are under way (${default})."`
	MaxIO     size.Bytes `name:"max-io" default:"128KiB" placeholder:"SIZE" help:"ublk: the largest request; each of the queues has --depth buffers of this size in DMA memory (${default})."`
	Keep      bool       `help:"ublk: if the controller fails, leave /dev/ublkbN with its requests waiting for the next guestdrv serve, instead of ending them with errors."`
}

const (
	ublkMaxIO     = 1 << 20
	ublkDefaultIO = 128 << 10
	ublkPage      = 4096
	// ublkDriverShare is DMA memory for the driver's own queues and lists.
	ublkDriverShare = 2 << 20
)

// check refuses flags that cannot be.
func (f *ublkFlags) check() error {
	switch {
	case !f.Ublk:
		if f.ID != -1 || f.Recover != -1 || f.Keep {
			return errors.New("--id, --recover and --keep are for --ublk")
		}
	case f.UblkDepth < 1 || f.UblkDepth > guestdrv.MaxQueueDepth:
		return fmt.Errorf("--depth %d: 1 to %d", f.UblkDepth, guestdrv.MaxQueueDepth)
	case f.MaxIO < ublkPage || f.MaxIO > ublkMaxIO || f.MaxIO%ublkPage != 0:
		return fmt.Errorf("--max-io %v: a multiple of 4 KiB up to 1 MiB", f.MaxIO)
	case f.ID < -1 || f.Recover < -1:
		return errors.New("--id and --recover: N is 0 or more")
	case f.ID >= 0 && f.Recover >= 0 && f.ID != f.Recover:
		return fmt.Errorf("--id %d and --recover %d are two devices", f.ID, f.Recover)
	}
	return nil
}

// options are what the controller is opened with for n block devices.
func (f *ublkFlags) options(o guestdrv.Options, queues int) guestdrv.Options {
	if !f.Ublk {
		return o
	}
	n := ublkQueues(queues)
	o.Queues, o.MaxQueuePairs, o.OnReset = 1, n, guestdrv.ResetReplay
	o.DMASize = ublkDMA(n, f.UblkDepth, int(f.MaxIO))
	return o
}

// ublkDMA is how much DMA memory queues of a depth take: buffers, PRP lists, rings, and what the driver needs itself.
func ublkDMA(queues, depth, maxIO int) uint64 {
	return uint64(queues)*(uint64(depth)*uint64(maxIO+ublkPage)+1<<18) + ublkDriverShare
}

func ublkQueues(n int) int {
	if n == 0 {
		return runtime.NumCPU()
	}
	return n
}

// ublkServer is one namespace as a block device.
type ublkServer struct {
	ctl     *ublk.Control
	dev     *ublk.Device
	disk    disk
	keep    bool
	log     hclog.Logger
	out     *cli.Output
	resized chan int64
	stopped bool
}

// openUblk makes the block device, or takes it over, up to the point from which it needs nothing that the sandbox forbids.
func openUblk(c *guestdrv.Controller, disks []disk, s *serveCmd, log hclog.Logger, out *cli.Output) (_ *ublkServer, err error) {
	f := &s.ublkFlags
	if len(disks) != 1 {
		return nil, cli.Usagef("--ublk gives one namespace to the kernel, and there are %d: choose with --nsid", len(disks))
	}
	ns, err := c.Namespace(disks[0].nsid)
	if err != nil {
		return nil, err
	}
	u := &ublkServer{disk: disks[0], keep: f.Keep, log: log, out: out, resized: make(chan int64, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.close())
		}
	}()
	if u.ctl, err = ublk.OpenControl(); err != nil {
		return nil, cli.UsageError{Err: err}
	}
	maxIO := min(int(f.MaxIO), c.MaxTransfer())
	cfg := ublk.Config{
		ID: f.ID, Queues: ublkQueues(s.Queues), Depth: f.UblkDepth, MaxIO: maxIO, Keep: f.Keep,
		Params: ublkParams(disks[0].disk, ns.Identify(), maxIO), Identity: ublkIdentity(c.Identify(), ns.NSID(), ns.Identify()),
	}
	cfg.Params.ReadOnly = cfg.Params.ReadOnly || s.ReadOnly
	if err := u.make(f, cfg); err != nil {
		return nil, err
	}
	if err := u.dev.Unqueued(); err != nil {
		u.log.Warn("too few queue pairs: the driver's own are used, a goroutine for each request", "reason", err)
	}
	return u, nil
}

// make takes over the device that waits for the namespace, or makes one.
func (u *ublkServer) make(f *ublkFlags, cfg ublk.Config) (err error) {
	id, waits := f.Recover, f.Recover >= 0
	if !waits {
		id, waits = waiting(u.ctl, f.ID, cfg.Identity)
	}
	if !waits {
		u.dev, err = ublk.Add(u.ctl, u.disk.disk, cfg)
		return err
	}
	if u.dev, err = ublk.Recover(u.ctl, uint32(id), u.disk.disk, cfg); err != nil {
		return err
	}
	u.log.Info("block device taken over", "device", u.dev.Path())
	if was, err := u.ctl.Params(uint32(id)); err == nil && was.Size != cfg.Params.Size {
		u.resized <- cfg.Params.Size // it has grown meanwhile
	}
	return nil
}

// dyingWithin is how long a device of ours may still count as served: the kernel cleans up after a process for a while.
const dyingWithin = 3 * time.Second

// waiting looks for a device whose server has died and that is the namespace's: id, or any if id is -1.
func waiting(ctl *ublk.Control, id int, identity uint64) (int, bool) {
	ids := []int{id}
	if id < 0 {
		ids = nil
		names, _ := filepath.Glob("/dev/ublkc*")
		for _, name := range names {
			if n, err := strconv.Atoi(strings.TrimPrefix(name, "/dev/ublkc")); err == nil {
				ids = append(ids, n)
			}
		}
	}
	for _, n := range ids {
		for deadline := time.Now().Add(dyingWithin); ; time.Sleep(dyingWithin / 100) {
			info, err := ctl.Info(uint32(n))
			if err != nil || info.Identity != identity {
				break
			}
			if info.State == ublk.Quiesced {
				return n, true
			}
			// One that goes on living is served through another controller of the namespace.
			if info.State != ublk.Live || time.Now().After(deadline) {
				break
			}
		}
	}
	return 0, false
}

func (u *ublkServer) policy(p *sandbox.Policy) {
	p.Uses = append(p.Uses, sandbox.Ublk(u.dev.RingFDs()...))
}

// serve starts the block device and stops it when ctx ends.
func (u *ublkServer) serve(ctx context.Context) error {
	if err := u.dev.Start(); err != nil {
		return err
	}
	fmt.Fprintln(u.out.Stdout, u.dev.Path())
	info := u.dev.Info()
	u.log.Info("block device", "device", u.dev.Path(), "queues", info.Queues, "depth", info.Depth, "max-io", info.MaxIO, "recovered", u.dev.Recovered())
	for {
		select {
		case <-ctx.Done():
			return u.stop()
		case n := <-u.resized:
			if err := u.dev.Resize(n); err != nil {
				u.log.Warn("block device keeps its size", "device", u.dev.Path(), "reason", err)
			}
		case <-u.dev.Done():
			err := u.dev.Err()
			if u.keep {
				return fmt.Errorf("%w; %s waits for the next server", err, u.dev.Path())
			}
			return errors.Join(err, u.stop())
		}
	}
}

func (u *ublkServer) stop() error {
	u.stopped = true
	s := u.dev.Stats()
	u.log.Info("block device ends", "device", u.dev.Path(), "requests", s.Requests, "errors", s.Errors, "system-calls", s.Enters, "sleeps", s.Sleeps, "resets", s.Remade)
	return u.dev.Stop()
}

// changed tells the block layer of a new size.
func (u *ublkServer) changed(d disk, gone bool) {
	if gone || d.nsid != u.disk.nsid {
		return
	}
	select {
	case <-u.resized:
	default:
	}
	u.resized <- d.disk.Size()
}

// close gives up a device that was never served. One that was kept stays: the end of the process makes it wait.
func (u *ublkServer) close() (err error) {
	if u.dev != nil && !u.stopped && !u.dev.Started() && !u.dev.Recovered() {
		err = u.stop()
	}
	if u.ctl != nil {
		err = errors.Join(err, u.ctl.Close())
	}
	return err
}

// ublkParams are what the block device is like.
func ublkParams(ns export.Disk, id *nvme.IdentifyNamespace, maxIO int) ublk.Params {
	const unlimited = 1 << 31 // bytes, so that sectors fit in what the kernel has for them
	block := ns.BlockSize()
	caps := export.CapsOf(ns)
	p := ublk.Params{
		Size: ns.Size(), BlockSize: block, PhysicalBlock: block, ReadOnly: ns.ReadOnly(), VolatileCache: caps.Cache,
		Chunk: int(id.NOIOB) * block,
	}
	if id.NSFEAT&nvme.NSFEATOptPerf != 0 {
		p.PhysicalBlock = powerOfTwo(int(id.NPWG.Count())*block, block)
		p.OptimalIO = powerOfTwo(int(id.NOWS.Count())*block, block)
		p.DiscardUnit = powerOfTwo(int(id.NPDG.Count())*block, block)
	}
	if caps.Discard && !p.ReadOnly {
		p.MaxDiscard = unlimited
	}
	if caps.Zeroes && !p.ReadOnly {
		p.MaxZeroes = maxIO // what a controller that says nothing of it can be asked for: MDTS holds for it, too
	}
	return p
}

// powerOfTwo returns n if it is one that is a whole page at the most, or else least.
func powerOfTwo(n, least int) int {
	if n < least || n > 1<<20 || n&(n-1) != 0 {
		return least
	}
	return n
}

// ublkIdentity stands for a namespace: what does not change as long as it is the same one.
func ublkIdentity(c *nvme.IdentifyController, nsid uint32, id *nvme.IdentifyNamespace) uint64 {
	h := sha256.New()
	fmt.Fprintf(h, "shadowbell ublk 1\x00%s\x00%s\x00%s\x00%d\x00%x\x00%x", c.Serial(), c.Model(), c.Subsystem(), nsid, id.NGUID, id.EUI64)
	return binary.LittleEndian.Uint64(h.Sum(nil))
}
