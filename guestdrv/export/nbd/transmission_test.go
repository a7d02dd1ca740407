package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func forModes(t *testing.T, test func(t *testing.T, m mode)) {
	for name, m := range modes {
		t.Run(name, func(t *testing.T) { test(t, m) })
	}
}

func random(seed, n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	rng.Read(b)
	return b
}

// TestReadBackWhatWasWritten compares with a naive model: a slice of bytes.
func TestReadBackWhatWasWritten(t *testing.T) {
	forModes(t, func(t *testing.T, m mode) {
		for _, block := range []int{512, 4096} {
			s, d := one(t, block, nil)
			c := open(t, s, m, "1")
			want := make([]byte, d.Size())
			rng := rand.New(rand.NewPCG(uint64(m), uint64(block)))
			for i := range 200 {
				blocks := len(want) / block
				off := rng.IntN(blocks)
				n := min(1+rng.IntN(40), blocks-off)
				if rng.IntN(20) == 0 {
					n = min(1+rng.IntN(3*maxPayload/block), blocks-off)
				}
				part := want[off*block : (off+n)*block]
				at, length := uint64(off*block), uint64(n*block)
				var r result
				switch rng.IntN(4) {
				case 0:
					r = c.do(cmdRead, 0, at, length, nil)
					if !bytes.Equal(r.data, part) {
						t.Fatal("data differs")
					}
				case 1:
					copy(part, random(i, len(part)))
					r = c.do(cmdWrite, uint16(rng.IntN(2)), at, length, part)
				case 2:
					clear(part)
					r = c.do(cmdWriteZeroes, uint16(rng.IntN(4)), at, length, nil)
				case 3:
					clear(part) // memdisk's discarded blocks read as zeroes
					r = c.do(cmdTrim, uint16(rng.IntN(2)), at, length, nil)
				}
				if r.errno != 0 {
					t.Fatal(r.errno)
				}
			}
			c.close()
			if !bytes.Equal(d.Bytes(), want) {
				t.Error("the disk is not what it has to be")
			}
		}
	})
}

