/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Commands of the NVMe driver: from nvme_setup_cmd, when one is written, to nvme_complete_rq. */
#pragma once

#include "maps.h"

/* NVM Command Set 1.0c: commands with SLBA in CDW10 and 11 and a zero-based NLB in CDW12. */
enum {
	NVM_WRITE = 0x01,
	NVM_READ = 0x02,
	NVM_WRITE_UNCORRECTABLE = 0x04,
	NVM_COMPARE = 0x05,
	NVM_WRITE_ZEROES = 0x08,
	NVM_DSM = 0x09,
	NVM_VERIFY = 0x0c,
	ZNS_APPEND = 0x7d,
};

/* What the command says of its data. */
static __always_inline void read_lengths(struct start *s, __u32 block_size)
{
	if (!s->qid)
		return;
	switch (s->opcode) {
	case NVM_WRITE:
	case NVM_READ:
	case NVM_COMPARE:
	case ZNS_APPEND:
		s->bytes = ((s->cdw10[2] & 0xffff) + 1) * block_size;
		/* fallthrough */
	case NVM_WRITE_UNCORRECTABLE:
	case NVM_WRITE_ZEROES:
	case NVM_VERIFY:
		s->slba = (__u64)s->cdw10[1] << 32 | s->cdw10[0];
		s->blocks = (s->cdw10[2] & 0xffff) + 1;
		break;
	case NVM_DSM:
		s->bytes = ((s->cdw10[0] & 0xff) + 1) * 16; /* its list of ranges */
		break;
	}
}

static __always_inline void emit_command(struct start *s, __u8 kind, __u64 at, __u64 latency, __u64 result, __u16 status, __u8 retries)
{
	struct event *e = new_event(kind, at);

	if (!e)
		return;
	e->latency = latency;
	e->slba = s->slba;
	e->user_data = s->user_data;
	e->result = result;
	e->blocks = s->blocks;
	e->bytes = s->bytes;
	e->nsid = s->nsid;
	e->tid = s->tid;
	__builtin_memcpy(e->cdw10, s->cdw10, sizeof(e->cdw10));
	e->device = s->device;
	e->qid = s->qid;
	e->cid = s->cid;
	e->status = status;
	e->opcode = s->opcode;
	e->retries = retries;
	__builtin_memcpy(e->comm, s->comm, sizeof(e->comm));
	__builtin_memcpy(e->disk, s->disk, sizeof(e->disk));
	submit(e);
}

/* started counts a command that has been written and keeps it under key. */
static __always_inline void started(__u64 key, struct start *s)
{
	struct queue *q = queue_of(s->device, s->qid);
	struct start *place = starts_find(key);
	_Bool replaced = place != 0;

	if (want_events) {
		s->tid = bpf_get_current_pid_tgid();
		bpf_get_current_comm(s->comm, sizeof(s->comm));
	}
	if (!q) {
		count(LOST_MAP);
		return;
	}
	if (!replaced)
		place = starts_claim(key);
	if (!place) {
		count(LOST_MAP);
		return;
	}
	s->key = key;
	s->spilled = place->spilled;
	s->at = bpf_ktime_get_ns();
	if (want_events) {
		*place = *s;
	} else { /* what ended looks at */
		place->at = s->at;
		place->bytes = s->bytes;
		place->device = s->device;
		place->qid = s->qid;
		place->cid = s->cid;
		place->opcode = s->opcode;
	}
	__sync_fetch_and_add(&q->started, 1);
	if (replaced) {
		__sync_fetch_and_add(&q->replaced, 1);
	} else {
		__s64 depth = __sync_fetch_and_add(&q->depth, 1) + 1;

		for (int i = 0; i < 4; i++) {
			__s64 max = q->depth_max;

			if (depth <= max || __sync_val_compare_and_swap(&q->depth_max, max, depth) == max)
				break;
		}
	}
	if (want_events && !min_latency)
		emit_command(s, KIND_START, s->at, 0, 0, 0, 0);
}

/* orphan counts an end that started knows nothing of. Its opcode is not known: it may be one that the filter has left out. */
static __always_inline void orphan(__u16 device, __u16 qid)
{
	struct queue *q;

	if (filter_opcodes || !wanted(device, qid))
		return;
	q = queue_of(device, qid);
	if (q)
		__sync_fetch_and_add(&q->orphans, 1);
	else
		count(LOST_MAP);
}

/* ended counts what started kept under key. */
static __always_inline void ended(struct start *s, __u64 key, __u64 result, __u16 status, __u8 retries)
{
	__u64 now = bpf_ktime_get_ns();
	struct cell_key ck = {};
	struct queue *q;
	struct cell *c;
	__u64 latency = now - s->at;

	q = queue_of(s->device, s->qid);
	if (q) {
		__sync_fetch_and_add(&q->ended, 1);
		__sync_fetch_and_add(&q->depth, -1);
	}
	ck.device = s->device;
	ck.qid = s->qid;
	ck.opcode = s->opcode;
	ck.size_class = size_class(s->bytes);
	c = bpf_map_lookup_elem(&cells, &ck);
	if (!c) {
		bpf_map_update_elem(&cells, &ck, &no_cell, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&cells, &ck);
	}
	if (c) {
		record(&c->latency, latency);
		c->bytes += s->bytes;
		if (status)
			c->errors++;
		if (retries)
			c->retries++;
	} else {
		count(LOST_MAP);
	}
	if (want_events && latency >= min_latency)
		emit_command(s, KIND_END, now, latency, result, status, retries);
	starts_free(s, key);
}

static __always_inline void moved(__u16 device, __u16 qid, __u32 head, __u32 tail)
{
	struct queue *q;
	struct event *e;

	if (!wanted(device, qid))
		return;
	q = queue_of(device, qid);
	if (!q) {
		count(LOST_MAP);
		return;
	}
	q->sq_head = head;
	q->sq_tail = tail;
	if (!want_events || !want_doorbells)
		return;
	e = new_event(KIND_DOORBELL, bpf_ktime_get_ns());
	if (!e)
		return;
	e->device = device;
	e->qid = qid;
	e->sq_head = head;
	e->sq_tail = tail;
	submit(e);
}
