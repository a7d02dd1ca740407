package guestdrv_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// A controller that loses a command is reset. ResetFail, the default, tells the caller, who knows whether the same command may be sent
// again; ResetReplay sends it again, as a kernel does.
func ExampleResetMode() {
	for _, mode := range []guestdrv.ResetMode{guestdrv.ResetFail, guestdrv.ResetReplay} {
		// A device that never completes the first read.
		var reads atomic.Int32
		var cfg nvmetest.Config
		cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			if qid != 0 && cmd.Opcode == nvme.IORead && reads.Add(1) == 1 {
				return nvmetest.Verdict{Action: nvmetest.Drop}
			}
			return nvmetest.Verdict{}
		}
		dev := nvmetest.New(cfg)
		c, err := guestdrv.OpenDevice(context.Background(), dev.InProc(), guestdrv.Options{Timeout: 2 * time.Second, OnReset: mode})
		if err != nil {
			log.Fatal(err)
		}
		ns, err := c.Namespace(1)
		if err != nil {
			log.Fatal(err)
		}
		_, err = ns.ReadAt(make([]byte, 512), 0)
		s := c.Stats()
		fmt.Printf("%s: lost by a reset: %t, resets: %d, the controller: %v\n", mode, errors.Is(err, guestdrv.ErrReset), s.Resets, c.Err())
		c.Close()
		dev.Close()
	}
	// Output:
	// fail: lost by a reset: true, resets: 1, the controller: <nil>
	// replay: lost by a reset: false, resets: 1, the controller: <nil>
}

// A disk of this machine. Before: guestdrv bind 0000:00:03.0, which takes it from the kernel's driver, unless a file system is mounted from it.
func ExampleOpen_pci() {
	ctx := context.Background()
	c, err := guestdrv.Open(ctx, "pci:0000:00:03.0", guestdrv.Options{
		OnReset: guestdrv.ResetReplay,
		OnChange: func(change guestdrv.Change) {
			log.Printf("namespace %d %s", change.NSID, change.Kind)
		},
	})
	if err != nil {
		log.Fatal(err) // it says what to do: which driver to bind to, which capability or module is missing
	}
	defer c.Close()
	for _, ns := range c.Namespaces() {
		fmt.Printf("namespace %d: %d bytes\n", ns.NSID(), ns.Size())
	}
}

// readOnce reads one block through a queue pair of its own.
func readOnce(ctx context.Context, c *guestdrv.Controller, iova uint64) error {
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 1})
	if err != nil {
		return err
	}
	defer p.Close()
	if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: 1, IOVA: iova}}); err != nil {
		return err
	}
	if err := p.Publish(); err != nil {
		return err
	}
	for {
		if err := p.Wait(ctx); err != nil {
			return err
		}
		var results [1]guestdrv.Result
		n, err := p.Reap(results[:])
		if err != nil {
			return err
		}
		if n == 1 {
			return results[0].Status.Err()
		}
	}
}

// A QueuePair does not live through a reset of the controller: its owner, who knows what was outstanding, closes it and makes another.
// NewQueuePair waits for the end of the reset.
func ExampleQueuePair_reset() {
	var reads atomic.Int32
	var cfg nvmetest.Config
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 && cmd.Opcode == nvme.IORead && reads.Add(1) == 1 {
			return nvmetest.Verdict{Action: nvmetest.Drop}
		}
		return nvmetest.Verdict{}
	}
	dev := nvmetest.New(cfg)
	defer dev.Close()
	ctx := context.Background()
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), guestdrv.Options{Timeout: 2 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	buf, err := c.Alloc(512)
	if err != nil {
		log.Fatal(err)
	}
	defer buf.Free()

	for try := 1; ; try++ {
		err := readOnce(ctx, c, buf.IOVA())
		if errors.Is(err, guestdrv.ErrReset) && c.Err() == nil {
			fmt.Println("try", try, "was lost by a reset")
			continue
		}
		fmt.Println("try", try, err)
		break
	}
	// Output:
	// try 1 was lost by a reset
	// try 2 <nil>
}
