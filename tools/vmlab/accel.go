package vmlab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kvm = "kvm"
	tcg = "tcg"

	// A stock kernel is up in 2 s under a KVM that works.
	probeWithin = 15 * time.Second
)

// verdict is what a probe found, valid until the machine is started anew.
type verdict struct {
	BootID, Accel, Why string
}

// Accel returns "kvm" if a stock kernel boots under this machine's KVM, else "tcg", and in the second case why. /dev/kvm alone says little: on
// nested machines without help from the hardware it is there, and guests hang. The answer is probed once per start of the machine and kept.
func (l *Lab) Accel(ctx context.Context) (accel, why string, err error) {
	switch a := os.Getenv(envAccel); a {
	case "":
	case kvm, tcg:
		return a, envAccel, nil
	default:
		return "", "", fmt.Errorf("%s=%s: use %s or %s", envAccel, a, kvm, tcg)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", err
	}
	path := filepath.Join(l.dir, "accel.json")
	unlock, err := lock(ctx, filepath.Join(l.dir, "accel.lock"), l.log)
	if err != nil {
		return "", "", err
	}
	defer unlock()
	var v verdict
	if b, err := os.ReadFile(path); err == nil && json.Unmarshal(b, &v) == nil && v.BootID == string(boot) {
		return v.Accel, v.Why, nil
	}
	v = verdict{BootID: string(boot), Accel: kvm}
	if why := l.probe(ctx); why != "" {
		v.Accel, v.Why = tcg, why
		fmt.Fprintf(l.log, "vmlab: software emulation, since %s\n", why)
	}
	if err := ctx.Err(); err != nil {
		return "", "", err // says nothing about KVM
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", "", err
	}
	return v.Accel, v.Why, os.WriteFile(path, b, 0o644)
}

// probe boots the stock kernel under KVM and returns why that does not work.
func (l *Lab) probe(ctx context.Context) (why string) {
	if err := unix.Access("/dev/kvm", unix.R_OK|unix.W_OK); err != nil {
		return fmt.Sprintf("/dev/kvm: %v", err)
	}
	tmp, err := newScratch()
	if err != nil {
		return err.Error()
	}
	defer tmp.remove()
	if err := os.Symlink(filepath.Join(l.dir, "initramfs"), tmp.file(initrdFile)); err != nil {
		return err.Error()
	}
	c := Config{CPUs: 1, MemoryMiB: 256, Append: "vmlab=probe"}
	if err := c.check(); err != nil {
		return err.Error()
	}
	args, err := c.arguments(l, kvm, tmp.path)
	if err != nil {
		return err.Error()
	}
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	out, err := output(ctx, l.root(), "qemu-system-x86_64", append(args, "-serial", "stdio")...)
	switch {
	case strings.Contains(out, probeWord):
		return ""
	case ctx.Err() != nil:
		return fmt.Sprintf("a stock kernel does not boot under this machine's KVM within %v", probeWithin)
	case err != nil:
		return fmt.Sprintf("QEMU fails under KVM: %v", lastLines(err.Error(), 1))
	}
	return "a stock kernel ends early under this machine's KVM"
}
