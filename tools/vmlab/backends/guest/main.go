// Command guest is a guest of hostmed's for the tests of package backends: it does what guestdrv does not.
//
//	guest outside DEVICE   names blocks that the namespace has not got, in all ways there are, and prints what becomes of each command
//	guest smart DEVICE     prints what the health log says of the device
//	guest warned DEVICE    waits for an event of the SMART log, and prints it and the critical warnings
//	guest trim DEVICE      deallocates blocks 8192 to 24575, and zeroes the 1024 behind them
//	guest watch DEVICE     uses all namespaces until SIGTERM, and prints what it is told of them: see spectator
//	guest dma DEVICE       writes and reads, and prints the physical addresses of its memory
//	guest beside DEVICE    writes, one block after the other, behind reads in the same queue, and prints how many of each were done in how many seconds
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: guest outside|smart|warned|trim|dma|beside|watch DEVICE")
	}
	if args[0] == "watch" {
		return spectate(args[1])
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	heard := make(chan string, 16)
	c, err := guestdrv.Open(ctx, args[1], guestdrv.Options{Logger: hclog.New(&hclog.LoggerOptions{Output: listener(heard)})})
	if err != nil {
		return err
	}
	defer c.Close()
	g := &guest{ctx: ctx, c: c, heard: heard}
	if g.ns, err = c.Namespace(1); err != nil {
		return err
	}
	if g.pair, err = c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 16}); err != nil {
		return err
	}
	defer g.pair.Close()
	if g.buf, err = c.Alloc(dataBytes); err != nil {
		return err
	}
	var out any
	switch args[0] {
	case "outside":
		out, err = g.outside()
	case "smart":
		out, err = g.smart()
	case "warned":
		out, err = g.warned()
	case "trim":
		out, err = g.trim()
	case "dma":
		out, err = g.dma()
	case "beside":
		out, err = g.beside()
	default:
		err = fmt.Errorf("%q is none of outside, smart, warned, trim, dma, beside and watch", args[0])
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

const dataBytes = 64 << 10

type guest struct {
	ctx  context.Context
	c    *guestdrv.Controller
	ns   *guestdrv.Namespace
	pair *guestdrv.QueuePair
	buf  *guestdrv.Buffer

	heard <-chan string // lines of the driver's log that are about events
}

// listener takes the driver's log and passes on what it says of events.
type listener chan<- string

func (l listener) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("controller event")) {
		select {
		case l <- string(p):
		default:
		}
	}
	return len(p), nil
}

// do runs one command.
func (g *guest) do(io guestdrv.IO) (nvme.Status, error) {
	io.NSID, io.IOVA = 1, g.buf.IOVA()
	if n, err := g.pair.Submit([]guestdrv.IO{io}); err != nil || n != 1 {
		return 0, fmt.Errorf("submitted %d: %w", n, err)
	}
	if err := g.pair.Publish(); err != nil {
		return 0, err
	}
	var out [1]guestdrv.Result
	for {
		n, err := g.pair.Reap(out[:])
		if err != nil {
			return 0, err
		}
		if n == 1 {
			return out[0].Status, nil
		}
		if err := g.pair.Wait(g.ctx); err != nil {
			return 0, err
		}
	}
}

// beside is what beside prints. The reads that are left end with the queue.
type beside struct {
	Reads, Writes int
	Seconds       float64
}

func (g *guest) beside() (b beside, err error) {
	const reads, writes = 12, 200
	begin := time.Now()
	ios := make([]guestdrv.IO, reads)
	for i := range ios {
		ios[i] = guestdrv.IO{Op: nvme.IORead, NSID: 1, Blocks: 1, IOVA: g.buf.IOVA(), Tag: 1}
	}
	for sent := true; b.Writes < writes; sent = false {
		if sent {
			ios = append(ios, guestdrv.IO{Op: nvme.IOWrite, NSID: 1, LBA: uint64(b.Writes), Blocks: 1, IOVA: g.buf.IOVA() + 4096, Tag: 2})
		}
		if n, err := g.pair.Submit(ios); err != nil || n != len(ios) {
			return b, fmt.Errorf("submitted %d: %w", n, err)
		}
		ios = ios[:0]
		if err := errors.Join(g.pair.Publish(), g.pair.Wait(g.ctx)); err != nil {
			return b, err
		}
		var out [4]guestdrv.Result
		n, err := g.pair.Reap(out[:])
		if err != nil {
			return b, err
		}
		for _, r := range out[:n] {
			if !r.Status.OK() {
				return b, fmt.Errorf("tag %d: %v", r.Tag, r.Status)
			}
			if r.Tag == 1 {
				b.Reads++
				continue
			}
			b.Writes++
			ios = append(ios, guestdrv.IO{Op: nvme.IOWrite, NSID: 1, LBA: uint64(b.Writes), Blocks: 1, IOVA: g.buf.IOVA() + 4096, Tag: 2})
		}
	}
	b.Seconds = time.Since(begin).Seconds()
	return b, nil
}

// trim returns the statuses of Dataset Management and of Write Zeroes.
func (g *guest) trim() (statuses [2]string, err error) {
	const first, blocks = 8192, 16384
	clear(g.buf.Bytes()[:16])
	binary.LittleEndian.PutUint32(g.buf.Bytes()[4:], blocks)
	binary.LittleEndian.PutUint64(g.buf.Bytes()[8:], first)
	for i, io := range []guestdrv.IO{{Op: nvme.IODSM, Blocks: 1}, {Op: nvme.IOWriteZeroes, LBA: first + blocks, Blocks: 1024}} {
		st, err := g.do(io)
		if err != nil {
			return statuses, err
		}
		if !st.OK() {
			return statuses, fmt.Errorf("command %d: %v", i, st)
		}
		statuses[i] = st.String()
	}
	return statuses, nil
}

