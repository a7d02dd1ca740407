package ctrl

import (
	"encoding/binary"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// FuzzAdmin sends random SQEs. Every one but an event request is completed, and the controller can be reset and used
// afterwards.
func FuzzAdmin(f *testing.F) {
	seed := func(cmds ...nvme.Command) {
		var b []byte
		for i := range cmds {
			b = append(b, cmds[i].Bytes()[:]...)
		}
		f.Add(b, uint8(0))
	}
	seed(identifyCmd(nvme.CNSController, 0), logCmd(nvme.LogError, 0, 128, false))
	seed(createCQ(1, 16, 1), createSQ(1, 16, 1), deleteQueue(nvme.AdminDeleteSQ, 1), deleteQueue(nvme.AdminDeleteCQ, 1))
	seed(doorbellConfig(nvme.AdminDoorbellBufferConfig, page1IOVA, page2IOVA), aer(), aer(), aer(), aer(), aer())
	for _, fid := range []nvme.FeatureID{1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 0x16, 0x19, 0x84, 0xd0} {
		seed(setFeature(fid, 0, 0x10001), getFeature(fid, 1, 0, 3))
	}
	for _, lid := range logPages {
		cmd := logCmd(lid, 0, 512, false)
		cmd.CDW10 |= 1 << 8
		seed(cmd, logCmd(lid, 512, 4096, true))
	}
	f.Fuzz(func(t *testing.T, b []byte, mode uint8) {
		cfg := testConfig()
		cfg.Mode = DoorbellMode(mode % 3)
		h := newEnabled(t, cfg)
		for ; len(b) >= 64; b = b[64:] {
			var cmd nvme.Command
			copy(cmd.Bytes()[:], b)
			requests := len(h.c.events.requests)
			// The fuzzer may have put the doorbell page or its data over the rings: only the controller's own
			// state is looked at.
			tail := h.sq.Tail()
			h.push(cmd)
			h.ring()
			a := &h.c.admin
			if !h.c.Enabled() || a.stopped {
				break
			}
			if a.sq.Head() != (tail+1)%adminDepth && !a.tail.owned && h.c.async.running < asyncLimit {
				t.Fatalf("%s was not fetched", cmd.Describe(true))
			}
			if len(h.c.events.requests) > aerLimit || len(a.waiting) > aerLimit+asyncLimit+2 {
				t.Fatalf("%d requests, %d waiting", len(h.c.events.requests), len(a.waiting))
			}
			if cmd.Opcode != nvme.AdminAsyncEventRequest && len(h.c.events.requests) > requests {
				t.Fatalf("%s left a request behind", cmd.Describe(true))
			}
			if err := h.sq.Released(uint16(a.sq.Head())); err != nil {
				break
			}
			h.dp.head.Store(a.cq.Tail())
			h.c.AdminKick()
		}
		h.c.QueueError(1, BadDoorbellValue)
		h.c.MemoryLost(page1IOVA, 0x1000)
		h.disable()
		h.enable()
		h.identify(nvme.CNSController, 0)
	})
}

// FuzzRegisters reads and writes registers in any width and order, and rings queue 0.
func FuzzRegisters(f *testing.F) {
	op := func(kind byte, off uint16, v uint64) []byte {
		b := binary.LittleEndian.AppendUint16([]byte{kind}, off)
		return binary.LittleEndian.AppendUint64(b, v)
	}
	var enable []byte
	enable = append(enable, op(2, nvme.RegAQA, 0x001f001f)...)
	enable = append(enable, op(3, nvme.RegASQ, sqIOVA)...)
	enable = append(enable, op(3, nvme.RegACQ, cqIOVA)...)
	enable = append(enable, op(2, nvme.RegCC, uint64(goodCC))...)
	f.Add(enable)
	f.Add(append(append([]byte{}, enable...), op(8, 0, 7)...))
	f.Add(append(append([]byte{}, enable...), op(2, nvme.RegNSSR, nvme.NSSRReset)...))
	f.Add(append(append([]byte{}, enable...), op(2, nvme.RegCC, uint64(goodCC.WithSHN(1)))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h := newHost(t, testConfig())
		for ; len(b) >= 11; b = b[11:] {
			kind, off, v := b[0], uint64(binary.LittleEndian.Uint16(b[1:])), b[3:11]
			switch {
			case kind < 4:
				_ = h.c.WriteReg(off, v[:1<<kind])
			case kind < 8:
				_ = h.c.ReadReg(off, make([]byte, 1<<(kind-4)))
			case kind == 8:
				h.dp.tail.Store(binary.LittleEndian.Uint32(v))
				h.dp.head.Store(binary.LittleEndian.Uint32(v[4:]))
				h.c.AdminKick()
			case kind == 9:
				h.c.MemoryLost(binary.LittleEndian.Uint64(v), uint64(off)<<12)
			case kind == 10:
				h.c.Reset()
			default:
				_ = h.c.WriteReg(off, make([]byte, int(kind)%16))
				_ = h.c.ReadReg(off, make([]byte, int(kind)%16))
			}
			if st := h.csts(); st.RDY() && !st.CFS() != h.c.Enabled() {
				t.Fatalf("%v, enabled %v", st, h.c.Enabled())
			}
			_ = h.c.State()
		}
		h.c.Reset()
		h.enable()
		h.identify(nvme.CNSController, 0)
	})
}
