package ctrl

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestCreateAndDelete(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(createCQ(1, 4096, 64))
	h.ok(createSQ(1, 2, 1))
	h.ok(createSQ(2, 300, 1))
	for _, call := range []string{"CreateCQ 1 size 4096 vector 64 ien true mem 65536", "CreateSQ 1 on 1 size 2 mem 128", "CreateSQ 2 on 1 size 300 mem 19200"} {
		if !h.dp.called(call) {
			t.Errorf("the data path was not told %q: %q", call, h.dp.calls)
		}
	}
	h.fails(deleteQueue(nvme.AdminDeleteCQ, 1), nvme.StatusInvalidQueueDeletion)
	h.ok(deleteQueue(nvme.AdminDeleteSQ, 1))
	h.fails(deleteQueue(nvme.AdminDeleteCQ, 1), nvme.StatusInvalidQueueDeletion)
	h.ok(deleteQueue(nvme.AdminDeleteSQ, 2))
	h.fails(deleteQueue(nvme.AdminDeleteSQ, 2), nvme.StatusInvalidQueueID)
	h.ok(deleteQueue(nvme.AdminDeleteCQ, 1))
	h.fails(deleteQueue(nvme.AdminDeleteCQ, 1), nvme.StatusInvalidQueueID)
	h.ok(createCQ(1, 2, 0))
}

func TestCreateRefuses(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(createCQ(1, 16, 0))
	h.ok(createCQ(64, 16, 0))
	h.ok(createSQ(1, 16, 1))
	change := func(cmd nvme.Command, f func(*nvme.Command)) nvme.Command { f(&cmd); return cmd }
	notContiguous := func(c *nvme.Command) { c.CDW11 &^= 1 }
	for _, tt := range []struct {
		name string
		cmd  nvme.Command
		want nvme.Status
	}{
		{"CQ 0", createCQ(0, 16, 0), nvme.StatusInvalidQueueID},
		{"CQ 65", createCQ(65, 16, 0), nvme.StatusInvalidQueueID},
		{"CQ 65535", createCQ(0xffff, 16, 0), nvme.StatusInvalidQueueID},
		{"CQ exists", createCQ(1, 16, 0), nvme.StatusInvalidQueueID},
		{"CQ of 1", createCQ(2, 1, 0), nvme.StatusInvalidQueueSize},
		{"CQ of 4097", createCQ(2, 4097, 0), nvme.StatusInvalidQueueSize},
		{"CQ of 65536", createCQ(2, 65536, 0), nvme.StatusInvalidQueueSize},
		{"CQ scattered", change(createCQ(2, 16, 0), notContiguous), nvme.StatusInvalidField},
		{"CQ misaligned", change(createCQ(2, 16, 0), func(c *nvme.Command) { c.PRP1 += 0x800 }), nvme.StatusPRPOffsetInvalid},
		{"CQ outside", change(createCQ(2, 16, 0), func(c *nvme.Command) { c.PRP1 = 0 }), nvme.StatusInvalidField},
		{"CQ over the end", change(createCQ(2, 4096, 0), func(c *nvme.Command) { c.PRP1 = ramBase + ramSize - 0x1000 }), nvme.StatusInvalidField},
		{"CQ vector 65", createCQ(2, 16, 65), nvme.StatusInvalidVector},
		{"SQ 0", createSQ(0, 16, 1), nvme.StatusInvalidQueueID},
		{"SQ 65", createSQ(65, 16, 1), nvme.StatusInvalidQueueID},
		{"SQ exists", createSQ(1, 16, 1), nvme.StatusInvalidQueueID},
		{"SQ of 1", createSQ(2, 1, 1), nvme.StatusInvalidQueueSize},
		{"SQ of 4097", createSQ(2, 4097, 1), nvme.StatusInvalidQueueSize},
		{"SQ scattered", change(createSQ(2, 16, 1), notContiguous), nvme.StatusInvalidField},
		{"SQ misaligned", change(createSQ(2, 16, 1), func(c *nvme.Command) { c.PRP1 |= 8 }), nvme.StatusPRPOffsetInvalid},
		{"SQ outside", change(createSQ(2, 16, 1), func(c *nvme.Command) { c.PRP1 = 1 << 50 }), nvme.StatusInvalidField},
		{"SQ on CQ 0", createSQ(2, 16, 0), nvme.StatusInvalidQueueID},
		{"SQ on CQ 65", createSQ(2, 16, 65), nvme.StatusInvalidQueueID},
		{"SQ on no CQ", createSQ(2, 16, 2), nvme.StatusInvalidCQ},
		{"delete SQ 0", deleteQueue(nvme.AdminDeleteSQ, 0), nvme.StatusInvalidQueueID},
		{"delete no SQ", deleteQueue(nvme.AdminDeleteSQ, 2), nvme.StatusInvalidQueueID},
		{"delete SQ 65535", deleteQueue(nvme.AdminDeleteSQ, 0xffff), nvme.StatusInvalidQueueID},
		{"delete CQ 0", deleteQueue(nvme.AdminDeleteCQ, 0), nvme.StatusInvalidQueueID},
		{"delete no CQ", deleteQueue(nvme.AdminDeleteCQ, 2), nvme.StatusInvalidQueueID},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h.TB = t
			h.fails(tt.cmd, tt.want)
		})
	}
	h.TB = t
	h.dp.fail = errors.New("out of workers")
	h.fails(createCQ(2, 16, 0), nvme.StatusInternalError)
	h.dp.fail = errors.New("out of workers")
	h.fails(createSQ(2, 16, 1), nvme.StatusInternalError)
	h.ok(createCQ(2, 16, 0))
	h.ok(createSQ(2, 16, 2))
}