// health is what there is in the SMART log that is the device's.
type health struct {
	Temperature uint16 `json:"temperature"` // kelvin
	Spare       uint8  `json:"spare"`
	Used        uint8  `json:"used"`
}

func (g *guest) smart() (*health, error) {
	l, err := g.smartLog()
	if err != nil {
		return nil, err
	}
	return &health{l.Temperature(), l.AvailableSpare, l.PercentageUsed}, nil
}

func (g *guest) smartLog() (*nvme.SMARTLog, error) {
	l := new(nvme.SMARTLog)
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, uint64(len(l.Bytes())), true); err != nil {
		return nil, err
	}
	if _, err := g.c.Admin(g.ctx, &cmd, l.Bytes()[:]); err != nil {
		return nil, err
	}
	return l, nil
}

// warning is what a device of the host's has warned of.
type warning struct {
	Event    string `json:"event"`
	Warnings uint8  `json:"warnings"`
	Spare    uint8  `json:"spare"`
}

// warned asks for the events of warnings that the device gives itself, and waits for one.
func (g *guest) warned() (*warning, error) {
	var set nvme.Command
	set.SetSetFeatures(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningSpare|nvme.SMARTWarningReliability|nvme.SMARTWarningReadOnly)
	if _, err := g.c.Admin(g.ctx, &set, nil); err != nil {
		return nil, err
	}
	w := &warning{}
	select {
	case w.Event = <-g.heard:
	case <-g.ctx.Done():
		return nil, fmt.Errorf("no event: %w", g.ctx.Err())
	}
	l, err := g.smartLog()
	if err != nil {
		return nil, err
	}
	w.Warnings, w.Spare = l.CriticalWarning, l.AvailableSpare
	return w, nil
}

// answer is what became of a command.
type answer struct {
	Command string `json:"command"`
	SLBA    uint64 `json:"slba"`
	Blocks  uint64 `json:"blocks"`
	Status  uint16 `json:"status"` // SCT and SC
	Text    string `json:"text"`
}

// outside names blocks behind the end. The data is all ones, which no neighbour has.
func (g *guest) outside() (answers []answer, err error) {
	size, most := uint64(g.ns.Size())/uint64(g.ns.BlockSize()), uint64(dataBytes/g.ns.BlockSize())
	for i := range g.buf.Bytes() {
		g.buf.Bytes()[i] = 0xff
	}
	ask := func(name string, io guestdrv.IO, slba, blocks uint64) error {
		status, err := g.do(io)
		answers = append(answers, answer{name, slba, blocks, uint16(status.Code()), status.String()})
		return err
	}
	for _, r := range [][2]uint64{{size, 1}, {size - 1, 2}, {size - 1, most}, {size + 1<<20, 8}, {math.MaxUint64, 1}, {math.MaxUint64 - 3, 8}, {1 << 63, 1}, {math.MaxUint64 - size + 1, 8}} {
		for _, op := range []struct {
			name string
			op   uint8
		}{{"read", nvme.IORead}, {"write", nvme.IOWrite}, {"compare", nvme.IOCompare}, {"write zeroes", nvme.IOWriteZeroes}, {"verify", nvme.IOVerify}} {
			if err := ask(op.name, guestdrv.IO{Op: op.op, LBA: r[0], Blocks: uint32(r[1])}, r[0], r[1]); err != nil {
				return nil, err
			}
		}
		// A range of Dataset Management (NVM Command Set 1.0, figure 40): attributes, blocks, first block.
		clear(g.buf.Bytes()[:16])
		binary.LittleEndian.PutUint32(g.buf.Bytes()[4:], uint32(r[1]))
		binary.LittleEndian.PutUint64(g.buf.Bytes()[8:], r[0])
		if err := ask("deallocate", guestdrv.IO{Op: nvme.IODSM, Blocks: 1}, r[0], r[1]); err != nil {
			return nil, err
		}
		copy(g.buf.Bytes(), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	}
	return answers, nil
}

// dma writes the whole buffer to the first blocks and reads it back, again and again for a while, since a device of hostmed's reaches the memory of a guest
// only when that has been pinned; and tells where it is.
func (g *guest) dma() (pages []uint64, err error) {
	pattern := make([]byte, dataBytes)
	for i := range pattern {
		pattern[i] = byte(i ^ i>>8)
	}
	copy(g.buf.Bytes(), pattern)
	if pages, err = physical(g.buf.Bytes()); err != nil {
		return nil, err
	}
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for _, op := range []uint8{nvme.IOWrite, nvme.IORead} {
			status, err := g.do(guestdrv.IO{Op: op, Blocks: uint32(dataBytes / g.ns.BlockSize())})
			if err == nil {
				err = status.Err()
			}
			if err != nil {
				return nil, fmt.Errorf("command %#x: %w", op, err)
			}
			if op == nvme.IOWrite {
				clear(g.buf.Bytes())
			}
		}
		if !bytes.Equal(g.buf.Bytes(), pattern) {
			return nil, errWrong
		}
	}
	now, err := physical(g.buf.Bytes())
	for i := range now {
		if now[i] != pages[i] {
			return nil, fmt.Errorf("page %d has moved from %#x to %#x", i, pages[i], now[i])
		}
	}
	return pages, err
}
