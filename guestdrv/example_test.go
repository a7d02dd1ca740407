package guestdrv_test

import (
	"context"
	"fmt"
	"log"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// serveTestDevice stands in for `hostmed serve --socket PATH --namespace mem:size=8MiB`.
func serveTestDevice() (path string, stop func()) {
	dev := nvmetest.New(nvmetest.Config{})
	path, remove, err := nvmetest.TempSocket()
	if err != nil {
		log.Fatal(err)
	}
	srv, err := dev.Serve(path, nil)
	if err != nil {
		log.Fatal(err)
	}
	return path, func() {
		srv.Close()
		dev.Close()
		remove()
	}
}

// openTestDevice is Open for the examples whose subject is something else.
func openTestDevice() (c *guestdrv.Controller, stop func()) {
	path, end := serveTestDevice()
	c, err := guestdrv.Open(context.Background(), "vfio-user:"+path, guestdrv.Options{})
	if err != nil {
		log.Fatal(err)
	}
	return c, func() {
		c.Close()
		end()
	}
}

func Example() {
	path, stop := serveTestDevice()
	defer stop()

	ctx := context.Background()
	c, err := guestdrv.Open(ctx, "vfio-user:"+path, guestdrv.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	ns, err := c.Namespace(1)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes in blocks of %d, doorbells: %s\n", c.Identify().Model(), ns.Size(), ns.BlockSize(), c.Doorbells())

	block := make([]byte, 4096)
	copy(block, "hello")
	if _, err := ns.WriteAt(block, 8192); err != nil {
		log.Fatal(err)
	}
	if err := ns.Flush(ctx); err != nil {
		log.Fatal(err)
	}
	clear(block)
	if _, err := ns.ReadAt(block, 8192); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", block[:5])
	// Output:
	// nvmetest, 8388608 bytes in blocks of 512, doorbells: shadow
	// hello
}

// The batch API: submit a slice, publish once, reap a slice.
func ExampleQueuePair() {
	path, stop := serveTestDevice()
	defer stop()

	ctx := context.Background()
	c, err := guestdrv.Open(ctx, "vfio-user:"+path, guestdrv.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 32})
	if err != nil {
		log.Fatal(err)
	}
	defer p.Close()
	buf, err := c.Alloc(32 * 4096)
	if err != nil {
		log.Fatal(err)
	}
	defer buf.Free()

	var ios [32]guestdrv.IO
	for i := range uint64(32) {
		ios[i] = guestdrv.IO{Op: nvme.IORead, NSID: 1, LBA: 8 * i, Blocks: 8, IOVA: buf.IOVA() + 4096*i, Tag: i}
	}
	if _, err := p.Submit(ios[:]); err != nil {
		log.Fatal(err)
	}
	if err := p.Publish(); err != nil {
		log.Fatal(err)
	}
	var results [32]guestdrv.Result
	done := 0
	for p.Outstanding() > 0 {
		if err := p.Wait(ctx); err != nil {
			log.Fatal(err)
		}
		n, err := p.Reap(results[:])
		if err != nil {
			log.Fatal(err)
		}
		for _, r := range results[:n] {
			if r.Status.OK() {
				done++
			}
		}
	}
	fmt.Println(done, "reads")
	// Output: 32 reads
}
