package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

func TestBenchTable(t *testing.T) {
	guest, host, idle := 0.0961, 0.1, 0.04
	r := &load.Result{
		IOPS: 8123456.4, BandwidthMiB: 31732, Latency: load.Latency{Mean: 3921, P50: 3700, P99: 6100, P999: 12000, Max: 180000},
		MMIOPerIO: 0.0000021, WakeupsPerIO: 0, CPU: load.CPU{Guest: &guest, Host: &host}, Doorbells: "shadow",
		Kind: load.RandRead, BlockSize: 4096, Depth: 32, Jobs: 4, Seconds: 10.01,
	}
	const want = `randread of 4 KiB, 4 jobs at queue depth 32, 10.0 s
vfio-user:/s, namespace 2, doorbells: shadow

  IOPS         8,123,456
  bandwidth    31,732 MiB/s
  latency      mean 3.92 us   p50 3.70 us   p99 6.10 us   p99.9 12.0 us   max 180 us
  MMIO writes  0.0000021 per I/O
  wake-ups     0 per I/O
  CPU          guest 0.096 s   host 0.100 s   per million I/Os
  errors       0
`
	if got := benchTable("vfio-user:/s", 2, size.List{4096}, r); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	r.Jobs, r.Errors, r.VerifyErrors, r.Interrupted, r.CPU.Host = 1, 3, 1000, true, nil
	r.Problems = []string{"job 0: lba 0x1, generation 2: stale"}
	r.Ops = []load.Op{{Op: "read", Latency: load.Latency{Mean: 1000}}, {Op: "write", Latency: load.Latency{Mean: 2000}}}
	r.Trouble = &load.Trouble{Timeouts: 2, Aborts: 1, Resets: 1}
	r.Idle = &load.Idle{Seconds: 5, Guest: 0.01, Host: &idle}
	got := benchTable("vfio-user:/s", 2, size.List{512, 4096}, r)
	for _, line := range []string{
		"    reads      mean 1.00 us   p50 0 ns", "    writes     mean 2.00 us", "  trouble      2 commands missed their deadline, 1 aborts, 1 controller resets\n",
		"randread of 512 B, 4 KiB, 1 job at queue depth 32, 10.0 s (interrupted)\n", "host unknown", "3, 1,000 wrong blocks\n",
		"idle CPU     guest 0.0 %   host 0.0 %   of one core, in 5.0 s\n", "\n  job 0: lba 0x1, generation 2: stale\n",
	} {
		if !strings.Contains(got, line) {
			t.Errorf("%q is missing in\n%s", line, got)
		}
	}
}

func TestBenchProgress(t *testing.T) {
	got := benchProgress(load.Progress{Phase: load.PhaseMeasure, Elapsed: 2 * time.Second, Total: 10 * time.Second, IOs: 4e6, Bytes: 4e6 * 4096, Errors: 2})
	if want := "[ 2 of 10 s]  measuring  2,000,000 IOPS  7,813 MiB/s  2 ERRORS"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func sample() *described {
	c := &nvme.IdentifyController{VID: 0x1ae0, MDTS: 8, NN: 1, VER: 0x10400, SQES: 0x66, CQES: 0x44}
	nvme.SetASCII(c.SN[:], "SB1")
	nvme.SetASCII(c.MN[:], "a \x1b[31mmodel")
	nvme.SetASCII(c.FR[:], "1.0")
	n := &nvme.IdentifyNamespace{NSZE: 2097152, NLBAF: 1, FLBAS: 1}
	n.LBAF[0].LBADS, n.LBAF[1].LBADS = 12, 9
	return &described{device: "vfio-user:/s", doorbells: "shadow", capabilities: nvme.CAP(0).WithMQES(4095), controller: c,
		namespaces: []describedNamespace{{nsid: 1, id: n}}}
}

func TestIdentifyText(t *testing.T) {
	var b strings.Builder
	if err := sample().text(&b); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"vfio-user:/s: a ?[31mmodel, serial SB1, firmware 1.0\n", // a device cannot colour the terminal
		"queues of 4096 entries, transfers of 1 MiB, doorbells: shadow\n",
		"  1          1.0 GiB  512 B  2,097,152  00000000000000000000000000000000\n",
		"\nNVME Identify Controller:\nvid       : 0x1ae0\n", "\nsn        : SB1\n", "\nver       : 0x10400\n", "\nsqes      : 0x66\n",
		"\nNVME Identify Namespace 1:\nnsze    : 0x200000\n", "\nlbaf  0 : ms:0   lbads:12 rp:0x0\nlbaf  1 : ms:0   lbads:9  rp:0x0 (in use)\n",
	} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("%q is missing in\n%s", line, b.String())
		}
	}
}

