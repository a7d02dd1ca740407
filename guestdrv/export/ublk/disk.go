package ublk

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// methods stands in for the queues of a disk that has none, or too few, with a goroutine for each request: that serves some tens of thousands of
// requests a second less.
type methods struct{ export.Disk }

// DMAMemory implements export.Memory.
func (m methods) DMAMemory(n int) (p []byte, free func(), err error) {
	return export.DMAMemory(m.Disk, n)
}

// NewQueue opens an event descriptor.
func (m methods) NewQueue(int) (export.Queue, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	q := &diskQueue{disk: m.Disk, fd: fd}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	return q, nil
}

// Again returns false: the methods of a Disk see to that themselves.
func (methods) Again(error) bool { return false }

// diskQueue is a Queue over a Disk.
type diskQueue struct {
	disk    export.Disk
	fd      int
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup
	hidden  []export.Command
	under   int // taken and not reaped

	mu    sync.Mutex
	ended []export.Result
	armed bool // somebody sleeps on fd, or will
}

func (q *diskQueue) Submit(cmds []export.Command) (int, error) {
	q.hidden = append(q.hidden, cmds...)
	q.under += len(cmds)
	return len(cmds), nil
}

func (q *diskQueue) Publish() error {
	for _, c := range q.hidden {
		q.running.Go(func() { q.end(export.Result{Tag: c.Tag, Status: statusOf(q.do(c))}) })
	}
	q.hidden = q.hidden[:0]
	return nil
}

func (q *diskQueue) do(c export.Command) error {
	d := q.disk
	size := int64(d.BlockSize())
	off, n := int64(c.LBA)*size, int64(c.Blocks)*size
	switch c.Op {
	case nvme.IORead:
		_, err := d.ReadAtContext(q.ctx, c.Data, off)
		return err
	case nvme.IOWrite:
		write := d.WriteAtContext
		if c.FUA {
			write = d.WriteFUA
		}
		_, err := write(q.ctx, c.Data, off)
		return err
	case nvme.IOFlush:
		return d.Flush(q.ctx)
	case nvme.IOWriteZeroes:
		err := d.WriteZeroes(q.ctx, off, n)
		if err == nil && c.FUA {
			err = d.Flush(q.ctx)
		}
		return err
	case nvme.IODSM:
		return d.Discard(q.ctx, off, n)
	}
	return nvme.StatusInvalidOpcode.WithDNR().Err()
}

// statusOf is the status that err stands for. What is no status of the controller's is not tried again: the disk has done that.
func statusOf(err error) nvme.Status {
	if err == nil {
		return nvme.StatusSuccess
	}
	if e, ok := errors.AsType[*nvme.StatusError](err); ok {
		return e.Status
	}
	return nvme.StatusInternalError.WithDNR()
}

func (q *diskQueue) end(r export.Result) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = append(q.ended, r)
	if q.armed {
		q.armed = false
		_, _ = unix.Write(q.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

func (q *diskQueue) Reap(out []export.Result) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := copy(out, q.ended)
	q.ended = append(q.ended[:0], q.ended[n:]...)
	q.under -= n
	return n, nil
}

func (q *diskQueue) Outstanding() int { return q.under }
func (q *diskQueue) EventFD() int     { return q.fd }

func (q *diskQueue) Arm() (bool, error) {
	var b [8]byte
	_, _ = unix.Read(q.fd, b[:]) // ours alone, and it does not block
	q.mu.Lock()
	defer q.mu.Unlock()
	q.armed = len(q.ended) == 0
	return q.armed, nil
}

func (q *diskQueue) Close() error {
	q.cancel()
	q.running.Wait()
	return unix.Close(q.fd)
}
