package nbd_test

import (
	"context"
	"log"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export/nbd"
)

// A program that gives all namespaces of a controller to NBD clients.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctrl, err := guestdrv.Open(ctx, "vfio-user:/run/disk0", guestdrv.Options{OnReset: guestdrv.ResetReplay})
	if err != nil {
		log.Fatal(err)
	}
	var c nbd.Config
	for _, ns := range ctrl.Namespaces() {
		c.Exports = append(c.Exports, nbd.Export{Name: strconv.FormatUint(uint64(ns.NSID()), 10), Disk: ns})
	}
	s, err := nbd.New(c)
	if err != nil {
		log.Fatal(err)
	}
	l, err := nbd.Listen("/run/disk0.nbd")
	if err != nil {
		log.Fatal(err)
	}
	// Until a signal; then what is under way is finished.
	if err := s.Serve(ctx, l); err != nil {
		log.Print(err)
	}
	if err := l.Remove(); err != nil {
		log.Print(err)
	}
	if err := ctrl.Close(); err != nil {
		log.Fatal(err)
	}
}
