//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * What package ebpf/trace loads: of several programs for one hook, the one that the kernel can have. A program's name is what userspace knows
 * it by, its first hit counter what it is counted under.
 *
 *   btf_*    tracepoints by the kernel's own types
 *   tp_*     classic tracepoints, with offsets from tracefs, where a kernel has no types
 *   raw_*    raw tracepoints whose arguments are plain numbers
 *   fn_*     fentry and fexit, each of which may be missing
 *   again_*  second in line at a hook, for what the first has missed
 *   test_*   for tests of the arithmetic only
 */
#include "kernel.h"
#include "maps.h"
#include "nvme.h"
#include "block.h"

char LICENSE[] SEC("license") = "GPL";

/* No map has these, but their Go types are wanted. */
const struct event *event_type __attribute__((unused));
const enum counter *counter_type __attribute__((unused));

/* blk_mq_rq_to_pdu: the driver's part stands behind the request. */
static __always_inline struct nvme_request *nvme_req(struct request *req)
{
	return (void *)req + bpf_core_type_size(struct request);
}

static __always_inline __u16 instance(struct request *req)
{
	return BPF_CORE_READ(nvme_req(req), ctrl, instance);
}

/* The admin queue's requests have no namespace. */
static __always_inline __u16 qid(struct request *req)
{
	return req->q->queuedata ? req->mq_hctx->queue_num + 1 : 0;
}

static __always_inline void setup_cmd(struct request *req, struct nvme_command *cmd, _Bool again)
{
	__u64 key = number(again ? AGAIN_SETUP : HIT_SETUP, req);
	struct start s = {}, *old;

	if (!again)
		count(HIT_SETUP);
	s.device = instance(req);
	s.qid = qid(req);
	s.opcode = cmd->common.opcode;
	if (!wanted(s.device, s.qid) || !wanted_opcode(s.opcode))
		return;
	s.cid = cmd->common.command_id;
	if (again) {
		old = starts_find(key);
		if (old && old->cid == s.cid) /* with its generation: this very command */
			return;
		count(HIT_SETUP);
	}
	s.nsid = cmd->common.nsid;
	s.cdw10[0] = cmd->common.cdw10;
	s.cdw10[1] = cmd->common.cdw11;
	s.cdw10[2] = cmd->common.cdw12;
	s.cdw10[3] = cmd->common.cdw13;
	s.cdw10[4] = cmd->common.cdw14;
	s.cdw10[5] = cmd->common.cdw15;
	read_lengths(&s, req->q->limits.logical_block_size);
	if (!s.bytes && (s.opcode & 3)) /* Base 2.0c 3.3.3.1: bits 1:0 say whether there is data */
		s.bytes = req->__data_len;
	if (want_events) {
		struct gendisk *disk = req->q->disk;
		__u64 io = (__u64)req->end_io_data, *user_data;

		if (disk)
			bpf_probe_read_kernel_str(s.disk, sizeof(s.disk), disk->disk_name);
		user_data = io ? bpf_map_lookup_elem(&uring_cmds, &io) : 0;
		if (user_data) {
			s.user_data = *user_data;
			bpf_map_delete_elem(&uring_cmds, &io);
		}
	}
	started(key, &s);
}

SEC("tp_btf/nvme_setup_cmd")
int BPF_PROG(btf_setup_cmd, struct request *req, struct nvme_command *cmd)
{
	setup_cmd(req, cmd, 0);
	return 0;
}

/*
 * The kernel does not run a program that runs already on the CPU, and where tracepoints may be preempted another thread can come to the same one
 * meanwhile. So there the next in line looks whether the command is there, and counts it if not. This tracepoint and block_rq_issue are passed by threads;
 * ends mostly come in interrupts.
 */
SEC("tp_btf/nvme_setup_cmd")
int BPF_PROG(again_setup_cmd, struct request *req, struct nvme_command *cmd)
{
	setup_cmd(req, cmd, 1);
	return 0;
}

SEC("tp_btf/nvme_complete_rq")
int BPF_PROG(btf_complete_rq, struct request *req)
{
	struct nvme_request *r = nvme_req(req);
	__u64 key = number(HIT_COMPLETE, req);
	struct start *s = starts_find(key);

	count(HIT_COMPLETE);
	if (s)
		ended(s, key, want_events ? BPF_CORE_READ(r, result.u64) : 0, BPF_CORE_READ(r, status), BPF_CORE_READ(r, retries));
	else
		orphan(instance(req), qid(req));
	return 0;
}

SEC("tp_btf/nvme_sq")
int BPF_PROG(btf_sq, struct request *req, __le16 head, int tail)
{
	count(HIT_SQ);
	moved(instance(req), qid(req), head, tail);
	return 0;
}

