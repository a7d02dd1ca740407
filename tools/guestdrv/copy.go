package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type readCmd struct {
	deviceFlags `embed:""`
	rangeFlags  `embed:""`
	File        string `placeholder:"FILE" help:"Write to FILE, which is made or replaced. Default: stdout."`
}

type writeCmd struct {
	deviceFlags `embed:""`
	rangeFlags  `embed:""`
	File        string `placeholder:"FILE" help:"Read from FILE. Default: stdin."`
}

type rangeFlags struct {
	NSID   uint32      `name:"nsid" default:"1" placeholder:"N" help:"Namespace (${default})."`
	Offset size.Bytes  `default:"0" placeholder:"SIZE" help:"Where to begin (${default}). Any byte will do."`
	Length *size.Bytes `placeholder:"SIZE" help:"How many bytes. Default: to the end of the namespace (read), or of the input (write)."`
	Quiet  bool        `short:"q" help:"Print no summary."`
}

// Help is what stands below the arguments.
func (readCmd) Help() string {
	return `Offset and length need not be multiples of the block size.

Example

  guestdrv read vfio-user:/run/vm1.sock --offset 1MiB --length 64KiB | xxd | less`
}

// Help is what stands below the arguments.
func (writeCmd) Help() string {
	return `Offset and length need not be multiples of the block size: of a block that is written in part, the rest is read first and written back as it was. That is not atomic against others who write to the same block.

The data is flushed, so when the program exits 0 it is durable.

Example

  guestdrv write vfio-user:/run/vm1.sock --file disk.img`
}

const (
	chunkSize  = 512 << 10 // bytes of each transfer; the driver splits it further if it must
	chunkCount = 8         // transfers under way
	barDelay   = 2 * time.Second
)

// copyOptions are those of a controller that is used for copying only.
func copyOptions() guestdrv.Options {
	return guestdrv.Options{DMASize: chunkSize*chunkCount*2 + 16<<20, Queues: 1}
}

// chunks returns the buffers of a copy, in memory that the device reaches, and what gives them back.
func chunks(c *guestdrv.Controller, blockSize int) (bufs [][]byte, free func(), err error) {
	var taken []*guestdrv.Buffer
	free = func() {
		for _, b := range taken {
			b.Free()
		}
	}
	for range chunkCount {
		b, err := c.Alloc(max(chunkSize, blockSize))
		if err != nil {
			free()
			return nil, nil, err
		}
		taken, bufs = append(taken, b), append(bufs, b.Bytes())
	}
	return bufs, free, nil
}

// Run copies from the namespace.
func (r *readCmd) Run(ctx context.Context, out *cli.Output) (err error) {
	r.separate(out)
	c, err := r.open(ctx, out, copyOptions())
	if err != nil {
		return err
	}
	defer c.Close()
	ns, err := namespace(c, r.NSID)
	if err != nil {
		return err
	}
	length, err := r.resolve(ns, -1)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	bufs, free, err := chunks(c, ns.BlockSize())
	if err != nil {
		return err
	}
	defer free()
	to := out.Stdout
	if r.File != "" {
		if to, err = os.Create(r.File); err != nil {
			return cli.UsageError{Err: err}
		}
		defer func() { err = errors.Join(err, to.Close()) }()
	} else if text.IsTerminal(to) {
		return cli.Usagef("stdout is a terminal: use --file FILE, or pipe it into something")
	}
	if err := r.lock(out, c); err != nil {
		return err
	}
	p := newCopyProgress(out.Stderr, "read", length)
	err = readRange(ctx, ns, to, int64(r.Offset), length, bufs, p.add)
	p.end(err == nil && !r.Quiet)
	return err
}

