package nvmecli

import (
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestNVMeCLI: everything that nvme-cli prints of our controllers is what they are, and what it asks them to do is done.
func TestNVMeCLI(t *testing.T) {
	resetting := "resetting controller$" // a warning, since somebody asked for it
	managed := named("namespaces", 1, namespace("mem:size=16MiB"))
	managed.Controllers[0].Management = true
	managed.Pool = hostmed.PoolConfig{Dir: t.TempDir(), Capacity: 48 << 20}
	runThemes(t,
		// Otherwise the kernel keeps nvme-cli from the registers of a device that has a driver.
		vmlab.Config{Append: "iomem=relaxed"},
		theme{name: "identify", run: identify, sub: named("identify", 1, namespace(fileSpec(t, "identify", "size=64MiB")), namespace("mem:size=32MiB,lba=4096"))},
		theme{name: "logs", run: logs, sub: named("logs", 1, namespace("mem:size=64MiB"))},
		theme{name: "features", run: features, sub: named("features", 1, namespace(fileSpec(t, "features", "size=64MiB"))), allowed: []string{resetting}},
		theme{name: "commands", run: commands, sub: named("commands", 1, namespace(fileSpec(t, "commands", "size=64MiB")), namespace("mem:size=64MiB,lba=4096"))},
		theme{name: "formats", run: formats, sub: named("formats", 1, namespace(fileSpec(t, "formats", "size=16MiB")))},
		theme{name: "namespaces", run: namespaces, sub: managed},
		theme{name: "hotplug", run: hotplug, sub: named("hotplug", 1, namespace("mem:size=16MiB"))},
		theme{name: "multipath", run: multipath, sub: named("multipath", 2, hostmed.NamespaceConfig{Spec: "mem:size=16MiB", Shared: true}), allowed: []string{resetting}},
		theme{name: "reservations", run: reservations, sub: named("reservations", 2, hostmed.NamespaceConfig{Spec: "mem:size=16MiB", Shared: true}), allowed: []string{"using deprecated NVME_IOCTL_IO_CMD"}},
		theme{name: "resets", run: resets, sub: named("resets", 1, namespace("mem:size=64MiB")), allowed: []string{resetting}},
	)
}
