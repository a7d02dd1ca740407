/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Maps, what is in them, and what userspace sets before the programs are loaded. */
#pragma once

#include "kernel.h"

/* shared/latency's shape: 16 buckets for each power of two, values below 2^38 ns. */
#define SUB_BITS 4
#define TOP_BITS 38
#define BUCKETS ((TOP_BITS - SUB_BITS + 1) << SUB_BITS)

struct hist {
	__u64 counts[BUCKETS];
	__u64 sum;
	__u64 max;
};

/* Settings; see Options in ebpf/trace. */
const volatile _Bool want_events;
const volatile _Bool want_doorbells;
const volatile __u64 min_latency;
const volatile __u32 wakeup_bytes;
const volatile _Bool filter_devices, filter_queues, filter_opcodes;
const volatile __u64 devices[16];  /* a bit for each instance below 1024 */
const volatile __u64 queues[1024]; /* a bit for each QID */
const volatile __u64 opcodes[4];
const volatile __u32 vm; /* tgid; 0: all */

/* Offsets of fields in the records of classic tracepoints, from tracefs. */
const volatile __u32 setup_ctrl, setup_qid, setup_opcode, setup_cid, setup_nsid, setup_cdw10, setup_disk;
const volatile __u32 complete_ctrl, complete_qid, complete_cid, complete_result, complete_retries, complete_status;
const volatile __u32 sq_ctrl, sq_qid, sq_head_at, sq_tail_at;
const volatile __u32 async_ctrl, async_result;
const volatile __u32 exit_reason_at;

/* A command that is under way. */
struct start {
	__u64 key; /* 0: the slot is free */
	__u64 at;
	__u64 slba;
	__u64 user_data;
	__u32 blocks;
	__u32 bytes;
	__u32 nsid;
	__u32 tid;
	__u32 cdw10[6];
	__u16 device;
	__u16 qid;
	__u16 cid;
	__u8 opcode;
	__u8 spilled;
	char comm[16];
	char disk[32];
};

struct cell_key {
	__u16 device;
	__u16 qid;
	__u8 opcode;
	__u8 size_class;
	__u16 pad;
};

struct cell {
	__u64 errors;
	__u64 retries;
	__u64 bytes;
	struct hist latency;
};

struct queue_key {
	__u16 device;
	__u16 qid;
};

/* A queue belongs to few CPUs, so this is not per CPU: the depth could not be. */
struct queue {
	__u64 started;
	__u64 ended;
	__u64 orphans;
	__u64 replaced; /* started again without an end: the driver gave them back to the block layer */
	__u64 timeouts;
	__u64 resets;
	__u64 aers;
	__u64 publishes;
	__u64 interrupts;
	__s64 depth;
	__s64 depth_max;
	__u32 sq_head;
	__u32 sq_tail;
};

struct block_start {
	__u64 key; /* as in struct start */
	__u64 inserted;
	__u64 issued;
	__u32 dev;
	__u32 bytes;
	__u8 op;
	__u8 spilled;
	__u8 pad[6];
};

struct block_key {
	__u32 dev;
	__u8 op;
	__u8 pad[3];
};

struct block_cell {
	__u64 bytes;
	struct hist queued;
	struct hist in_device;
};

struct vm_cell {
	__u64 exits;
	__u64 mmio;
	__u64 fast_mmio;
};

struct reason_key {
	__u32 tgid;
	__u32 reason;
};

enum kind {
	KIND_START = 1,
	KIND_END,
	KIND_ASYNC_EVENT,
	KIND_TIMEOUT,
	KIND_RESET,
	KIND_DOORBELL,
};

struct event {
	__u64 at;
	__u64 latency;
	__u64 slba;
	__u64 user_data;
	__u64 result;
	__u32 blocks;
	__u32 bytes;
	__u32 nsid;
	__u32 tid;
	__u32 sq_head;
	__u32 sq_tail;
	__u32 cdw10[6];
	__u16 device;
	__u16 qid;
	__u16 cid;
	__u16 status;
	__u8 kind;
	__u8 opcode;
	__u8 retries;
	__u8 pad[5];
	char comm[16];
	char disk[32];
};

