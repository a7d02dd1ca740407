package vmlab

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	debianImage = "debian.ext4"
	debianMiB   = 192 // of the file system

	agentPath = "/usr/bin/vmlab-agent"
	// FastInit, on the kernel's command line, starts the agent of a disk's system without systemd, in a third of the time.
	FastInit = "init=/usr/sbin/vmlab-init"
)

// debianFiles make a bootable system of packages that were unpacked and never configured: path and text, in turn. A machine-id spares the
// first boot's work.
var debianFiles = []string{
	"etc/hostname", "debian\n",
	"etc/hosts", "127.0.0.1 localhost debian\n",
	"etc/fstab", "",
	"etc/shadow", "root::20000:0:99999:7:::\n",
	"etc/machine-id", "5ead0be1000040008000000000000001\n",
	"etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
	"etc/systemd/journald.conf.d/vmlab.conf", "[Journal]\nStorage=volatile\n",
	"usr/sbin/vmlab-init", `#!/bin/sh
export PATH=/usr/bin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
while :; do vmlab-agent; sleep 0.2; done &
while :; do wait; sleep 1; done
`,
	"etc/systemd/system/vmlab-agent.service", `[Unit]
Description=Agent of shadowbell's tests
DefaultDependencies=no
After=local-fs.target systemd-udevd.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=` + agentPath + `
Restart=always
RestartSec=200ms

[Install]
WantedBy=multi-user.target
`,
}

// debianLinks are symbolic links of it: path and target, in turn. What is linked to /dev/null does not run: it takes long under emulation.
var debianLinks = []string{
	"etc/systemd/system/multi-user.target.wants/vmlab-agent.service", "../vmlab-agent.service",
	"etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target",
	"etc/systemd/system/getty.target", "/dev/null",
	"etc/systemd/system/systemd-hwdb-update.service", "/dev/null",
	"etc/systemd/system/systemd-journal-catalog-update.service", "/dev/null",
	"etc/systemd/system/ldconfig.service", "/dev/null",
	"etc/systemd/system/e2scrub_reap.service", "/dev/null",
	"etc/systemd/system/timers.target", "/dev/null",
	"etc/systemd/system/modprobe@.service", "/dev/null",
	"etc/systemd/system/dev-mqueue.mount", "/dev/null",
	"etc/systemd/system/dev-hugepages.mount", "/dev/null",
	"etc/systemd/system/sys-fs-fuse-connections.mount", "/dev/null",
	"etc/systemd/system/proc-sys-fs-binfmt_misc.automount", "/dev/null",
	"etc/systemd/system/systemd-sysusers.service", "/dev/null",
	"etc/systemd/system/systemd-random-seed.service", "/dev/null",
	"etc/systemd/system/systemd-update-done.service", "/dev/null",
	"etc/systemd/system/systemd-udev-load-credentials.service", "/dev/null",
}

// debian makes the file system of a small Debian with systemd, a stock kernel and, later, the agent.
func (b *build) debian() error {
	tree := filepath.Join(b.dir, "debian")
	if err := b.extract("debian", tree); err != nil {
		return err
	}
	for _, d := range []string{"boot", "dev", "proc", "sys", "run", "tmp", "root", "mnt"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			return err
		}
	}
	// What the package's script would do.
	for _, name := range []string{"passwd", "group"} {
		if err := copyFile(filepath.Join(tree, "etc", name), filepath.Join(tree, "usr/share/base-passwd", name+".master"), 0o644); err != nil {
			return err
		}
	}
	for i := 0; i < len(debianFiles); i += 2 {
		p := filepath.Join(tree, debianFiles[i])
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if strings.HasPrefix(debianFiles[i+1], "#!") {
			mode = 0o755
		}
		if err := os.WriteFile(p, []byte(debianFiles[i+1]), mode); err != nil {
			return err
		}
	}
	for i := 0; i < len(debianLinks); i += 2 {
		p := filepath.Join(tree, debianLinks[i])
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(debianLinks[i+1], p); err != nil {
			return err
		}
	}
	if err := copyFile(filepath.Join(tree, "boot/vmlinuz"), filepath.Join(b.dir, "bzImage"), 0o644); err != nil {
		return err
	}
	size, err := treeSize(tree)
	if err != nil {
		return err
	}
	if _, err := output(b.ctx, b.root, "usr/sbin/mke2fs", "-q", "-t", "ext4", "-L", "vmlab", "-d", tree,
		filepath.Join(b.dir, debianImage), fmt.Sprintf("%dM", debianMiB)); err != nil {
		return err
	}
	b.note = fmt.Sprintf("%d MB", size>>20)
	if err := os.RemoveAll(b.apt("")); err != nil {
		return err
	}
	return os.RemoveAll(tree)
}

func treeSize(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			size += fi.Size()
		}
		return err
	})
	return size, err
}

func copyFile(to, from string, mode os.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer dst.Close()
	if _, err := io.Copy(dst, src); err != nil {
		return err
	}
	return dst.Close()
}
