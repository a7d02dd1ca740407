package nvmecli

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// formats: format to each block size and back, with data that must be gone; and write protection.
func formats(t *testing.T, b *bench) {
	dev := b.block(1)
	const size = 16 << 20
	b.put(t, "/tmp/data", pattern("formats", 64<<10))
	fill := func() {
		t.Helper()
		b.Run(t, fmt.Sprintf("dd if=/tmp/data of=%s bs=64k seek=3 oflag=direct 2>/dev/null", dev))
	}
	for _, f := range []struct {
		args  string
		block int
	}{
		{"--lbaf=1", 4096}, {"--block-size=512 --ses=1", 512}, {"--lbaf=0", 512}, {"--block-size=4096", 4096},
	} {
		fill()
		b.says(t, fmt.Sprintf("nvme format %s %s --force", dev, f.args), "Success formatting namespace:1")
		if got := b.Run(t, "blockdev --getss "+dev+"; blockdev --getsize64 "+dev); got != fmt.Sprintf("%d\n%d", f.block, size) {
			t.Errorf("after format %s the kernel has blocks of and size %q, want %d and %d", f.args, got, f.block, size)
		}
		id := b.object(t, "nvme id-ns "+dev)
		format := id["lbafs"].([]any)[number(t, id["flbas"])].(map[string]any)
		if number(t, id["nsze"]) != uint64(size/f.block) || 1<<number(t, format["ds"]) != f.block {
			t.Errorf("after format %s: %v blocks of 2^%v bytes, want %d of %d", f.args, id["nsze"], format["ds"], size/f.block, f.block)
		}
		b.Run(t, "dd if="+dev+" bs=1M iflag=direct 2>/dev/null | tr -d '\\0' | wc -c | grep -qx 0")
		if data := onDisk(t, b.sub.Namespaces[0].Spec, 0, size); len(bytes.Trim(data, "\x00")) > 0 {
			t.Errorf("after format %s the file has data", f.args)
		}
		b.fio(t, strings.Replace(fmt.Sprintf(load, dev, "libaio"), "--size=2M", "--size=512k", 1), 256)
	}
	if e := b.events(t); len(e["Format NVM Start Event"]) != 4 || len(e["Format NVM Completion Event"]) != 4 {
		t.Errorf("persistent-event-log after 4 formats: %v", e)
	}
	b.fails(t, nvme.StatusInvalidFormat, "nvme format "+dev+" --lbaf=5 --force")
	b.fails(t, nvme.StatusInvalidField, "nvme format "+dev+" --lbaf=0 --ses=2 --force") // cryptographic erase
	b.fails(t, nvme.StatusInvalidFormat, "nvme format "+dev+" --lbaf=0 --pi=1 --force")

	ro := "cat /sys/block/" + strings.TrimPrefix(dev, "/dev/") + "/ro"
	protect := func(v int) { b.Run(t, fmt.Sprintf("nvme set-feature %s -n 1 -f 0x84 -V %d", dev, v)) }
	fill()
	protect(1)
	b.Run(t, "until [ $("+ro+") = 1 ]; do sleep 0.02; done")
	b.fails(t, nvme.StatusNamespaceWriteProtected, "nvme write-zeroes "+dev+" -s 0 -c 0")
	b.fails(t, nvme.StatusNamespaceWriteProtected, "nvme format "+dev+" --lbaf=1 --force")
	b.Run(t, "dd if="+dev+" bs=64k skip=3 count=1 iflag=direct 2>/dev/null | cmp - /tmp/data")
	b.says(t, "nvme id-ns -H "+dev, "Namespace Write Protected")
	protect(0)
	b.Run(t, "until [ $("+ro+") = 0 ]; do sleep 0.02; done")
	b.says(t, "nvme write-zeroes "+dev+" -s 0 -c 0", "NVME Write Zeroes Success")
}