/* Indices of counters. */
enum counter {
	LOST_RING,
	LOST_MAP,
	HIT_SETUP,
	HIT_COMPLETE,
	HIT_SQ,
	HIT_ASYNC,
	HIT_INSERT,
	HIT_ISSUE,
	HIT_RQ_COMPLETE,
	HIT_KVM_EXIT,
	HIT_KVM_MMIO,
	HIT_KVM_FAST_MMIO,
	HIT_QUEUE_RQ,
	HIT_QUEUE_RQS,
	HIT_COMMIT_RQS,
	HIT_IRQ,
	HIT_TIMEOUT,
	HIT_RESET,
	HIT_URING_CMD,
	AGAIN_SETUP, /* of no hook: places in scratch */
	AGAIN_ISSUE,
	COUNTERS,
};

/* Sizes are what a machine of two CPUs gets; userspace sets them. */
#define MAP(name, kind, size, key_type, value_type) \
	struct {                                    \
		__uint(type, kind);                 \
		__uint(max_entries, size);          \
		__type(key, key_type);              \
		__type(value, value_type);          \
	} name SEC(".maps")

MAP(cells, BPF_MAP_TYPE_PERCPU_HASH, 1024, struct cell_key, struct cell);
MAP(queue_states, BPF_MAP_TYPE_HASH, 1024, struct queue_key, struct queue);
MAP(first_queues, BPF_MAP_TYPE_ARRAY, 1024, __u32, struct queue); /* of nvme0 to nvme15, those below 64 */
MAP(block_cells, BPF_MAP_TYPE_PERCPU_HASH, 128, struct block_key, struct block_cell);
MAP(vm_cells, BPF_MAP_TYPE_PERCPU_HASH, 256, __u32, struct vm_cell);
MAP(exit_reasons, BPF_MAP_TYPE_PERCPU_HASH, 2048, struct reason_key, __u64);
MAP(uring_cmds, BPF_MAP_TYPE_HASH, 16384, __u64, __u64);
MAP(block_sizes, BPF_MAP_TYPE_HASH, 1024, __u64, __u32); /* controller<<32 | NSID; for kernels without BTF */
MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, COUNTERS, __u32, __u64);
MAP(scratch, BPF_MAP_TYPE_PERCPU_ARRAY, COUNTERS, __u32, __u64);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

/* Values too large for the stack, to put into maps. */
static const struct cell no_cell;
static const struct block_cell no_block_cell;

