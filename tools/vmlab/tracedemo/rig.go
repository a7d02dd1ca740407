// Package tracedemo shows and measures nvmetrace in a guest with a stock kernel and QEMU's NVMe devices.
//
//	rig.go       the guest
//	demo.go      what nvmetrace shows of a load (make trace-demo)
//	overhead.go  what nvmetrace costs a load (vmlab tracebench)
package tracedemo

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// diskBytes is the size of each disk.
const diskBytes = 64 << 20

type rig struct {
	vm    *vmlab.VM
	disks []string // block devices
}

// boot starts a guest with n disks in memory and calls do with it.
func boot(ctx context.Context, lab *vmlab.Lab, n int, say func(string), do func(*rig) error) (err error) {
	dir, err := os.MkdirTemp(tmpfs(), "trace-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	guest := vmlab.Config{MemoryMiB: 1024, Programs: []string{"hostmed", "guestdrv", "nvmetrace"}}
	data := make([]byte, diskBytes) // of which nothing is a hole
	rand.NewChaCha8([32]byte{}).Read(data)
	for i := range n {
		image := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(image, data, 0o600); err != nil {
			return err
		}
		guest.Devices = append(guest.Devices, vmlab.QEMUNVMe(image, fmt.Sprintf("trace%d", i)))
	}
	say("booting a guest")
	r := &rig{}
	if r.vm, err = lab.Start(ctx, guest); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.vm.Close()) }()
	for i := range n {
		d, err := r.vm.DiskAt(ctx, i)
		if err != nil {
			return err
		}
		r.disks = append(r.disks, d.Namespace(1))
	}
	return do(r)
}

// tmpfs is where memory is, so that no disk of the machine is measured; "" is the usual place.
func tmpfs() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}

// exec runs a script in the guest and returns what it printed.
func (r *rig) exec(ctx context.Context, limit time.Duration, script string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	res, err := r.vm.Exec(ctx, script)
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("exit %d: %s", res.Exit, tail(res.Stdout+res.Stderr))
	}
	return strings.TrimRight(res.Stdout, "\n"), err
}

func tail(s string) string { return s[max(0, len(s)-800):] }
