package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/shadowbell/shadowbell/tools/internal/size"
)

// blocks is a namespace as a copy sees it; *guestdrv.Namespace is one.
type blocks interface {
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
	WriteAtContext(ctx context.Context, p []byte, off int64) (int, error)
	Flush(ctx context.Context) error
	Size() int64
	BlockSize() int
}

// chunk is a buffer on its way: full blocks of the namespace from at, and the part of them that belongs to the copy.
type chunk struct {
	buf        []byte
	at         int64
	data       []byte     // of buf
	outcome    chan error // of the read
	blocksUsed int        // bytes of buf that are transferred
}

// readRange copies length bytes from offset off of ns to w, in order, with a read under way in each of bufs, which
// are multiples of the block size. -1 is all to the end. done is told of each piece.
func readRange(ctx context.Context, ns blocks, w io.Writer, off, length int64, bufs [][]byte, done func(int64)) error {
	if length < 0 {
		length = ns.Size() - off
	}
	end := off + length
	ctx, cancel := context.WithCancel(ctx)
	free, order := make(chan *chunk, len(bufs)), make(chan *chunk, len(bufs))
	for _, b := range bufs {
		free <- &chunk{buf: b, outcome: make(chan error, 1)}
	}
	var reads sync.WaitGroup
	defer reads.Wait() // nobody may write into bufs after the return
	defer cancel()
	reads.Go(func() {
		defer close(order)
		bs := int64(ns.BlockSize())
		for at := off / bs * bs; at < end; {
			var c *chunk
			select {
			case c = <-free:
			case <-ctx.Done():
				return
			}
			c.at = at
			at = min(at+int64(len(c.buf)), (end+bs-1)/bs*bs)
			c.blocksUsed = int(at - c.at)
			c.data = c.buf[max(off-c.at, 0):min(end-c.at, int64(c.blocksUsed))]
			reads.Go(func() {
				_, err := ns.ReadAtContext(ctx, c.buf[:c.blocksUsed], c.at)
				c.outcome <- err
			})
			order <- c
		}
	})
	for c := range order {
		if err := <-c.outcome; err != nil {
			return fmt.Errorf("reading at offset %d: %w", c.at, err)
		}
		if _, err := w.Write(c.data); err != nil {
			return err
		}
		done(int64(len(c.data)))
		free <- c
	}
	return ctx.Err()
}

// writeRange copies length bytes of r, or -1 for all there is, to offset off of ns, with a write under way in each
// of bufs, which are multiples of the block size, and flushes. Of a block that is written in part the rest
// stays as it was. done is told of each piece, by one goroutine at a time.
func writeRange(ctx context.Context, ns blocks, r io.Reader, off, length int64, bufs [][]byte, done func(int64)) error {
	room := ns.Size() - off
	if length >= 0 {
		room = min(room, length)
	}
	free := make(chan []byte, len(bufs))
	for _, b := range bufs {
		free <- b
	}
	writes, wctx := errgroup.WithContext(ctx)
	var mu sync.Mutex // guards done
	readErr := func() error {
		bs := int64(ns.BlockSize())
		for pos := off; ; {
			var buf []byte
			select {
			case buf = <-free:
			case <-wctx.Done():
				return nil // the write's error is the cause
			}
			at := pos / bs * bs
			skip := int(pos - at)
			n, err := io.ReadFull(r, buf[skip:min(int64(len(buf)), int64(skip)+off+room-pos)])
			ended := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
			if err != nil && !ended {
				return fmt.Errorf("reading the input: %w", err)
			}
			used, err := complete(wctx, ns, buf, at, skip, skip+n)
			if err != nil {
				return err
			}
			if n > 0 {
				writes.Go(func() error {
					if _, err := ns.WriteAtContext(wctx, buf[:used], at); err != nil {
						return fmt.Errorf("writing at offset %d: %w", at, err)
					}
					mu.Lock()
					done(int64(n))
					mu.Unlock()
					free <- buf
					return nil
				})
			}
			pos += int64(n)
			switch {
			case pos-off == room && length < 0:
				return expectEnd(r, ns.Size())
			case pos-off == room:
				return nil
			case ended && length >= 0:
				return fmt.Errorf("the input ended after %d bytes, %d were to be written", pos-off, length)
			case ended:
				return nil
			}
		}
	}()
	if err := errors.Join(writes.Wait(), readErr); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := ns.Flush(ctx); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// complete fills what is missing of the first and the last block of buf, which is to be written at offset at and
// holds data in [from, to), with what is there already. It returns how many bytes there are to write.
func complete(ctx context.Context, ns blocks, buf []byte, at int64, from, to int) (int, error) {
	bs := ns.BlockSize()
	used := (to + bs - 1) / bs * bs
	if from == to {
		return used, nil
	}
	old := make([]byte, bs)
	if from > 0 {
		if _, err := ns.ReadAtContext(ctx, old, at); err != nil {
			return 0, fmt.Errorf("reading the block at offset %d, of which only a part is written: %w", at, err)
		}
		copy(buf[:from], old)
	}
	if last := to % bs; last > 0 {
		if _, err := ns.ReadAtContext(ctx, old, at+int64(used-bs)); err != nil {
			return 0, fmt.Errorf("reading the block at offset %d, of which only a part is written: %w", at+int64(used-bs), err)
		}
		copy(buf[to:used], old[last:])
	}
	return used, nil
}

// expectEnd reports input that does not fit any more.
func expectEnd(r io.Reader, total int64) error {
	var one [1]byte
	switch n, err := io.ReadFull(r, one[:]); {
	case n > 0:
		return fmt.Errorf("the namespace ends at %v and the input does not: it was written up to there", size.Bytes(total))
	case errors.Is(err, io.EOF):
		return nil
	default:
		return fmt.Errorf("reading the input: %w", err)
	}
}