static __always_inline void count(enum counter c)
{
	__u32 index = c;
	__u64 *n = bpf_map_lookup_elem(&counters, &index);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/*
 * The verifier lets no pointer of the kernel's be multiplied; what was in memory is a number. The place is the program's own: an interrupt may come in
 * between, and with it another program, but not this one.
 */
static __always_inline __u64 number(enum counter program, const void *p)
{
	__u32 index = program;
	__u64 *n = bpf_map_lookup_elem(&scratch, &index);

	if (!n)
		return 1; /* never */
	*(const void *volatile *)n = p;
	return *(volatile __u64 *)n;
}

/*
 * What is under way, by its request. Putting something into a hash of the kernel's and taking it out costs more than all the rest, so a request has one
 * place in an array, which it claims; if that is taken it goes to a hash. A key is not 0, and its request is begun and ended by one CPU at a time.
 */
#define SLOT_BITS 14

#define TABLE(name, type)                                                                     \
	MAP(name, BPF_MAP_TYPE_ARRAY, 1 << SLOT_BITS, __u32, type);                           \
	MAP(name##_spilled, BPF_MAP_TYPE_HASH, 16384, __u64, type);                           \
	static const type no_##name;                                                          \
	__u64 name##_spills; /* how many are in the hash */                                   \
                                                                                              \
	static __always_inline type *name##_find(__u64 key)                                   \
	{                                                                                     \
		__u32 i = key * 0x9E3779B97F4A7C15ULL >> (64 - SLOT_BITS);                    \
		type *s;                                                                      \
                                                                                              \
		if (name##_spills) {                                                          \
			s = bpf_map_lookup_elem(&name##_spilled, &key);                       \
			if (s)                                                                \
				return s;                                                     \
		}                                                                             \
		s = bpf_map_lookup_elem(&name, &i);                                           \
		return s && s->key == key ? s : 0;                                            \
	}                                                                                     \
                                                                                              \
	/* The place of a request that has none; 0: there is no room. */                      \
	static __always_inline type *name##_claim(__u64 key)                                  \
	{                                                                                     \
		__u32 i = key * 0x9E3779B97F4A7C15ULL >> (64 - SLOT_BITS);                    \
		type *s = bpf_map_lookup_elem(&name, &i);                                     \
                                                                                              \
		if (s && !s->key && !__sync_val_compare_and_swap(&s->key, 0, key))            \
			return s;                                                             \
		if (bpf_map_update_elem(&name##_spilled, &key, &no_##name, BPF_NOEXIST))      \
			return 0;                                                             \
		__sync_fetch_and_add(&name##_spills, 1);                                      \
		s = bpf_map_lookup_elem(&name##_spilled, &key);                               \
		if (s) {                                                                      \
			s->key = key;                                                         \
			s->spilled = 1;                                                       \
		}                                                                             \
		return s;                                                                     \
	}                                                                                     \
                                                                                              \
	static __always_inline void name##_free(type *s, __u64 key)                           \
	{                                                                                     \
		if (!s->spilled)                                                              \
			__sync_lock_test_and_set(&s->key, 0);                                 \
		else if (!bpf_map_delete_elem(&name##_spilled, &key))                         \
			__sync_fetch_and_add(&name##_spills, -1);                             \
	}

TABLE(starts, struct start)
TABLE(block_starts, struct block_start)

/* The number of the highest bit of a v that is not 0. */
static __always_inline __u32 log2(__u64 v)
{
	__u32 n = 0;

	if (v >> 32) { n += 32; v >>= 32; }
	if (v >> 16) { n += 16; v >>= 16; }
	if (v >> 8) { n += 8; v >>= 8; }
	if (v >> 4) { n += 4; v >>= 4; }
	if (v >> 2) { n += 2; v >>= 2; }
	return n + (v >> 1);
}

static __always_inline __u32 bucket(__u64 ns)
{
	__u32 shift, i;

	if (ns >> TOP_BITS)
		ns = (1ULL << TOP_BITS) - 1;
	shift = log2(ns | (1 << SUB_BITS)) - SUB_BITS;
	i = (shift << SUB_BITS) + (__u32)(ns >> (shift & 63));
	return i < BUCKETS ? i : BUCKETS - 1; /* never; the verifier cannot see it */
}

/* One program alone writes a histogram, and the kernel lets none run twice at a time on one CPU. */
static __always_inline void record(struct hist *h, __u64 ns)
{
	__u32 i;

	if ((__s64)ns < 0)
		ns = 0;
	if (ns >> TOP_BITS)
		ns = (1ULL << TOP_BITS) - 1;
	i = bucket(ns);
	barrier_var(i);
	if (i < BUCKETS)
		h->counts[i]++;
	h->sum += ns;
	if (ns > h->max)
		h->max = ns;
}

/* SizeClassOf in ebpf/trace: 0 without data, 1 up to 512 bytes, and one more for each doubling; 13 is above 1 MiB. */
static __always_inline __u8 size_class(__u32 bytes)
{
	__u32 n;

	if (!bytes)
		return 0;
	if (bytes <= 512)
		return 1;
	n = log2(bytes - 1) - 7;
	return n < 13 ? n : 13;
}

static __always_inline _Bool wanted(__u32 device, __u32 qid)
{
	if (filter_devices && (device > 1023 || !(devices[(device >> 6) & 15] >> (device & 63) & 1)))
		return 0;
	return !filter_queues || (queues[(qid >> 6) & 1023] >> (qid & 63) & 1);
}

static __always_inline _Bool wanted_opcode(__u32 opcode)
{
	return !filter_opcodes || (opcodes[(opcode >> 6) & 3] >> (opcode & 63) & 1);
}

static __always_inline struct queue *queue_of(__u16 device, __u16 qid)
{
	struct queue_key key = { .device = device, .qid = qid };
	struct queue *q;

	if (device < 16 && qid < 64) {
		__u32 i = device << 6 | qid;

		return bpf_map_lookup_elem(&first_queues, &i);
	}
	q = bpf_map_lookup_elem(&queue_states, &key);
	if (!q) {
		struct queue none = {};

		bpf_map_update_elem(&queue_states, &key, &none, BPF_NOEXIST);
		q = bpf_map_lookup_elem(&queue_states, &key);
	}
	return q;
}

static __always_inline struct event *new_event(__u8 kind, __u64 at)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(LOST_RING);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->kind = kind;
	e->at = at;
	return e;
}

/* The reader looks by itself a few times a second; it is woken when much has come together. */
static __always_inline void submit(struct event *e)
{
	__u64 flags = BPF_RB_NO_WAKEUP;

	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) >= wakeup_bytes)
		flags = BPF_RB_FORCE_WAKEUP;
	bpf_ringbuf_submit(e, flags);
}
