package trace

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDevices is of a sysfs with two controllers, one of which has no disk, and with what is neither.
func TestDevices(t *testing.T) {
	sys := t.TempDir()
	for name, content := range map[string]string{
		"nvme10/model": "M\n", "nvme10/serial": "S  \n", "nvme10/address": "0000:01:00.0\n",
		"nvme10/nvme10n2/nsid": "7\n", "nvme10/nvme10n2/queue/logical_block_size": "4096\n",
		"nvme10/nvme10c10n3/nsid": "8\n", "nvme10/nvme10c10n3/queue/logical_block_size": "512\n", // a path of a multipath disk
		"nvme10/nvme10n9/nsid": "9\n", // going
		"nvme1/model":          "N\n",
		"nvmeof/model":         "none\n",
	} {
		path := filepath.Join(sys, "class/nvme", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	devices, err := devicesOf(sys)
	if err != nil || len(devices) != 2 || devices[0].Instance != 1 || len(devices[0].Disks) != 0 {
		t.Fatalf("%+v, %v", devices, err)
	}
	d := devices[1]
	if d.Name != "nvme10" || d.Instance != 10 || d.Model != "M" || d.Serial != "S" || d.Address != "0000:01:00.0" || len(d.Disks) != 2 {
		t.Fatalf("%+v", d)
	}
	for _, disk := range d.Disks {
		if disk != (Disk{"nvme10n2", 7, 4096}) && disk != (Disk{"nvme10c10n3", 8, 512}) {
			t.Errorf("%+v", disk)
		}
	}
	for name, want := range map[string]uint16{"nvme1": 1, "/dev/nvme1": 1, "nvme10": 10, "/dev/nvme10n2": 10, "nvme10n2p1": 10, "nvme10c10n3": 10} {
		if got, err := findDevice(devices, name); err != nil || got.Instance != want {
			t.Errorf("%s is %+v, %v", name, got, err)
		}
	}
	for _, name := range []string{"nvme2", "nvme100", "nvme", "", "sda"} {
		if got, err := findDevice(devices, name); err == nil || !strings.Contains(err.Error(), "there is nvme1, nvme10") {
			t.Errorf("%s is %+v, %v", name, got, err)
		}
	}
	none, err := devicesOf(filepath.Join(sys, "none"))
	if err != nil || len(none) != 0 {
		t.Errorf("%v, %v", none, err)
	}
	if _, err := findDevice(none, "nvme0"); err == nil || !strings.Contains(err.Error(), "no NVMe controller") {
		t.Errorf("%v", err)
	}
}