static __always_inline void async_event(__u16 device, __u32 result)
{
	struct queue *q;
	struct event *e;

	if (!wanted(device, 0))
		return;
	q = queue_of(device, 0);
	if (q)
		__sync_fetch_and_add(&q->aers, 1);
	else
		count(LOST_MAP);
	if (!want_events)
		return;
	e = new_event(KIND_ASYNC_EVENT, bpf_ktime_get_ns());
	if (!e)
		return;
	e->device = device;
	e->result = result;
	submit(e);
}

SEC("tp_btf/nvme_async_event")
int BPF_PROG(btf_async_event, struct nvme_ctrl *ctrl, __u32 result)
{
	count(HIT_ASYNC);
	async_event(ctrl->instance, result);
	return 0;
}

/* Of a classic tracepoint's record. */
#define FIELD(type, at)                                               \
	({                                                            \
		type v = 0;                                           \
		bpf_probe_read_kernel(&v, sizeof(v), (void *)ctx + (at)); \
		v;                                                    \
	})

/* The tag without the generation, which nvme_complete_rq has not: with it, controller and queue name a request. */
#define TAG_MASK 0xfff

static __always_inline __u64 tag_key(__u32 ctrl, __u32 qid, __u32 cid)
{
	return 1ULL << 63 | (__u64)ctrl << 32 | qid << 16 | (cid & TAG_MASK);
}

SEC("tracepoint/nvme/nvme_setup_cmd")
int tp_setup_cmd(void *ctx)
{
	struct start s = {};
	__u64 ns;
	__u32 *size;

	count(HIT_SETUP);
	s.device = FIELD(__u32, setup_ctrl);
	s.qid = FIELD(__u32, setup_qid);
	s.opcode = FIELD(__u8, setup_opcode);
	if (!wanted(s.device, s.qid) || !wanted_opcode(s.opcode))
		return 0;
	s.cid = FIELD(__u16, setup_cid);
	s.nsid = FIELD(__u32, setup_nsid);
	bpf_probe_read_kernel(s.cdw10, sizeof(s.cdw10), ctx + setup_cdw10);
	if (want_events)
		bpf_probe_read_kernel_str(s.disk, sizeof(s.disk), ctx + setup_disk);
	ns = (__u64)s.device << 32 | s.nsid;
	size = bpf_map_lookup_elem(&block_sizes, &ns);
	read_lengths(&s, size ? *size : 0);
	started(tag_key(s.device, s.qid, s.cid), &s);
	return 0;
}

SEC("tracepoint/nvme/nvme_complete_rq")
int tp_complete_rq(void *ctx)
{
	__u32 device, qid;
	__u64 key;
	struct start *s;

	count(HIT_COMPLETE);
	device = FIELD(__u32, complete_ctrl);
	qid = FIELD(__u32, complete_qid);
	key = tag_key(device, qid, FIELD(__u16, complete_cid));
	s = starts_find(key);
	if (s)
		ended(s, key, FIELD(__u64, complete_result), FIELD(__u16, complete_status), FIELD(__u8, complete_retries));
	else
		orphan(device, qid);
	return 0;
}

SEC("tracepoint/nvme/nvme_sq")
int tp_sq(void *ctx)
{
	count(HIT_SQ);
	moved(FIELD(__u32, sq_ctrl), FIELD(__u32, sq_qid), FIELD(__u16, sq_head_at), FIELD(__u16, sq_tail_at));
	return 0;
}

SEC("tracepoint/nvme/nvme_async_event")
int tp_async_event(void *ctx)
{
	count(HIT_ASYNC);
	async_event(FIELD(__u32, async_ctrl), FIELD(__u32, async_result));
	return 0;
}

static __always_inline void happened(__u8 kind, __u16 device, __u16 qid, __u32 cid)
{
	struct event *e;

	if (!want_events)
		return;
	e = new_event(kind, bpf_ktime_get_ns());
	if (!e)
		return;
	e->device = device;
	e->qid = qid;
	e->cid = cid;
	submit(e);
}

SEC("fentry/nvme_timeout")
int BPF_PROG(fn_timeout, struct request *req)
{
	__u16 device = instance(req), id = qid(req);
	__u64 key = number(HIT_TIMEOUT, req);
	struct start *s;
	struct queue *q;

	count(HIT_TIMEOUT);
	if (!wanted(device, id))
		return 0;
	q = queue_of(device, id);
	if (q)
		__sync_fetch_and_add(&q->timeouts, 1);
	else
		count(LOST_MAP);
	s = starts_find(key);
	if (want_events && s)
		emit_command(s, KIND_TIMEOUT, bpf_ktime_get_ns(), bpf_ktime_get_ns() - s->at, 0, 0, 0);
	else
		happened(KIND_TIMEOUT, device, id, 0);
	return 0;
}

