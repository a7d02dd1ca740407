package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/guestdrv/export/nbd"
	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

type serveCmd struct {
	deviceFlags `embed:""`
	eventFlags  `embed:""`
	nbdFlags    `embed:""`
	ublkFlags   `embed:""`

	NSID     nsidList `name:"nsid" default:"all" placeholder:"LIST" help:"Namespaces to serve, such as 1 or 1,3 (${default})."`
	ReadOnly bool     `help:"Refuse writes."`
	Queues   int      `default:"0" placeholder:"N" help:"Queue pairs of the device to use; 0: one for each core (${default})."`
}

// The life of serve:
//
//	separate; open the device; open the servers' descriptors; lock; serve until a signal; the servers end what is
//	under way and close; close the device
//
// A way of serving is a server: one function in openServers makes it from the flags, in a file of its own.

// server is one way to give disks to others.
type server interface {
	// policy adds what the server needs after the lock, mostly to p.Uses.
	policy(p *sandbox.Policy)
	// serve serves until ctx ends, then ends what is under way within some seconds. It returns nil after an end in order.
	serve(ctx context.Context) error
	// changed tells of a namespace that appeared, vanished or has another size; it returns soon.
	changed(d disk, gone bool)
	// close gives up what opening it took, after serve or instead of it.
	close() error
}

// disk is a namespace that is served.
type disk struct {
	disk export.Disk
	nsid uint32
	name string // for people: the model and the namespace
}

// openServers opens the descriptors of all servers that the flags ask for.
func (s *serveCmd) openServers(c *guestdrv.Controller, disks []disk, log hclog.Logger, out *cli.Output) (servers []server, err error) {
	if s.NBD != "" {
		v, err := openNBD(&s.nbdFlags, disks, s.ReadOnly, c.Err, log, out)
		if err != nil {
			return servers, cli.UsageError{Err: err}
		}
		servers = append(servers, v)
	}
	if s.Ublk {
		v, err := openUblk(c, disks, s, log, out)
		if err != nil {
			return servers, err
		}
		servers = append(servers, v)
	}
	return servers, nil
}

// Help is what stands below the arguments.
func (serveCmd) Help() string {
	return `Serves until SIGTERM or Ctrl-C, then ends what is under way and shuts the controller down. A line on stdout says when it is ready: the URI for NBD clients, or the block device.

Examples

  guestdrv serve vfio-user:/run/disk0 --nbd unix:/run/disk0.nbd
    nbdinfo --list 'nbd+unix:///?socket=/run/disk0.nbd'
    nbdcopy --flush disk.img 'nbd+unix:///1?socket=/run/disk0.nbd'
    qemu-img convert -n -O raw disk.qcow2 nbd:unix:/run/disk0.nbd:exportname=1
    nbd-client -unix /run/disk0.nbd -N 1 -C 4 /dev/nbd0

  guestdrv serve vfio:0000:00:04.0 --ublk
    mkfs.ext4 /dev/ublkb0

docs/export.md has more, and what clients find.`
}

// Validate is called by kong.
func (s *serveCmd) Validate() error {
	if s.NBD == "" && !s.Ublk {
		return errors.New("nothing to do: say how to serve it, by --nbd unix:PATH or --ublk")
	}
	if s.NBD != "" {
		if err := s.nbdFlags.check(); err != nil {
			return err
		}
	}
	return s.ublkFlags.check()
}

// options are those of the controller. What was outstanding at a reset is done once more, so that clients see a pause and no error.
func (s *serveCmd) options(changed func(guestdrv.Change)) guestdrv.Options {
	o := guestdrv.Options{Queues: s.Queues, MaxQueuePairs: 1, OnReset: guestdrv.ResetReplay, OnChange: changed}
	o = s.ublkFlags.options(o, s.Queues)
	if s.NBD != "" && o.DMASize != 0 {
		o.DMASize += nbd.DefaultDMAMemory
	}
	return o
}

