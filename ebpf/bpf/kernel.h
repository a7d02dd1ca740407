/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What of the kernel's types the programs read. Offsets come from the running kernel's BTF; only names count here. */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __le16;
typedef __u32 __le32;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

/* enum bpf_map_type and flags: the kernel's ABI */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_RB_NO_WAKEUP = 1,
	BPF_RB_FORCE_WAKEUP = 2,
	BPF_RB_AVAIL_DATA = 0,
};

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct gendisk {
	int major;
	int first_minor;
	char disk_name[32];
};

struct queue_limits {
	unsigned int logical_block_size;
};

struct request_queue {
	void *queuedata;
	struct gendisk *disk;
	struct queue_limits limits;
};

struct blk_mq_hw_ctx {
	unsigned int queue_num;
	void *driver_data;
};

struct request {
	struct request_queue *q;
	struct blk_mq_hw_ctx *mq_hctx;
	unsigned int cmd_flags;
	unsigned int __data_len;
	struct request *rq_next;
	void *end_io_data;
};

struct blk_mq_queue_data {
	struct request *rq;
	_Bool last;
};

struct work_struct {};

struct nvme_ctrl {
	int instance;
	struct work_struct reset_work;
};

struct nvme_dev {
	struct nvme_ctrl ctrl;
};

struct nvme_queue {
	struct nvme_dev *dev;
	__u16 sq_tail;
	__u16 last_sq_tail;
	__u16 qid;
};

/* NVMe Base 2.0c figure 88: the command as it is in memory, little endian like every machine that this is compiled for. */
struct nvme_common_command {
	__u8 opcode;
	__u16 command_id;
	__le32 nsid;
	__le32 cdw10;
	__le32 cdw11;
	__le32 cdw12;
	__le32 cdw13;
	__le32 cdw14;
	__le32 cdw15;
};

struct nvme_command {
	struct nvme_common_command common;
};

union nvme_result {
	__u64 u64;
};

struct nvme_request {
	union nvme_result result;
	__u8 retries;
	__u16 status;
	struct nvme_ctrl *ctrl;
};

struct io_cqe {
	__u64 user_data;
};

struct io_kiocb {
	struct io_cqe cqe;
};

#pragma clang attribute pop