// Run copies to the namespace.
func (w *writeCmd) Run(ctx context.Context, out *cli.Output) error {
	w.separate(out)
	from := os.Stdin
	have := int64(-1) // bytes that the input has, where that is known
	if w.File != "" {
		f, err := os.Open(w.File)
		if err != nil {
			return cli.UsageError{Err: err}
		}
		defer f.Close()
		from = f
	}
	st, err := from.Stat()
	if err != nil {
		return cli.UsageError{Err: err}
	}
	switch {
	case st.IsDir():
		return cli.Usagef("%s is a directory: name a file", w.File)
	case st.Mode().IsRegular():
		at, err := from.Seek(0, io.SeekCurrent)
		if err != nil {
			return cli.UsageError{Err: err}
		}
		have = max(st.Size()-at, 0)
	}
	c, err := w.open(ctx, out, copyOptions())
	if err != nil {
		return err
	}
	defer c.Close()
	ns, err := namespace(c, w.NSID)
	if err != nil {
		return err
	}
	length, err := w.resolve(ns, have)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	bufs, free, err := chunks(c, ns.BlockSize())
	if err != nil {
		return err
	}
	defer free()
	if err := w.lock(out, c); err != nil {
		return err
	}
	p := newCopyProgress(out.Stderr, "wrote", length)
	err = writeRange(ctx, ns, &patientReader{ctx, from}, int64(w.Offset), length, bufs, p.add)
	p.end(err == nil && !w.Quiet)
	return err
}

// resolve returns how many bytes to copy; have is what the input has, -1 if it is not known or there is none. It
// returns -1 for "until the input ends".
func (r *rangeFlags) resolve(ns blocks, have int64) (int64, error) {
	room := ns.Size() - int64(r.Offset)
	if int64(r.Offset) < 0 || room < 0 {
		return 0, fmt.Errorf("--offset %v is beyond the end of namespace %d, which has %v", r.Offset, r.NSID, size.Bytes(ns.Size()))
	}
	length := have
	if r.Length != nil {
		length = int64(*r.Length)
		if have >= 0 && length > have {
			return 0, fmt.Errorf("--length %v: the input has only %v", *r.Length, size.Bytes(have))
		}
	}
	if length > room || r.Length != nil && length < 0 {
		return 0, fmt.Errorf("%v from offset %v do not fit into namespace %d, which has %v", size.Bytes(length), r.Offset, r.NSID, size.Bytes(ns.Size()))
	}
	return length, nil
}

// patientReader is a file whose Read ends with ctx also while there is nothing to read yet.
type patientReader struct {
	ctx context.Context
	f   *os.File
}

func (r *patientReader) Read(p []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(r.f.Fd()), Events: unix.POLLIN}}
	for {
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
		if n, err := unix.Poll(fds, 100); n > 0 || err != nil && err != unix.EINTR {
			return r.f.Read(p) // which also says what is wrong
		}
	}
}

// copyProgress is the bar of a copy and its summary.
type copyProgress struct {
	f     *os.File
	line  *text.Line
	verb  string
	begin time.Time
	done  int64
	total int64 // -1: not known
	shown time.Time
}

func newCopyProgress(f *os.File, verb string, total int64) *copyProgress {
	return &copyProgress{f: f, line: text.NewLine(f, barDelay), verb: verb, begin: time.Now(), total: total}
}

// add records n more bytes. It is called by one goroutine at a time.
func (p *copyProgress) add(n int64) {
	p.done += n
	now := time.Now()
	if now.Sub(p.shown) < 100*time.Millisecond {
		return
	}
	p.shown = now
	elapsed := now.Sub(p.begin)
	rate := size.Bytes(float64(p.done)/max(elapsed.Seconds(), 1e-9)).Human() + "/s"
	if p.total < 0 {
		p.line.Set(fmt.Sprintf("%s %s  %s", p.verb, size.Bytes(p.done).Human(), rate))
		return
	}
	shown := fmt.Sprintf("%s of %s  %s", size.Bytes(p.done).Human(), size.Bytes(p.total).Human(), rate)
	p.line.Set(text.Meter(float64(p.done), float64(p.total), shown, elapsed, text.Width(p.f)-1))
}

func (p *copyProgress) end(summary bool) {
	p.line.Clear()
	if summary {
		took := time.Since(p.begin)
		fmt.Fprintf(p.f, "guestdrv: %s %d bytes (%s) in %s, %s/s\n", p.verb, p.done, size.Bytes(p.done).Human(), text.Duration(took),
			size.Bytes(float64(p.done)/max(took.Seconds(), 1e-9)).Human())
	}
}