func TestRefusals(t *testing.T) {
	forModes(t, func(t *testing.T, m mode) {
		s := serve(t, Config{Grace: within, Exports: []Export{
			{Name: "rw", Disk: memdisk.New(8192, 512)},
			{Name: "large", Disk: memdisk.New(72<<10, 512)},
			{Name: "4k", Disk: memdisk.New(64, 4096)},
			{Name: "ro", Disk: memdisk.New(64, 512), ReadOnly: true},
			{Name: "protected", Disk: &memdisk.Disk{Block: 512, Protect: true}},
			{Name: "plain", Disk: func() *memdisk.Disk {
				d := memdisk.New(64, 512)
				d.Lacks = memdisk.Lack{Discard: true, Zeroes: true}
				return d
			}()},
		}})
		clients := map[string]*client{}
		k := make([]byte, 512)
		tooLong := unix.EOVERFLOW
		noStatus := unix.Errno(0)
		df := unix.Errno(0)
		if m == simple {
			tooLong, noStatus, df = unix.EINVAL, unix.EINVAL, unix.EINVAL
		}
		for _, r := range []struct {
			export     string
			cmd, flags uint16
			off, n     uint64
			data       []byte
			want       unix.Errno
		}{
			{"rw", cmdRead, 0, 0, 512, nil, 0},
			{"rw", cmdRead, cmdFlagFUA, 0, 512, nil, 0},
			{"rw", cmdRead, cmdFlagDF, 0, 512, nil, df},
			{"rw", cmdRead, 0, 0, 0, nil, unix.EINVAL},
			{"rw", cmdRead, 0, 100, 512, nil, unix.EINVAL},
			{"rw", cmdRead, 0, 0, 100, nil, unix.EINVAL},
			{"rw", cmdRead, 0, 8192*512 - 512, 1024, nil, unix.EINVAL},
			{"rw", cmdRead, 0, 1<<64 - 512, 512, nil, unix.EINVAL},
			{"rw", cmdRead, cmdFlagDF, 0, maxPayload + 512, nil, tooLong},
			{"rw", cmdRead, 0, 0, maxPayload + 512, nil, 0},
			{"large", cmdRead, 0, 0, mostPayload + 512, nil, tooLong},
			{"rw", cmdRead, cmdFlagNoHole, 0, 512, nil, unix.EINVAL},
			{"rw", cmdRead, 1 << 9, 0, 512, nil, unix.EINVAL},
			{"rw", cmdWrite, 0, 8192 * 512, 512, k, unix.ENOSPC},
			{"rw", cmdWrite, 0, 1<<64 - 512, 512, k, unix.ENOSPC},
			{"rw", cmdWrite, 0, 1, 512, k, unix.EINVAL},
			{"rw", cmdWrite, cmdFlagFastZero, 0, 512, k, unix.EINVAL},
			{"rw", cmdWrite, 0, 0, maxPayload + 512, make([]byte, maxPayload+512), 0},
			{"rw", cmdWrite, 0, 8192*512 - maxPayload, maxPayload + 512, make([]byte, maxPayload+512), unix.ENOSPC},
			{"rw", cmdWriteZeroes, 0, 8192*512 - 512, 1024, nil, unix.ENOSPC},
			{"rw", cmdWriteZeroes, cmdFlagFastZero | cmdFlagNoHole | cmdFlagFUA, 0, 1024, nil, 0},
			{"rw", cmdTrim, 0, 8192*512 - 512, 1024, nil, unix.EINVAL},
			{"rw", cmdTrim, cmdFlagNoHole, 0, 1024, nil, unix.EINVAL},
			{"rw", cmdFlush, cmdFlagFUA, 0, 0, nil, 0},
			{"rw", cmdFlush, cmdFlagReqOne, 0, 0, nil, unix.EINVAL},
			{"rw", 5, 0, 0, 512, nil, unix.EINVAL},  // NBD_CMD_CACHE
			{"rw", 77, 0, 0, 512, nil, unix.EINVAL}, // nothing
			{"rw", cmdBlockStatus, 0, 0, 512, nil, noStatus},
			{"rw", cmdBlockStatus, 0, 8192 * 512, 512, nil, unix.EINVAL},
			{"rw", cmdBlockStatus, 0, 0, 0, nil, unix.EINVAL},
			{"4k", cmdRead, 0, 512, 4096, nil, unix.EINVAL},
			{"4k", cmdWrite, 0, 0, 512, k, unix.EINVAL},
			{"ro", cmdWrite, 0, 0, 512, k, unix.EPERM},
			{"ro", cmdWriteZeroes, 0, 0, 512, nil, unix.EPERM},
			{"ro", cmdTrim, 0, 0, 512, nil, unix.EPERM},
			{"ro", cmdRead, 0, 0, 512, nil, 0},
			{"protected", cmdWrite, 0, 0, 512, k, unix.EPERM},
			{"plain", cmdTrim, 0, 0, 512, nil, unix.EINVAL},
			{"plain", cmdWriteZeroes, 0, 0, 512, nil, 0},
			{"plain", cmdWriteZeroes, cmdFlagFastZero, 0, 512, nil, unix.ENOTSUP},
		} {
			c := clients[r.export]
			if c == nil {
				c = open(t, s, m, r.export)
				clients[r.export] = c
			}
			if got := c.do(r.cmd, r.flags, r.off, r.n, r.data); got.errno != r.want {
				t.Errorf("%s: command %d, flags %#x, %d bytes at %d: %v, want %v", r.export, r.cmd, r.flags, r.n, r.off, got.errno, r.want)
			}
		}
		if m == extended {
			// A payload where there is none is read over.
			c := clients["rw"]
			if r := c.do(cmdFlush, 0, 0, 512, k); r.errno != unix.EINVAL {
				t.Errorf("flush with a payload: %v", r.errno)
			}
			// And a write without the flag of its payload, as QEMU sends it, is a write all the same.
			c.nextWord++
			c.send(uint32(magicExtended), uint16(0), uint16(cmdWrite), c.nextWord, uint64(0), uint64(512), bytes.Repeat([]byte{9}, 512))
			if r := c.result(0); r.errno != 0 {
				t.Error(r.errno)
			}
			if r := c.do(cmdRead, 0, 0, 512, nil); r.data[511] != 9 {
				t.Error("it was not written")
			}
		}
	})
}

