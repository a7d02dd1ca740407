package guestdrv_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// A namespace is an io.ReaderAt and an io.WriterAt, so the readers and writers of package io work on it, in whole blocks: a
// buffer of a multiple of the block size keeps them so. One from Alloc is memory that the controller reaches by itself: nothing is copied.
func ExampleNamespace() {
	c, stop := openTestDevice()
	defer stop()
	ns, err := c.Namespace(1)
	if err != nil {
		log.Fatal(err)
	}
	buf, err := c.Alloc(64 << 10)
	if err != nil {
		log.Fatal(err)
	}
	defer buf.Free()

	// 1 MiB from the start is copied to 4 MiB.
	const length = 1 << 20
	n, err := io.CopyBuffer(io.NewOffsetWriter(ns, 4<<20), io.NewSectionReader(ns, 0, length), buf.Bytes())
	if err != nil {
		log.Fatal(err)
	}
	if err := ns.Flush(context.Background()); err != nil {
		log.Fatal(err)
	}
	sum := func(off int64) string {
		h := sha256.New()
		if _, err := io.CopyBuffer(h, io.NewSectionReader(ns, off, length), buf.Bytes()); err != nil {
			log.Fatal(err)
		}
		return fmt.Sprintf("%x", h.Sum(nil))
	}
	fmt.Println(n, "bytes, equal:", sum(0) == sum(4<<20))
	// Output: 1048576 bytes, equal: true
}

// A context bounds how long a call waits. The command may still be executed after that; the controller stays as it is.
func ExampleNamespace_ReadAtContext() {
	c, stop := openTestDevice()
	defer stop()
	ns, err := c.Namespace(1)
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	block := make([]byte, ns.BlockSize())
	n, err := ns.ReadAtContext(ctx, block, 0)
	fmt.Println(n, err)

	cancel()
	_, err = ns.ReadAtContext(ctx, block, 0)
	fmt.Println(err, c.Err())
	// Output:
	// 512 <nil>
	// context canceled <nil>
}

// What the controller has refused, what this package has, and what ends it all are told apart by errors.As and errors.Is.
func ExampleStatusError() {
	c, stop := openTestDevice()
	defer stop()
	ns, err := c.Namespace(1)
	if err != nil {
		log.Fatal(err)
	}
	explain := func(err error) {
		var se *guestdrv.StatusError
		switch {
		case err == nil:
			fmt.Println("done")
		case errors.As(err, &se) && se.Status.Code() == nvme.StatusCompareFailure:
			fmt.Println("the data differs")
		case errors.As(err, &se) && se.Retriable():
			fmt.Printf("refused for now, SCT %d, SC %#x\n", se.SCT(), se.SC())
		case errors.As(err, &se):
			fmt.Printf("refused, SCT %d, SC %#x, DNR\n", se.SCT(), se.SC())
		case errors.Is(err, guestdrv.ErrReset):
			fmt.Println("lost by a reset: the same command can be tried again")
		case c.Err() != nil:
			fmt.Println("the controller is lost:", c.Err())
		default:
			fmt.Println("the call was wrong:", err)
		}
	}
	ctx := context.Background()
	explain(ns.WriteZeroes(ctx, 0, 512))
	explain(ns.Compare(ctx, []byte{511: 1}, 0))
	explain(ns.Discard(ctx, 0, 100))
	// A command that no controller has.
	_, err = c.Admin(ctx, &nvme.Command{Opcode: 0x7F}, nil)
	explain(err)
	c.Close()
	explain(ns.Flush(ctx))
	// Output:
	// done
	// the data differs
	// the call was wrong: discard of 100 bytes at offset 0: not a multiple of the block size, 512 bytes
	// refused, SCT 0, SC 0x1, DNR
	// the controller is lost: guestdrv: closed
}

// Latencies are kept by kind of command; Sub gives those of an interval.
func ExampleController_Stats() {
	c, stop := openTestDevice()
	defer stop()
	ns, err := c.Namespace(1)
	if err != nil {
		log.Fatal(err)
	}
	before := c.Stats()
	block := make([]byte, ns.BlockSize())
	for i := range int64(100) {
		if _, err := ns.ReadAt(block, i*512); err != nil {
			log.Fatal(err)
		}
	}
	now := c.Stats()
	interval := now.Sub(&before)
	reads := interval.Op(guestdrv.OpRead)
	fmt.Printf("%d reads, %d errors\n", reads.Latency.Count(), reads.Errors)
	fmt.Println("half of them within some time:", reads.Latency.Quantile(0.5) > 0, reads.Latency.Quantile(0.5) <= reads.Latency.Max())
	fmt.Println("doorbells are rung for some, at most:", interval.MMIOPerIO() < 3)
	// Output:
	// 100 reads, 0 errors
	// half of them within some time: true true
	// doorbells are rung for some, at most: true
}
