/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The block layer above NVMe, or above any disk; and exits of virtual machines. */
#pragma once

#include "maps.h"

/* include/linux/blk_types.h, enum req_op: kernel ABI by custom */
enum {
	REQ_OP_READ = 0,
	REQ_OP_WRITE = 1,
	REQ_OP_FLUSH = 2,
	REQ_OP_DISCARD = 3,
	REQ_OP_BITS = 0xff,
};

static __always_inline __u8 op_letter(__u32 cmd_flags)
{
	switch (cmd_flags & REQ_OP_BITS) {
	case REQ_OP_READ:
		return 'R';
	case REQ_OP_WRITE:
		return 'W';
	case REQ_OP_FLUSH:
		return 'F';
	case REQ_OP_DISCARD:
		return 'D';
	}
	return 'O';
}

static __always_inline void block_step(enum counter program, struct request *req, _Bool issue, _Bool again)
{
	struct block_start *s;
	__u64 key = number(program, req), now = bpf_ktime_get_ns();
	struct gendisk *disk = req->q->disk;

	if (!disk)
		return; /* the admin queue */
	s = block_starts_find(key);
	if (again && s && s->issued)
		return;
	if (!s) {
		s = block_starts_claim(key);
		if (!s) {
			count(LOST_MAP);
			return;
		}
		s->inserted = 0;
	}
	if (!issue)
		s->inserted = now;
	s->issued = issue ? now : 0;
	s->dev = (__u32)disk->major << 20 | disk->first_minor;
	s->bytes = req->__data_len;
	s->op = op_letter(req->cmd_flags);
}

SEC("tp_btf/block_rq_insert")
int BPF_PROG(btf_rq_insert, struct request *req)
{
	count(HIT_INSERT);
	block_step(HIT_INSERT, req, 0, 0);
	return 0;
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(btf_rq_issue, struct request *req)
{
	count(HIT_ISSUE);
	block_step(HIT_ISSUE, req, 1, 0);
	return 0;
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(again_rq_issue, struct request *req)
{
	block_step(AGAIN_ISSUE, req, 1, 1);
	return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(btf_rq_complete, struct request *req, int error, unsigned int bytes)
{
	__u64 key = number(HIT_RQ_COMPLETE, req), now = bpf_ktime_get_ns();
	struct block_start *s = block_starts_find(key);
	struct block_key bk = {};
	struct block_cell *c;

	count(HIT_RQ_COMPLETE);
	if (!s || bytes < req->__data_len) /* a part of it; the end comes later */
		return 0;
	if (s->issued) {
		bk.dev = s->dev;
		bk.op = s->op;
		c = bpf_map_lookup_elem(&block_cells, &bk);
		if (!c) {
			bpf_map_update_elem(&block_cells, &bk, &no_block_cell, BPF_NOEXIST);
			c = bpf_map_lookup_elem(&block_cells, &bk);
		}
		if (c) {
			c->bytes += s->bytes;
			record(&c->in_device, now - s->issued);
			if (s->inserted)
				record(&c->queued, s->issued - s->inserted);
		} else {
			count(LOST_MAP);
		}
	}
	block_starts_free(s, key);
	return 0;
}

static __always_inline struct vm_cell *vm_cell(__u32 *tgid)
{
	struct vm_cell none = {}, *c;

	*tgid = bpf_get_current_pid_tgid() >> 32;
	if (vm && *tgid != vm)
		return 0;
	c = bpf_map_lookup_elem(&vm_cells, tgid);
	if (!c) {
		bpf_map_update_elem(&vm_cells, tgid, &none, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&vm_cells, tgid);
	}
	if (!c)
		count(LOST_MAP);
	return c;
}

SEC("raw_tp/kvm_exit")
int raw_kvm_exit(void *ctx)
{
	__u32 tgid;
	struct vm_cell *c = vm_cell(&tgid);

	count(HIT_KVM_EXIT);
	if (c)
		c->exits++;
	return 0;
}

/* The reason is not among the arguments: it is asked for when the record is made. */
SEC("tracepoint/kvm/kvm_exit")
int tp_kvm_exit(void *ctx)
{
	struct reason_key key = {};
	struct vm_cell *c = vm_cell(&key.tgid);
	__u64 one = 1, *n;

	count(HIT_KVM_EXIT);
	if (!c)
		return 0;
	c->exits++;
	bpf_probe_read_kernel(&key.reason, sizeof(key.reason), ctx + exit_reason_at);
	n = bpf_map_lookup_elem(&exit_reasons, &key);
	if (n)
		++*n;
	else if (bpf_map_update_elem(&exit_reasons, &key, &one, BPF_NOEXIST))
		count(LOST_MAP);
	return 0;
}

/* include/trace/events/kvm.h */
#define KVM_TRACE_MMIO_WRITE 2

SEC("raw_tp/kvm_mmio")
int raw_kvm_mmio(__u64 *ctx)
{
	__u32 tgid;
	struct vm_cell *c;

	count(HIT_KVM_MMIO);
	if ((__u32)ctx[0] != KVM_TRACE_MMIO_WRITE)
		return 0;
	c = vm_cell(&tgid);
	if (c)
		c->mmio++;
	return 0;
}

SEC("raw_tp/kvm_fast_mmio")
int raw_kvm_fast_mmio(void *ctx)
{
	__u32 tgid;
	struct vm_cell *c = vm_cell(&tgid);

	count(HIT_KVM_FAST_MMIO);
	if (c)
		c->fast_mmio++;
	return 0;
}