func TestNumberOfQueues(t *testing.T) {
	h := newEnabled(t, testConfig())
	if got := nvme.QueueCounts(h.ok(setFeature(nvme.FeatureQueues, 0, uint32(nvme.MakeQueueCounts(999, 1))))); got.SQs().Count() != 64 || got.CQs().Count() != 2 {
		t.Errorf("granted %v SQs, %v CQs", got.SQs(), got.CQs())
	}
	h.fails(createCQ(3, 16, 0), nvme.StatusInvalidQueueID)
	h.fails(setFeature(nvme.FeatureQueues, 0, 0xffff), nvme.StatusInvalidField)
	h.fails(setFeature(nvme.FeatureQueues, 0, 0xffff0000), nvme.StatusInvalidField)
	if got := nvme.QueueCounts(h.ok(getFeature(nvme.FeatureQueues, 0, nvme.FeatureCurrent, 0))); got.SQs().Count() != 64 || got.CQs().Count() != 2 {
		t.Errorf("current %v SQs, %v CQs", got.SQs(), got.CQs())
	}
	h.ok(createCQ(2, 16, 0))
	h.fails(setFeature(nvme.FeatureQueues, 0, 0x00030003), nvme.StatusSequenceError)
	h.ok(deleteQueue(nvme.AdminDeleteCQ, 2))
	h.ok(setFeature(nvme.FeatureQueues, 0, 0x00030003))
}

func TestAbort(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(createCQ(1, 16, 0))
	h.ok(createSQ(1, 16, 1))
	h.dp.aborts = map[uint16]bool{77: true}
	abort := func(sqid, cid uint16) (cmd nvme.Command) { cmd.SetAbort(sqid, cid); return }
	if h.ok(abort(1, 77)) != 0 {
		t.Error("the aborted command is reported as not aborted")
	}
	if h.ok(abort(1, 78)) != 1 {
		t.Error("the command that ran on is reported as aborted")
	}
	if h.ok(abort(0, 1234)) != 1 {
		t.Error("an admin command that is not there is reported as aborted")
	}
	h.fails(abort(2, 0), nvme.StatusInvalidField)
	h.fails(abort(0xffff, 0), nvme.StatusInvalidField)

	event := h.push(aer())
	h.ring()
	cid := h.push(abort(0, event))
	h.ring()
	es := h.reap()
	if len(es) != 2 || es[0].CID() != event || es[0].Status() != nvme.StatusAbortRequested || es[1].CID() != cid || es[1].Result() != 0 {
		t.Errorf("aborting an event request: %+v", es)
	}
}

// A driver that sends its next command at each interrupt is served within one kick: what is said to be taken is what came last.
func TestAdminTakenIsWhatCameLast(t *testing.T) {
	h := newEnabled(t, testConfig())
	more := 3 * adminDepth
	h.dp.onIRQ = func() {
		e, ok := h.cq.Next()
		if !ok {
			t.Fatal("an interrupt without a completion")
		}
		if err := h.sq.Released(e.SQHead()); err != nil {
			t.Fatal(err)
		}
		h.dp.head.Store(h.cq.Head())
		if more--; more > 0 {
			h.push(nvme.Command{Opcode: 0xff})
			h.dp.tail.Store(h.sq.Tail())
		}
	}
	h.push(nvme.Command{Opcode: 0xff})
	h.dp.tail.Store(h.sq.Tail())
	if h.c.AdminKick() || more != 0 {
		t.Fatalf("%d commands were not run", more)
	}
	if want := [2]uint32{h.dp.tail.Load(), h.dp.head.Load()}; h.dp.taken != want {
		t.Errorf("%v taken, want %v", h.dp.taken, want)
	}
}

// The queue table against a naive model.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		cfg := testConfig()
		cfg.MaxIOQueues = 3
		h := newEnabled(t, cfg)
		cqs := map[uint16]bool{}
		sqs := map[uint16]uint16{}
		for range 40 {
			qid := rapid.Uint16Range(0, 5).Draw(rt, "qid")
			cqid := rapid.Uint16Range(0, 5).Draw(rt, "cqid")
			good := qid >= 1 && qid <= 3
			want := nvme.StatusSuccess
			var cmd nvme.Command
			switch rapid.IntRange(0, 3).Draw(rt, "op") {
			case 0:
				cmd = createCQ(qid, 16, 0)
				if !good || cqs[qid] {
					want = nvme.StatusInvalidQueueID
				} else {
					cqs[qid] = true
				}
			case 1:
				cmd = createSQ(qid, 16, cqid)
				_, exists := sqs[qid]
				switch {
				case !good || exists || cqid < 1 || cqid > 3:
					want = nvme.StatusInvalidQueueID
				case !cqs[cqid]:
					want = nvme.StatusInvalidCQ
				default:
					sqs[qid] = cqid
				}
			case 2:
				cmd = deleteQueue(nvme.AdminDeleteSQ, qid)
				if _, exists := sqs[qid]; !exists {
					want = nvme.StatusInvalidQueueID
				}
				delete(sqs, qid)
			case 3:
				cmd = deleteQueue(nvme.AdminDeleteCQ, qid)
				used := false
				for _, c := range sqs {
					used = used || c == qid
				}
				switch {
				case !cqs[qid]:
					want = nvme.StatusInvalidQueueID
				case used:
					want = nvme.StatusInvalidQueueDeletion
				default:
					delete(cqs, qid)
				}
			}
			if got := h.do(cmd).Status().Code(); got != want {
				rt.Fatalf("%s: %v, want %v", cmd.Describe(true), got, want)
			}
			if len(h.dp.cqs) != len(cqs) || len(h.dp.sqs) != len(sqs) {
				rt.Fatalf("the data path has %v and %v, the model %v and %v", h.dp.cqs, h.dp.sqs, cqs, sqs)
			}
		}
	})
}
