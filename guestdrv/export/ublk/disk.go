package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// DiskBackend serves any Disk, with a goroutine for each request: for controllers that have no queue pair left, at some tens of thousands of
// requests a second less than queue pairs give.
type DiskBackend struct {
	disk export.Disk

	mu   sync.Mutex
	bufs map[uint64][]byte // by the address that stands for the IOVA
}

// NewDiskBackend returns a Backend over d.
func NewDiskBackend(d export.Disk) *DiskBackend {
	return &DiskBackend{disk: d, bufs: map[uint64][]byte{}}
}

// NewQueue opens an event descriptor.
func (b *DiskBackend) NewQueue(int) (Queue, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	q := &diskQueue{b: b, fd: fd}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	return q, nil
}

// Alloc returns the disk's own memory, so that nothing is copied on the way.
func (b *DiskBackend) Alloc(n int) (Buffer, error) {
	p, free, err := export.DMAMemory(b.disk, n)
	if err != nil {
		return nil, err
	}
	buf := &diskBuffer{mem: p, free: free, b: b}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bufs[buf.IOVA()] = p
	return buf, nil
}

// Again returns false: a Disk sees to that itself.
func (b *DiskBackend) Again(error) bool { return false }

func (b *DiskBackend) at(iova uint64) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bufs[iova]
}

type diskBuffer struct {
	mem  []byte
	free func()
	b    *DiskBackend
}

func (d *diskBuffer) Bytes() []byte { return d.mem }
func (d *diskBuffer) IOVA() uint64  { return addressOf(d.mem) }
func (d *diskBuffer) Free() {
	d.b.mu.Lock()
	delete(d.b.bufs, d.IOVA())
	d.b.mu.Unlock()
	d.free()
}

// diskQueue is a Queue over a Disk.
type diskQueue struct {
	b       *DiskBackend
	fd      int
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup
	hidden  []Command
	under   int // taken and not reaped

	mu    sync.Mutex
	ended []Result
	armed bool // somebody sleeps on fd, or will
}

func (q *diskQueue) Submit(cmds []Command) (int, error) {
	q.hidden = append(q.hidden, cmds...)
	q.under += len(cmds)
	return len(cmds), nil
}

func (q *diskQueue) Publish() error {
	for _, c := range q.hidden {
		q.running.Go(func() { q.end(Result{Tag: c.Tag, Status: statusOf(q.do(c))}) })
	}
	q.hidden = q.hidden[:0]
	return nil
}

func (q *diskQueue) do(c Command) error {
	d := q.b.disk
	size := int64(d.BlockSize())
	off, n := int64(c.LBA)*size, int64(c.Blocks)*size
	switch c.Op {
	case nvme.IORead:
		_, err := d.ReadAtContext(q.ctx, q.b.at(c.IOVA)[:n], off)
		return err
	case nvme.IOWrite:
		write := d.WriteAtContext
		if c.FUA {
			write = d.WriteFUA
		}
		_, err := write(q.ctx, q.b.at(c.IOVA)[:n], off)
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
		r := q.b.at(c.IOVA)
		return d.Discard(q.ctx, int64(binary.LittleEndian.Uint64(r[8:]))*size, int64(binary.LittleEndian.Uint32(r[4:]))*size)
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

func (q *diskQueue) end(r Result) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = append(q.ended, r)
	if q.armed {
		q.armed = false
		_, _ = unix.Write(q.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

func (q *diskQueue) Reap(out []Result) (int, error) {
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
