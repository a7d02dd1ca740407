package guestdrv

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Namespace is one namespace of a controller as a block device. It is an io.ReaderAt and io.WriterAt, safe for any number of
// goroutines. Offsets and lengths are bytes and must be multiples of BlockSize.
//
// Transfers of any length are divided into commands, several of which are under way at once; they are not atomic as a whole. Memory that is part of
// a Buffer goes to and from the controller directly, other memory is copied.
//
// When a context ends, a call returns at once; the controller may still execute its commands, and a Buffer stays theirs until
// they have ended.
//
// The size follows the controller's. After the namespace has vanished, or has got blocks of another size, calls return an error that wraps
// ErrNoNamespace and says which; Controller.Namespace then returns another object, if there is one again. See Options.OnChange.
type Namespace struct {
	c      *Controller
	nsid   uint32
	shift  uint8         // log2 of the block size
	blocks atomic.Uint64 // size
	id     atomic.Pointer[nvme.IdentifyNamespace]
	gone   atomic.Pointer[error] // why it cannot be used any more

	unmapped atomic.Bool // the controller was asked what is allocated, and cannot tell
}

var (
	_ io.ReaderAt = (*Namespace)(nil)
	_ io.WriterAt = (*Namespace)(nil)
	_ io.Closer   = (*Controller)(nil)
	_ io.Closer   = (*QueuePair)(nil)
)

// NSID returns the namespace's identifier.
func (ns *Namespace) NSID() uint32 { return ns.nsid }

// Size returns the size in bytes.
func (ns *Namespace) Size() int64 { return int64(ns.blocks.Load() << ns.shift) }

// BlockSize returns the size of a logical block in bytes.
func (ns *Namespace) BlockSize() int { return 1 << ns.shift }

// Identify returns the Identify Namespace data as it was read last: at Open, or when the namespace changed. It must not be changed.
func (ns *Namespace) Identify() *nvme.IdentifyNamespace { return ns.id.Load() }

// ReadAt reads len(p) bytes from byte offset off. At the end of the namespace it returns fewer, and io.EOF. After any other error
// the first n bytes have been read.
func (ns *Namespace) ReadAt(p []byte, off int64) (n int, err error) {
	return ns.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt that ctx can end.
func (ns *Namespace) ReadAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if err := ns.checkAligned("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := ns.Err(); err != nil {
		return 0, err
	}
	left := ns.Size() - off
	if left <= 0 {
		return 0, io.EOF
	}
	if int64(len(p)) <= left {
		return ns.transfer(ctx, nvme.IORead, p, off)
	}
	if n, err = ns.transfer(ctx, nvme.IORead, p[:left], off); err == nil {
		err = io.EOF
	}
	return n, err
}

// WriteAt writes p at byte offset off. A write beyond the end is refused as a whole. After any other error the first n bytes
// have been written, and it is not known of the others. Data is durable after Flush.
func (ns *Namespace) WriteAt(p []byte, off int64) (n int, err error) {
	return ns.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext is WriteAt that ctx can end.
func (ns *Namespace) WriteAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if err := ns.check("write", off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	return ns.transfer(ctx, nvme.IOWrite, p, off)
}

// Compare compares p with what is at byte offset off. A difference is a *StatusError with nvme.StatusCompareFailure.
func (ns *Namespace) Compare(ctx context.Context, p []byte, off int64) error {
	if err := ns.offered("compare", nvme.ONCSCompare); err != nil {
		return err
	}
	if err := ns.check("compare", off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	_, err := ns.transfer(ctx, nvme.IOCompare, p, off)
	return err
}

// Flush makes durable what was written before, by anybody. A controller without a volatile write cache (VWC) is not sent the command, which
// would have no effect there: what is completed is durable. NVMe NVM Command Set 1.0c 3.2.1.
func (ns *Namespace) Flush(ctx context.Context) error {
	if ns.HasCache() {
		return ns.simple(ctx, request{opcode: nvme.IOFlush})
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := ns.c.Err(); err != nil {
		return err
	}
	return ns.Err()
}

// Discard tells the controller that length bytes from off are not needed any more. What they read as afterwards is the controller's
// choice; see IdentifyNamespace.DLFEAT.
func (ns *Namespace) Discard(ctx context.Context, off, length int64) error {
	if err := ns.offered("discard", nvme.ONCSDSM); err != nil {
		return err
	}
	if err := ns.check("discard", off, length); err != nil || length == 0 {
		return err
	}
	return ns.simple(ctx, ns.request(nvme.IODSM, off, length))
}

// WriteZeroes makes length bytes from off read as zeroes.
func (ns *Namespace) WriteZeroes(ctx context.Context, off, length int64) error {
	if err := ns.offered("write zeroes", nvme.ONCSWriteZeroes); err != nil {
		return err
	}
	if err := ns.check("write zeroes", off, length); err != nil || length == 0 {
		return err
	}
	return ns.simple(ctx, ns.request(nvme.IOWriteZeroes, off, length))
}

// offered checks for an optional command.
func (ns *Namespace) offered(what string, bit uint16) error {
	if ns.c.Identify().ONCS&bit == 0 {
		return fmt.Errorf("%s: %w", what, ErrUnsupported)
	}
	return nil
}

// check is checkAligned, and that the range is inside the namespace.
func (ns *Namespace) check(what string, off, length int64) error {
	if err := ns.checkAligned(what, off, length); err != nil {
		return err
	}
	if err := ns.Err(); err != nil {
		return err
	}
	if size := ns.Size(); off > size || length > size-off {
		return fmt.Errorf("%s of %d bytes at offset %d: %w, %d bytes", what, length, off, ErrRange, size)
	}
	return nil
}

func (ns *Namespace) checkAligned(what string, off, length int64) error {
	if off < 0 || length < 0 {
		return fmt.Errorf("%s of %d bytes at offset %d: negative: %w", what, length, off, ErrRange)
	}
	if mask := int64(1)<<ns.shift - 1; off&mask != 0 || length&mask != 0 {
		return fmt.Errorf("%s of %d bytes at offset %d: %w, %d bytes", what, length, off, ErrUnaligned, ns.BlockSize())
	}
	return nil
}

func (ns *Namespace) request(opcode uint8, off, length int64) request {
	return request{opcode: opcode, lba: uint64(off) >> ns.shift, blocks: uint64(length) >> ns.shift}
}

func (ns *Namespace) transfer(ctx context.Context, opcode uint8, p []byte, off int64) (int, error) {
	r := ns.request(opcode, off, int64(len(p)))
	r.data = p
	return ns.c.run(ctx, ns, r)
}

func (ns *Namespace) simple(ctx context.Context, r request) error {
	_, err := ns.c.run(ctx, ns, r)
	return err
}

// dsmRangeSize is the size of an nvme.DSMRange in bytes.
const dsmRangeSize = 16

// putRange writes one range of Dataset Management.
func putRange(b []byte, lba uint64, blocks uint32) {
	binary.LittleEndian.PutUint32(b, 0)
	binary.LittleEndian.PutUint32(b[4:], blocks)
	binary.LittleEndian.PutUint64(b[8:], lba)
}
