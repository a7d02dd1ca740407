package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestInAGuest runs every case inside a Linux guest, over the PCI function, against hostmed's controller and QEMU's own. Ours passes; what
// QEMU's fails is qemuFails, and docs/conformance.md says it to people.
func TestInAGuest(t *testing.T) {
	lab := vmlab.Open(t)
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	vm := lab.Boot(t, vmlab.Config{Programs: []string{"conformance"}, Devices: []vmlab.Device{
		vmlab.Controller(t, hostmed.Shadow, "mem:size=64MiB"), vmlab.QEMUNVMe(image, "qemu"),
	}})
	ours, theirs := vm.Disk(t, 0).PCI, vm.Disk(t, 1).PCI
	vm.Run(t, "echo 24 > /proc/sys/vm/nr_hugepages")

	// A function that the kernel has is refused, and the message is the remedy.
	refused := vm.Try(t, "conformance run sysfs:"+ours)
	unbind := regexp.MustCompile(`\((echo \S+ > \S+/unbind)\)`).FindStringSubmatch(refused.Stderr)
	if refused.Exit == 0 || unbind == nil {
		t.Fatalf("a function with a driver: exit %d, %s", refused.Exit, refused.Stderr)
	}
	vm.Run(t, unbind[1])
	vm.Run(t, strings.ReplaceAll(unbind[1], ours, theirs))

	t.Run("hostmed", func(t *testing.T) {
		for id, seen := range failures(t, vm, ours) {
			t.Errorf("%s: %s", id, seen)
		}
	})
	t.Run("QEMU", func(t *testing.T) {
		got := failures(t, vm, theirs)
		for _, id := range slices.Sorted(maps.Keys(got)) {
			if _, known := qemuFails[id]; !known {
				t.Errorf("%s fails on QEMU's device and is not listed: %s\n(add it to qemuFails and to docs/conformance.md)", id, got[id])
			}
		}
		for _, id := range slices.Sorted(maps.Keys(qemuFails)) {
			if _, failed := got[id]; !failed {
				t.Errorf("%s passes on QEMU's device and is listed: take it out of qemuFails and of docs/conformance.md", id)
			}
		}
	})
}

// failures runs all cases against a PCI function of the guest and returns what was seen of those that failed.
func failures(t *testing.T, vm *vmlab.VM, pci string) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	r, err := vm.Exec(ctx, fmt.Sprintf("conformance run sysfs:%s --destructive --json --timeout 10s", pci))
	if err != nil {
		t.Fatal(err)
	}
	var out struct {
		Seconds                 float64
		Passed, Failed, Skipped int
		Cases                   []struct{ ID, Result, Seen string }
	}
	if err := json.NewDecoder(bytes.NewReader([]byte(r.Stdout))).Decode(&out); err != nil {
		t.Fatalf("%v: exit %d\n%s\n%s", err, r.Exit, r.Stdout, r.Stderr)
	}
	t.Logf("%d passed, %d failed, %d skipped in %.1f s", out.Passed, out.Failed, out.Skipped, out.Seconds)
	if out.Passed < 150 {
		t.Errorf("only %d cases passed", out.Passed)
	}
	failed := map[string]string{}
	for _, c := range out.Cases {
		if c.Result == "fail" {
			failed[c.ID] = c.Seen
		}
	}
	return failed
}
