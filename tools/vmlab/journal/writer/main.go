// Command writer runs the writers of package journal in a guest of the lab: on a block device, or in a directory. What is durable it
// acknowledges through a virtio-serial port, whose other end outlives the guest.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/tools/vmlab/internal/wire"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal"
)

func main() {
	var l journal.Layout
	device := flag.String("device", "", "NVMe namespace to write records to")
	dir := flag.String("dir", "", "directory to write files into")
	methods := flag.String("methods", "flush,durable,dsync,batch", "how each writer makes its records durable")
	writers := flag.Int("writers", 2, "number of writers of files")
	port := flag.String("acks", "acks", "virtio-serial port, or file, that gets the acknowledgements")
	flag.Uint64Var(&l.Run, "run", 1, "tells this run's records from another's")
	flag.IntVar(&l.Records, "records", 1000, "records of each writer, at most")
	flag.Int64Var(&l.Base, "base", 0, "where on the device the records begin")
	flag.Parse()
	if err := run(l, *device, *dir, *methods, *writers, *port); err != nil {
		fmt.Fprintln(os.Stderr, "journal writer:", err)
		os.Exit(1)
	}
}

func run(l journal.Layout, device, dir, methods string, writers int, port string) error {
	acks, err := openAcks(port)
	if err != nil {
		return err
	}
	defer acks.Close()
	ctx := context.Background() // the end comes from outside
	if dir != "" {
		return journal.RunFiles(ctx, dir, l.Run, writers, acks)
	}
	var disks []journal.Disk
	for m := range strings.SplitSeq(methods, ",") {
		d, err := openDisk(device, m == dsync)
		if err != nil {
			return err
		}
		if m == dsync {
			m = string(journal.Durable)
		}
		l.Methods = append(l.Methods, journal.Method(m))
		disks = append(disks, d)
	}
	return journal.Run(ctx, l, disks, acks)
}

// dsync is Durable by way of the kernel: RWF_DSYNC, which Linux makes a write with FUA and a flush.
const dsync = "dsync"

// openAcks opens a file, or waits for a port.
func openAcks(name string) (io.WriteCloser, error) {
	if filepath.IsAbs(name) {
		return os.Create(name)
	}
	return wire.OpenPort(name, 10*time.Second)
}

// blockDisk is a namespace's block device, past the page cache.
type blockDisk struct {
	fd    int
	dsync bool
	mem   []byte // aligned
}

func openDisk(path string, dsync bool) (*blockDisk, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	mem, err := unix.Mmap(-1, 0, journal.RecordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	return &blockDisk{fd: fd, dsync: dsync, mem: mem}, nil
}

func (d *blockDisk) WriteAt(p []byte, off int64) (int, error) {
	n, err := unix.Pwrite(d.fd, d.mem[:copy(d.mem, p)], off)
	return n, short(p, n, err)
}

func (d *blockDisk) WriteDurable(p []byte, off int64) error {
	b := d.mem[:copy(d.mem, p)]
	if !d.dsync {
		return writeFUA(d.fd, b, off)
	}
	n, err := unix.Pwritev2(d.fd, [][]byte{b}, off, unix.RWF_DSYNC)
	return short(p, n, err)
}

func (d *blockDisk) Flush() error { return unix.Fdatasync(d.fd) }

func short(p []byte, n int, err error) error {
	if err == nil && n < len(p) {
		return io.ErrShortWrite
	}
	return err
}