// TestErrorsOfTheDisk: what the device says becomes the protocol's error, and the buffer is not used again.
func TestErrorsOfTheDisk(t *testing.T) {
	forModes(t, func(t *testing.T, m mode) {
		var failure atomic.Pointer[error]
		s, d := one(t, 512, nil)
		d.Before = func(context.Context, memdisk.Op, int64, int64) error { return *failure.Load() }
		c := open(t, s, m, "1")
		for _, e := range []struct {
			err  error
			want unix.Errno
		}{
			{errors.New("broken"), unix.EIO},
			{fmt.Errorf("x: %w", nvme.StatusCapacityExceeded.Err()), unix.ENOSPC},
			{nvme.StatusUnrecoveredRead.Err(), unix.EIO},
			{nvme.StatusNamespaceWriteProtected.Err(), unix.EPERM},
			{nvme.StatusInvalidOpcode.Err(), unix.EINVAL},
			{nvme.StatusInvalidNamespace.Err(), unix.ESHUTDOWN},
			{unix.ETIMEDOUT, unix.EIO},
			{nil, 0},
		} {
			failure.Store(&e.err)
			for _, cmd := range []uint16{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdWriteZeroes} {
				var data []byte
				n := uint64(512)
				switch cmd {
				case cmdWrite:
					data = make([]byte, 512)
				case cmdFlush:
					n = 0
				}
				if r := c.do(cmd, 0, 0, n, data); r.errno != e.want {
					t.Errorf("%v, command %d: %v, want %v", e.err, cmd, r.errno, e.want)
				}
			}
		}
	})
}

// TestDurability: FUA and flush reach the disk, except where there is no cache.
func TestDurability(t *testing.T) {
	for _, cacheless := range []bool{false, true} {
		s, d := one(t, 512, nil)
		d.Cacheless = cacheless
		s.Set(Export{Name: "1", Disk: d}) // looks at the disk anew
		c := open(t, s, structured, "1")
		k := make([]byte, 512)
		c.do(cmdWrite, cmdFlagFUA, 0, 512, k)
		c.do(cmdWrite, 0, 0, 512, k)
		if d.Count[memdisk.WriteFUA].Load() != 1 || d.Count[memdisk.Write].Load() != 1 || d.Count[memdisk.Flush].Load() != 0 {
			t.Error("writes")
		}
		c.do(cmdTrim, 0, 0, 512, nil)
		c.do(cmdTrim, cmdFlagFUA, 0, 512, nil)
		c.do(cmdWriteZeroes, cmdFlagFUA, 0, 512, nil)
		c.do(cmdWriteZeroes, cmdFlagFUA|cmdFlagNoHole, 0, 512, nil)
		c.do(cmdFlush, 0, 0, 0, nil)
		want := int64(4)
		if cacheless {
			want = 0
		}
		if n := d.Count[memdisk.Flush].Load(); n != want {
			t.Errorf("cacheless %v: %d flushes, want %d", cacheless, n, want)
		}
		if a, b := d.Count[memdisk.Deallocate].Load(), d.Count[memdisk.Zeroes].Load(); a != 1 || b != 1 {
			t.Errorf("%d with holes, %d without", a, b)
		}
	}
}

func TestZeroesByWriting(t *testing.T) {
	s, d := one(t, 512, nil)
	d.Lacks.Zeroes = true
	s.Set(Export{Name: "1", Disk: d})
	c := open(t, s, structured, "1")
	if _, err := d.WriteAtContext(t.Context(), random(1, int(d.Size())), 0); err != nil {
		t.Fatal(err)
	}
	if r := c.do(cmdWriteZeroes, 0, 512, uint64(d.Size())-1024, nil); r.errno != 0 {
		t.Fatal(r.errno)
	}
	got := d.Bytes()
	if bytes.Count(got[512:len(got)-512], []byte{0}) != len(got)-1024 || got[511] == 0 && got[510] == 0 {
		t.Error("not what it has to be")
	}
}

