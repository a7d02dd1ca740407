package hostnvme

import (
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const (
	bounceSize  = 64 << 10 // bytes; a multiple of the device's page
	bounceCount = 8        // of each pair
)

// bounceBuffer is DMA memory for data that the device does not reach where it is. A command that finds none waits for one.
type bounceBuffer struct {
	mem   []byte
	pages []uint64 // IOVAs
}

func newBounceBuffer(mem *device.DMARegion, off uint64) (b *bounceBuffer, err error) {
	b = &bounceBuffer{}
	if b.mem, err = mem.Bytes(off, bounceSize); err != nil {
		return nil, err
	}
	for at := uint64(0); at < bounceSize; at += devicePage {
		b.pages = append(b.pages, mem.IOVAOf(off+at))
	}
	return b, nil
}

// fill copies n bytes of vec from at on into the buffer. Guest memory may have gone.
func (b *bounceBuffer) fill(vec []Seg, at position, n uint64) nvme.Status {
	return b.move(vec, at, n, func(buf, guest []byte) { copy(buf, guest) })
}

// empty copies n bytes of the buffer to vec.
func (b *bounceBuffer) empty(vec []Seg, at position, n uint64) nvme.Status {
	return b.move(vec, at, n, func(buf, guest []byte) { copy(guest, buf) })
}

func (b *bounceBuffer) move(vec []Seg, at position, n uint64, f func(buf, guest []byte)) nvme.Status {
	buf := b.mem[:n]
	if err := shm.Guard(func() {
		for len(buf) > 0 && at.seg < len(vec) {
			step := min(vec[at.seg].Len-at.off, uint64(len(buf)))
			f(buf[:step], segBytes(&vec[at.seg], at.off, step))
			buf = buf[step:]
			at.advance(vec, step)
		}
	}); err != nil {
		return nvme.StatusDataTransferError
	}
	if len(buf) > 0 {
		return nvme.StatusInternalError.WithDNR() // there is less memory than the request says
	}
	return nvme.StatusSuccess
}
