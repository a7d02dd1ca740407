package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv/export/nbd"
	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// nbdFlags are those of serve that are about NBD.
type nbdFlags struct {
	NBD         string `name:"nbd" placeholder:"unix:PATH" help:"Serve by the NBD protocol on a socket that is made at PATH, for this user alone. Each namespace is an export by its number; the first one is the default."`
	Connections int    `default:"16" placeholder:"N" help:"NBD clients at one time, at most (${default})."`
	AnySize     bool   `name:"nbd-any-block-size" help:"Let NBD clients in that do not ask for the block size, such as nbd-client, also where blocks are larger than 512 bytes; give them that size by other means (nbd-client -b 4096)."`
}

func (f *nbdFlags) check() error {
	if f.NBD != "" && (!strings.HasPrefix(f.NBD, "unix:") || f.NBD == "unix:") {
		return fmt.Errorf("--nbd %s: write it as unix:PATH", f.NBD)
	}
	if f.Connections < 1 || f.Connections > 1024 {
		return fmt.Errorf("--connections %d: 1 to 1024", f.Connections)
	}
	return nil
}

func (f *nbdFlags) path() string { return strings.TrimPrefix(f.NBD, "unix:") }

// uri is what clients take to get the default export. Others have their number after the third slash.
func (f *nbdFlags) uri() string {
	// Slashes need no escape in a query, and people read this.
	return "nbd+unix:///?socket=" + strings.ReplaceAll(url.QueryEscape(f.path()), "%2F", "/")
}

// nbdServer is the NBD server of serve.
type nbdServer struct {
	flags    *nbdFlags
	readOnly bool
	listener *nbd.Listener
	server   *nbd.Server
	locked   bool         // nothing can be removed from inside; removeSocket does it
	failed   func() error // why the controller has failed for good; nil: it has not
	log      hclog.Logger
	out      *cli.Output
}

// openNBD makes the socket.
func openNBD(f *nbdFlags, disks []disk, readOnly bool, failed func() error, log hclog.Logger, out *cli.Output) (server, error) {
	s := &nbdServer{flags: f, readOnly: readOnly, failed: failed, log: log.Named("nbd"), out: out}
	c := nbd.Config{Connections: f.Connections, AnyBlockSize: f.AnySize, Logger: s.log}
	for _, d := range disks {
		c.Exports = append(c.Exports, s.export(d))
	}
	var err error
	if s.server, err = nbd.New(c); err != nil {
		return nil, err
	}
	if s.listener, err = nbd.Listen(f.path()); err != nil {
		s.server.Close()
		return nil, err
	}
	return s, nil
}

func (s *nbdServer) export(d disk) nbd.Export {
	return nbd.Export{Name: strconv.FormatUint(uint64(d.nsid), 10), Description: d.name, Disk: d.disk, ReadOnly: s.readOnly}
}

// policy lets one client more in than there may be, so that it can be told that there are too many.
func (s *nbdServer) policy(p *sandbox.Policy) {
	s.locked = true
	p.Uses = append(p.Uses, sandbox.Listener(s.listener.FD(), s.flags.Connections+1))
}

// removeSocket removes the socket's file from outside the box.
func (f *nbdFlags) removeSocket() {
	if f.NBD != "" {
		nbd.RemoveStale(f.path())
	}
}

// watchEach is how often a server looks whether its controller has failed.
const watchEach = 200 * time.Millisecond

// serve ends with the controller too: clients that come to nothing but errors are better off with none, and whoever started the program can
// start it again.
func (s *nbdServer) serve(ctx context.Context) error {
	s.log.Info("listening", "socket", s.flags.NBD)
	fmt.Fprintln(s.out.Stdout, s.flags.uri())
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for each := time.NewTicker(watchEach); ; {
			select {
			case <-ctx.Done():
				each.Stop()
				return
			case <-each.C:
				if err := s.failed(); err != nil {
					cancel(err)
				}
			}
		}
	}()
	err := s.server.Serve(ctx, s.listener)
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return err
}

func (s *nbdServer) changed(d disk, gone bool) {
	if gone {
		s.server.Remove(s.export(d).Name)
		return
	}
	s.server.Set(s.export(d))
}

func (s *nbdServer) close() error {
	s.server.Close()
	_ = s.listener.Close() // Serve did
	if s.locked {
		return nil
	}
	return s.listener.Remove()
}