SEC("fentry/nvme_reset_work")
int BPF_PROG(fn_reset_work, void *work)
{
	struct nvme_dev *dev = work - bpf_core_field_offset(struct nvme_dev, ctrl) - bpf_core_field_offset(struct nvme_ctrl, reset_work);
	__u16 device = BPF_CORE_READ(dev, ctrl.instance);
	struct queue *q;

	count(HIT_RESET);
	if (!wanted(device, 0))
		return 0;
	q = queue_of(device, 0);
	if (q)
		__sync_fetch_and_add(&q->resets, 1);
	else
		count(LOST_MAP);
	happened(KIND_RESET, device, 0, 0);
	return 0;
}

/* The driver moves the SQ tail for many commands at a time; each move is a doorbell unless shared doorbells spare it. */
static __always_inline void published(__u16 device, __u16 id)
{
	struct queue *q;

	if (!wanted(device, id))
		return;
	q = queue_of(device, id);
	if (q)
		__sync_fetch_and_add(&q->publishes, 1);
	else
		count(LOST_MAP);
}

SEC("fentry/nvme_queue_rq")
int BPF_PROG(fn_queue_rq, void *hctx, struct blk_mq_queue_data *bd)
{
	struct request *req = bd->rq;

	count(HIT_QUEUE_RQ);
	if (bd->last)
		published(instance(req), qid(req));
	return 0;
}

/* What a plug holds at most. */
#define BATCH 128

/* The argument points to the first request's pointer, as struct request ** once and as struct rq_list * now. */
SEC("fentry/nvme_queue_rqs")
int BPF_PROG(fn_queue_rqs, void *list)
{
	struct blk_mq_hw_ctx *last = 0;
	struct request *req = 0;

	count(HIT_QUEUE_RQS);
	bpf_probe_read_kernel(&req, sizeof(req), list);
	for (int i = 0; i < BATCH && req; i++) {
		struct blk_mq_hw_ctx *hctx = BPF_CORE_READ(req, mq_hctx);

		if (hctx != last)
			published(instance(req), BPF_CORE_READ(hctx, queue_num) + 1);
		last = hctx;
		req = BPF_CORE_READ(req, rq_next);
	}
	return 0;
}

SEC("fentry/nvme_commit_rqs")
int BPF_PROG(fn_commit_rqs, struct blk_mq_hw_ctx *hctx)
{
	struct nvme_queue *q = hctx->driver_data;

	count(HIT_COMMIT_RQS);
	if (BPF_CORE_READ(q, sq_tail) != BPF_CORE_READ(q, last_sq_tail))
		published(BPF_CORE_READ(q, dev, ctrl.instance), BPF_CORE_READ(q, qid));
	return 0;
}

#define IRQ_HANDLED 1

SEC("fexit/nvme_irq")
int BPF_PROG(fn_irq, int irq, struct nvme_queue *nvmeq, int ret)
{
	__u16 device, id;
	struct queue *q;

	count(HIT_IRQ);
	if (ret != IRQ_HANDLED)
		return 0;
	device = BPF_CORE_READ(nvmeq, dev, ctrl.instance);
	id = BPF_CORE_READ(nvmeq, qid);
	if (!wanted(device, id))
		return 0;
	q = queue_of(device, id);
	if (q)
		__sync_fetch_and_add(&q->interrupts, 1);
	else
		count(LOST_MAP);
	return 0;
}

/* Passthrough by io_uring: who gave the command is known before it has a CID. io_kiocb begins with the command. */
SEC("fentry/nvme_uring_cmd_io")
int BPF_PROG(fn_uring_cmd_io, void *ctrl, void *ns, void *ioucmd)
{
	__u64 key = (__u64)ioucmd, user_data;

	count(HIT_URING_CMD);
	if (!want_events)
		return 0;
	user_data = BPF_CORE_READ((struct io_kiocb *)ioucmd, cqe.user_data);
	if (bpf_map_update_elem(&uring_cmds, &key, &user_data, BPF_ANY))
		count(LOST_MAP);
	return 0;
}

SEC("raw_tp/test_bucket")
int test_bucket(__u64 *ctx)
{
	return bucket(ctx[0]);
}

SEC("raw_tp/test_size_class")
int test_size_class(__u64 *ctx)
{
	return size_class(ctx[0]);
}

/* Of the table of what is under way: argument 0 is what to do, 1 the key. Returns 0 for nothing, 1 for a place in the array, 2 for one in the hash. */
SEC("raw_tp/test_table")
int test_table(__u64 *ctx)
{
	__u64 key = ctx[1];
	struct start *s = ctx[0] == 1 ? starts_claim(key) : starts_find(key);
	int where;

	if (!s)
		return 0;
	where = 1 + s->spilled;
	if (ctx[0] == 2)
		starts_free(s, key);
	return where;
}
