package vmlab

import (
	"slices"
	"strings"
	"testing"
)

// quiet is what a 6.12 kernel says of disks and machines that have nothing wrong with them.
const quiet = `<6>[    1.123456] Kernel command line: rcupdate.rcu_cpu_stall_timeout=300 console=ttyS0 quiet panic=-1 nvme_core.default_ps_max_latency_us=0
<6>[    8.061520] nvme nvme0: pci function 0000:00:02.0
<6>[    8.167812] nvme nvme0: D3 entry latency set to 30 seconds
<6>[    8.246403] nvme nvme0: 2/0/0 default/read/poll queues
<6>[    8.300000] nvme nvme0: APST enabled: max PS = 2, max round-trip latency = 2000us, table = 00 01 00
<6>[    9.000000]  nvme0n1: p1 p2
<5>[    9.100000] nvme0n1: detected capacity change from 131072 to 262144
<6>[    9.150000] nvme nvme0: rescanning namespaces.
<6>[    9.200000] EXT4-fs (nvme0n1): mounted filesystem 5d4ebc53-6f1d-4f0f-9ba1-8f3b4a8c8a70 r/w with ordered data mode. Quota mode: none.
<4>[    0.100000] ACPI: [Firmware Bug]: BIOS _OSI(Linux) query ignored
<6>[    0.150000] 	RCU CPU stall warnings timeout set to 300 (rcu_cpu_stall_timeout).
<4>[    0.200000] process: Switch to broadcast mode on CPU1
`

// unhappyLines are what the same kernel says otherwise, as its drivers write it.
const unhappyLines = `<4>[   12.000001] nvme nvme0: resetting controller
<4>[   12.000002] nvme nvme0: I/O tag 5 (1005) opcode 0x1 (I/O Cmd) QID 1 timeout, aborting req_op:WRITE(1) size:4096
<4>[   12.000003] nvme nvme0: I/O tag 5 (1005) opcode 0x1 (I/O Cmd) QID 1 timeout, reset controller
<4>[   12.000004] nvme nvme0: I/O tag 5 (1005) QID 1 timeout, completion polled
<4>[   12.000005] nvme nvme0: Abort status: 0x0
<4>[   12.000006] nvme nvme0: controller is down; will reset: CSTS=0xffffffff, PCI_STATUS=0x10
<4>[   12.000007] nvme nvme0: Does your device have a faulty power saving mode enabled?
<3>[   12.000008] nvme nvme0: Device not ready; aborting initialisation, CSTS=0x0
<4>[   12.000009] nvme nvme0: missing or invalid SUBNQN field.
<6>[   12.000010] nvme 0000:00:02.0: platform quirk: setting simple suspend
<6>[   12.000011] nvme nvme0: Ignoring bogus Namespace Identifiers
<3>[   12.000012] nvme nvme0: globally duplicate IDs for nsid 1
<3>[   12.000013] nvme nvme0: VID:DID 1ae0:001f model:shadowbell NVMe firmware:1.0
<3>[   12.000014] nvme nvme0: identifiers changed for nsid 1
<4>[   12.000015] nvme nvme0: Identify Descriptors failed (nsid=1, status=0x4002)
<4>[   12.000016] nvme nvme0: Identify NS List failed (status=0x2)
<3>[   12.000017] nvme nvme0: Could not set queue count (16384)
<4>[   12.000019] nvme nvme0: request 0x0 genctr mismatch (got 0x0 expected 0x1)
<3>[   12.000020] could not locate request for tag 0x3e7
<4>[   12.000021] nvme nvme0: invalid id 65535 completed on queue 1
<6>[   12.000022] nvme nvme0: controller capabilities changed, reset may be required to take effect.
<4>[   12.000023] nvme nvme0: Disabling device after reset failure: -19
<3>[   12.000024] nvme0n1: Read(0x2) @ LBA 0, 8 blocks, Unrecovered Read Error (sct 0x2 / sc 0x81) DNR 
<3>[   12.000025] nvme0n1: Write(0x1) @ LBA 0, 8 blocks, Namespace is Write Protected (sct 0x0 / sc 0x20) DNR 
<3>[   12.000026] nvme0: Identify(0x6), Invalid Field in Command (sct 0x0 / sc 0x2) DNR 
<3>[   12.000027] critical medium error, dev nvme0n1, sector 0 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 0
<3>[   12.000028] I/O error, dev nvme0n1, sector 0 op 0x1:(WRITE) flags 0x8800 phys_seg 1 prio class 2
<3>[   12.000029] Buffer I/O error on dev nvme0n1, logical block 0, async page read
<3>[   12.000030] operation not supported error, dev nvme0n1, sector 0 op 0x9:(WRITE_ZEROES) flags 0x0 phys_seg 0 prio class 0
<2>[   12.000031] EXT4-fs error (device nvme0n1): ext4_lookup:1857: inode #2: comm sh: deleted inode referenced: 12
<4>[   12.000032] EXT4-fs (nvme0n1): warning: mounting fs with errors, running e2fsck is recommended
<4>[   12.000033] nvme0n1: ignoring unaligned IO boundary:8
<4>[   12.000034] nvme nvme0: using unchecked data buffer
<4>[   12.000035] nvme nvme0: IO command:02 has unusual effects:00010001
<4>[   12.000036] nvme nvme0: something that no list has
<3>[   12.000037] INFO: task fio:123 blocked for more than 120 seconds.
<4>[   12.000038] WARNING: CPU: 0 PID: 1 at drivers/nvme/host/core.c:123 nvme_do+0x1/0x2
<3>[   12.000042] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
<4>[   12.000039] Call Trace:
<3>[   12.000040] irq 24: nobody cared (try booting with the "irqpoll" option)
<6>[   12.000041] vfio-pci 0000:00:02.0: Invalid PCI ROM header signature: expecting 0xaa55, got 0x0000
`

func TestComplaints(t *testing.T) {
	if bad := complaints(quiet, nil); len(bad) > 0 {
		t.Errorf("a healthy machine's log has complaints:\n%s", strings.Join(bad, "\n"))
	}
	for line := range strings.Lines(unhappyLines) {
		text := strings.TrimSpace(line[strings.Index(line, ">")+1:])
		if bad := complaints(quiet+line, nil); !slices.Equal(bad, []string{text}) {
			t.Errorf("%q: found %q", line, bad)
		}
	}
	if bad := complaints(unhappyLines, []string{"resetting controller$"}); len(bad) != strings.Count(unhappyLines, "\n")-1 {
		t.Errorf("with one line allowed: %d of %d", len(bad), strings.Count(unhappyLines, "\n"))
	}
}