func TestIdentifyJSON(t *testing.T) {
	var b strings.Builder
	if err := sample().json(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Device, Doorbells string
		Controller        map[string]any
		Namespaces        []struct {
			NSID  uint32
			NSZE  uint64
			LBAFs []struct{ MS, DS, RP uint8 }
		}
	}
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil {
		t.Fatalf("%v in %s", err, b.String())
	}
	if got.Doorbells != "shadow" || got.Controller["vid"] != 6880.0 || got.Controller["sn"] != "SB1" || len(got.Namespaces) != 1 ||
		got.Namespaces[0].NSZE != 2097152 || len(got.Namespaces[0].LBAFs) != 2 || got.Namespaces[0].LBAFs[1].DS != 9 {
		t.Errorf("%+v", got)
	}
	if strings.Index(b.String(), `"vid"`) > strings.Index(b.String(), `"ssvid"`) {
		t.Error("the fields are not in nvme-cli's order")
	}
}

func TestListTable(t *testing.T) {
	list := []listed{
		howToOpen(pcifn.Function{
			Address: "0000:00:03.0", Vendor: 0x1b36, Device: 0x10, Model: "QEMU NVMe Ctrl", Driver: "nvme", Group: "7", GroupType: "DMA-FQ",
			Disks: []pcifn.Disk{{Name: "nvme0n1", NSID: 1, Bytes: 1 << 30, Uses: []string{"nvme0n1p1 is mounted at /srv"}}, {Name: "nvme0n2", NSID: 2, Bytes: 1 << 20}},
		}),
		howToOpen(pcifn.Function{Address: "0000:00:04.0", Vendor: 0x1b36, Device: 0x10, Driver: "nvme"}),
		howToOpen(pcifn.Function{Address: "0000:01:00.0", Vendor: 0x1d1d, Device: 0x2807, Driver: "vfio-pci", Group: "8", GroupType: "unmanaged"}),
		howToOpen(pcifn.Function{Address: "0000:02:00.0", Vendor: 0x1d1d, Device: 0x2807, Driver: "vfio-pci", Group: "9", Others: []pcifn.Member{{Address: "0000:02:00.1", Driver: "e1000"}}}),
	}
	const want = `0000:00:03.0  1b36:0010  QEMU NVMe Ctrl
  driver     nvme
  IOMMU      group 7, DMA-FQ
  disk       nvme0n1, 1.0 GiB; nvme0n1p1 is mounted at /srv
  disk       nvme0n2, 1.0 MiB
  opened as  nothing: in use: nvme0n1p1 is mounted at /srv

0000:00:04.0  1b36:0010
  driver     nvme
  IOMMU      no group
  opened as  nothing: guestdrv bind 0000:00:04.0 first

0000:01:00.0  1d1d:2807
  driver     vfio-pci
  IOMMU      group 8, unmanaged
  opened as  vfio:0000:01:00.0: vfio-pci has it

0000:02:00.0  1d1d:2807
  driver     vfio-pci
  IOMMU      group 9
  opened as  nothing: the kernel still has others of its IOMMU group, which must be bound to vfio-pci or to nothing too: 0000:02:00.1 (e1000)
`
	if got := listTable(list); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := listTable(nil); got == "" {
		t.Error("nothing to show, and nothing said")
	}
}