func TestBlockStatus(t *testing.T) {
	for name, m := range modes {
		if m == simple {
			continue
		}
		s, d := one(t, 512, nil)
		c := open(t, s, m, "1")
		status := func(flags uint16, off, n uint64) (out []int) {
			t.Helper()
			r := c.do(cmdBlockStatus, flags, off, n, nil)
			if r.errno != 0 || binary.BigEndian.Uint32(r.data) != contextID {
				t.Fatalf("%s: %v, %x", name, r.errno, r.data)
			}
			if m == structured {
				for p := r.data[4:]; len(p) > 0; p = p[8:] {
					out = append(out, int(binary.BigEndian.Uint32(p)), int(binary.BigEndian.Uint32(p[4:])))
				}
				return out
			}
			if int(binary.BigEndian.Uint32(r.data[4:])) != (len(r.data)-8)/16 {
				t.Fatalf("%x", r.data)
			}
			for p := r.data[8:]; len(p) > 0; p = p[16:] {
				out = append(out, int(binary.BigEndian.Uint64(p)), int(binary.BigEndian.Uint64(p[8:])))
			}
			return out
		}
		size := int(d.Size())
		if got := status(0, 0, uint64(size)); !slices.Equal(got, []int{size, stateHole | stateZero}) {
			t.Errorf("%s: %v", name, got)
		}
		for i := range 2 {
			if _, err := d.WriteAtContext(t.Context(), random(1, 1024), int64(i*4096)); err != nil {
				t.Fatal(err)
			}
		}
		if got := status(0, 512, 8192); !slices.Equal(got, []int{512, 0, 3072, 3, 1024, 0, 3584, 3}) {
			t.Errorf("%s: %v", name, got)
		}
		if got := status(cmdFlagReqOne, 1024, 8192); !slices.Equal(got, []int{3072, 3}) {
			t.Errorf("%s: %v", name, got)
		}
		// More pieces than an answer has room for: it is cut, and not at nothing.
		for i := 0; i < size; i += 1024 {
			if _, err := d.WriteAtContext(t.Context(), random(1, 512), int64(i)); err != nil {
				t.Fatal(err)
			}
		}
		if got := status(0, 0, uint64(size)); len(got) < 1000 || len(got) > statusSize/4 {
			t.Errorf("%s: %d pieces", name, len(got)/2)
		}
		d.Lacks.ReadsZeroes = true
		s.Set(Export{Name: "1", Disk: d})
		c = open(t, s, m, "1")
		if got := status(cmdFlagReqOne, 1536, 512); !slices.Equal(got, []int{512, stateHole}) {
			t.Errorf("%s: %v", name, got)
		}
		d.Lacks.Map = true
		s.Set(Export{Name: "1", Disk: d})
		c = open(t, s, m, "1")
		if got := status(0, 0, uint64(size)); !slices.Equal(got, []int{size, 0}) {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestErrorsInTheMiddle: a piece of a large request fails.
func TestErrorsInTheMiddle(t *testing.T) {
	forModes(t, func(t *testing.T, m mode) {
		s, d := one(t, 512, nil)
		d.Before = func(_ context.Context, op memdisk.Op, off, _ int64) error {
			if off == 2*maxPayload && op != memdisk.Flush {
				return nvme.StatusUnrecoveredRead.Err()
			}
			return nil
		}
		c := open(t, s, m, "1")
		const n = 3*maxPayload + 512
		if r := c.do(cmdWrite, 0, 0, n, random(1, n)); r.errno != unix.EIO {
			t.Errorf("write: %v", r.errno)
		}
		if r := c.do(cmdFlush, 0, 0, 0, nil); r.errno != 0 {
			t.Errorf("what came after it: %v", r.errno)
		}
		cookie := c.request(cmdRead, 0, 0, n, nil)
		if m != simple {
			if r := c.result(0); r.errno != unix.EIO || r.cookie != cookie {
				t.Errorf("read: %v", r.errno)
			}
			return
		}
		// There is no way to say it, so the connection ends before the data is complete.
		c.recv(16 + 2*maxPayload)
		c.expectEnd()
	})
}