// Run serves until a signal.
func (s *serveCmd) Run(ctx context.Context, out *cli.Output) (err error) {
	s.privileged = s.Ublk
	s.separateUntil(out, s.removeSocket)
	changes := watcher{ctx: ctx, serve: s, ready: make(chan struct{})}
	o := s.options(changes.tell)
	recorded, end, err := s.record(s.Device)
	if err != nil {
		return err
	}
	defer end()
	o.Events = recorded
	ctrl, err := s.open(ctx, out, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ctrl.Close()) }()
	defer changes.open(ctrl, nil) // Close waits for whom it tells
	disks, err := s.disks(ctrl)
	if err != nil {
		return err
	}
	servers, err := s.openServers(ctrl, disks, s.logger(out), out)
	defer func() {
		for _, v := range servers {
			err = errors.Join(err, v.close())
		}
	}()
	if err != nil {
		return err
	}
	var p sandbox.Policy
	if s.Sandbox != "off" {
		for _, v := range servers {
			v.policy(&p)
		}
	}
	if err := s.lockWith(out, ctrl, p); err != nil {
		return err
	}
	changes.open(ctrl, servers)
	all, ctx := errgroup.WithContext(ctx)
	for _, v := range servers {
		all.Go(func() error { return v.serve(ctx) })
	}
	return all.Wait()
}

// disks are the namespaces to serve.
func (s *serveCmd) disks(c *guestdrv.Controller) (disks []disk, err error) {
	list := c.Namespaces()
	if len(s.NSID) > 0 {
		list = nil
		for _, nsid := range s.NSID {
			ns, err := namespace(c, nsid)
			if err != nil {
				return nil, err
			}
			list = append(list, ns)
		}
	}
	if len(list) == 0 {
		return nil, cli.Usagef("the controller has no namespace that can be served; guestdrv identify shows what there is")
	}
	for _, ns := range list {
		disks = append(disks, diskOf(c, ns))
	}
	return disks, nil
}

func diskOf(c *guestdrv.Controller, ns *guestdrv.Namespace) disk {
	return disk{disk: servedDisk{ns, c}, nsid: ns.NSID(), name: fmt.Sprintf("%s, namespace %d", c.Identify().Model(), ns.NSID())}
}

// watcher tells the servers of changes, from the time on that there are any.
type watcher struct {
	ctx     context.Context
	serve   *serveCmd
	ready   chan struct{} // closed by open
	once    sync.Once
	ctrl    *guestdrv.Controller
	servers []server
}

// open lets changes through, also those that came before. Only the first call counts.
func (w *watcher) open(c *guestdrv.Controller, servers []server) {
	w.once.Do(func() {
		w.ctrl, w.servers = c, servers
		close(w.ready)
	})
}

// tell is guestdrv.Options.OnChange.
func (w *watcher) tell(c guestdrv.Change) {
	select {
	case <-w.ready:
	case <-w.ctx.Done():
		return
	}
	if len(w.serve.NSID) > 0 && !slices.Contains(w.serve.NSID, c.NSID) {
		return
	}
	for _, v := range w.servers {
		v.changed(diskOf(w.ctrl, c.Namespace), c.Kind == guestdrv.Vanished)
	}
}

// nsidList is a list of namespaces; empty: all.
type nsidList []uint32

// UnmarshalText reads "all", "1" or "1,3". It is called by kong.
func (l *nsidList) UnmarshalText(text []byte) error {
	*l = nil
	if string(text) == "all" {
		return nil
	}
	for part := range strings.SplitSeq(string(text), ",") {
		n, err := strconv.ParseUint(part, 10, 32)
		if err != nil || n == 0 || n == 1<<32-1 {
			return fmt.Errorf("%q is no namespace: write 1, 1,3 or all", part)
		}
		for _, had := range *l {
			if had == uint32(n) {
				return fmt.Errorf("namespace %d is in the list twice", n)
			}
		}
		*l = append(*l, uint32(n))
	}
	return nil
}
