package ctrl

import (
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// RDY stays 1 while commands of before a reset have not ended, whichever reset it was; everything else is as after one that was over at once.
func TestSettle(t *testing.T) {
	for name, reset := range map[string]func(h *host){
		"CC.EN":   (*host).disable,
		"FLR":     func(h *host) { h.c.Reset() },
		"NSSR":    func(h *host) { h.writeReg(nvme.RegNSSR, 4, nvme.NSSRReset) },
		"twice":   func(h *host) { h.disable(); h.c.Reset() },
		"CC.EN=1": func(h *host) { h.disable(); h.writeReg(nvme.RegCC, 4, uint64(goodCC)); h.disable() },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, testConfig())
			h.enable()
			h.ok(createCQ(1, 16, 0))
			h.ok(createSQ(1, 16, 1))
			h.dp.hangs = true
			reset(h)
			if !h.csts().RDY() || h.csts().CFS() || h.c.Enabled() || nvme.CC(h.readReg(nvme.RegCC, 4)).EN() {
				t.Fatalf("%v, %s", h.csts(), h.c.State())
			}
			if h.c.Settle(0) || !h.csts().RDY() {
				t.Error("settled, and commands have not ended")
			}
			h.push(nvme.Command{Opcode: nvme.AdminKeepAlive})
			h.ring()
			if h.c.AdminKick() || len(h.reap()) > 0 {
				t.Error("an admin command was run")
			}
			h.dp.hangs = false
			if !h.c.Settle(0) || h.csts().RDY() {
				t.Errorf("not settled: %v", h.csts())
			}
			h.dp.hangs = true // a call too many stops nothing
			h.enable()
			if !h.c.Settle(0) || !h.csts().RDY() {
				t.Errorf("a running controller was stopped: %v", h.csts())
			}
			h.ok(createCQ(1, 16, 0))
		})
	}
}

// A driver that sets CC.EN before RDY is 0 does what it must not, and has its controller when it could have had it.
func TestEnabledBeforeSettled(t *testing.T) {
	h := newHost(t, testConfig())
	h.enable()
	h.dp.hangs = true
	h.disable()
	h.newRings()
	h.writeReg(nvme.RegCC, 4, uint64(goodCC))
	if h.csts().RDY() || h.c.Enabled() {
		t.Fatalf("enabled, and commands of before have not ended: %v", h.csts())
	}
	h.dp.hangs = false
	if !h.c.Settle(0) || !h.csts().RDY() {
		t.Fatalf("not enabled: %v", h.csts())
	}
	h.ok(nvme.Command{Opcode: nvme.AdminKeepAlive})
}

// Deleting an SQ with commands that do not end keeps nobody from the rest, and ends with them; after a reset it has no say in the queues of that id.
func TestDeleteSQLater(t *testing.T) {
	for _, reset := range []bool{false, true} {
		cfg := testConfig()
		woken := make(chan bool, 8)
		cfg.Wake = func() { woken <- true }
		h := newHost(t, cfg)
		h.enable()
		h.ok(createCQ(1, 16, 0))
		h.ok(createSQ(1, 16, 1))
		h.dp.ended = make(chan struct{})
		cid := h.push(deleteQueue(nvme.AdminDeleteSQ, 1))
		h.ring()
		h.c.AdminKick()
		if done := h.reap(); len(done) > 0 {
			t.Fatalf("%v", done)
		}
		h.fails(deleteQueue(nvme.AdminDeleteSQ, 1), nvme.StatusInvalidQueueID)
		h.fails(createSQ(1, 16, 1), nvme.StatusInvalidQueueID)
		h.fails(deleteQueue(nvme.AdminDeleteCQ, 1), nvme.StatusInvalidQueueDeletion)
		if reset {
			h.disable()
			h.enable()
			h.ok(createCQ(1, 16, 0))
			h.ok(createSQ(1, 16, 1))
		}
		close(h.dp.ended)
		<-woken
		h.c.AdminKick()
		done := h.reap()
		if reset {
			if len(done) > 0 || !h.dp.sqs[1] {
				t.Errorf("%v, SQ there: %v", done, h.dp.sqs[1])
			}
			continue
		}
		if len(done) != 1 || done[0].CID() != cid || !done[0].Status().OK() {
			t.Fatalf("%v", done)
		}
		h.ok(deleteQueue(nvme.AdminDeleteCQ, 1))
	}
}
