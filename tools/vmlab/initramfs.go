package vmlab

import (
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// initScript is the first process of a guest. What the kernel does not know of its command line (vmlab=…) is in its environment.
const initScript = `#!/bin/busybox sh
export PATH=/usr/bin:/usr/sbin HOME=/root TERM=${TERM:-vt100}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /tmp /run /root /mnt /var/tmp
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
hostname guest
ip link set lo up 2>/dev/null
if [ "$vmlab" = probe ]; then
	echo ` + probeWord + `
	poweroff -f
fi
[ "$vmlab" = shell ] || while :; do vmlab-agent; sleep 0.2; done &
if [ "$vmlab" = shell ]; then
	cat /etc/motd
	setsid cttyhack sh
	sync
	poweroff -f
fi
while :; do wait; sleep 1; done
`

const probeWord = "vmlab-probe-is-up"

// archive is an uncompressed cpio that is being written. The kernel takes several, one behind the other.
type archive struct {
	w    *cpio.Writer
	dirs map[string]bool
}

func newArchive(w io.Writer) *archive {
	return &archive{w: cpio.NewWriter(w), dirs: map[string]bool{"": true, ".": true}}
}

// parents adds the directories above name.
func (a *archive) parents(name string) error {
	dir := path.Dir(name)
	if a.dirs[dir] {
		return nil
	}
	if err := a.parents(dir); err != nil {
		return err
	}
	a.dirs[dir] = true
	return a.w.WriteHeader(&cpio.Header{Name: dir, Mode: cpio.TypeDir | 0o755, Links: 2})
}

func (a *archive) content(name string, mode cpio.FileMode, b []byte) error {
	if err := a.parents(name); err != nil {
		return err
	}
	if err := a.w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(b)), Links: 1}); err != nil {
		return err
	}
	_, err := a.w.Write(b)
	return err
}

func (a *archive) link(name, target string) error {
	if err := a.parents(name); err != nil {
		return err
	}
	if err := a.w.WriteHeader(&cpio.Header{Name: name, Linkname: target, Mode: cpio.TypeSymlink | 0o777, Size: int64(len(target)), Links: 1}); err != nil {
		return err
	}
	_, err := a.w.Write([]byte(target))
	return err
}

// file adds the file at from, under another name, with its permissions.
func (a *archive) file(name, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	fi, err := os.Stat(from)
	if err != nil {
		return err
	}
	return a.content(name, cpio.TypeReg|cpio.FileMode(fi.Mode().Perm()), b)
}

// tree adds everything below dir.
func (a *archive) tree(dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(p)
			if err != nil || a.dirs[name] {
				return err
			}
			return a.link(name, target)
		}
		return a.file(name, p)
	})
}

// initramfs writes the part of the guests' first file system that is the same for all.
func (b *build) initramfs() error {
	f, err := os.Create(filepath.Join(b.dir, "initramfs"))
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := a.parents("usr/" + d + "/x"); err != nil {
			return err
		}
		if err := a.link(d, "usr/"+d); err != nil {
			return err
		}
		a.dirs[d] = true
	}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "run", "root", "mnt", "etc", "var/tmp"} {
		if err := a.parents(d + "/x"); err != nil {
			return err
		}
	}
	if err := a.content("init", cpio.TypeReg|0o755, []byte(initScript)); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n", "etc/hosts": "127.0.0.1 localhost guest\n",
		"etc/nvme/hostnqn": "nqn.2014-08.org.nvmexpress:uuid:5ead0be1-0000-4000-8000-000000000001\n", "etc/nvme/hostid": "5ead0be1-0000-4000-8000-000000000001\n",
	} {
		if err := a.content(name, cpio.TypeReg|0o644, []byte(text)); err != nil {
			return err
		}
	}
	if err := b.guestFiles(a); err != nil {
		return err
	}
	if err := a.tree(filepath.Join(b.dir, "modules")); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(b.dir, "modules")); err != nil {
		return err
	}
	if err := a.w.Close(); err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	b.note = fmt.Sprintf("%d MB", fi.Size()>>20)
	return f.Close()
}

// closure is programs of the unpacked packages with the libraries that they need, each once.
type closure struct {
	root string
	file func(name, from string) error
	link func(name, target string) error
	have map[string]bool

	instead map[string]string // files that others take the place of
}

func (c *closure) add(name string) error {
	if c.have[name] {
		return nil
	}
	c.have[name] = true
	from := filepath.Join(c.root, name)
	if other := c.instead[name]; other != "" {
		from = other
	}
	if _, err := os.Lstat(from); err != nil {
		// Some libraries have a directory of their own, which whoever needs them knows. In the guest they do without.
		if found, _ := filepath.Glob(filepath.Join(c.root, path.Dir(name), "*", path.Base(name))); len(found) == 1 {
			from = found[0]
		}
	}
	if target, err := os.Readlink(from); err == nil {
		if err := c.link(name, target); err != nil {
			return err
		}
		return c.add(path.Join(path.Dir(name), target))
	}
	if err := c.file(name, from); err != nil {
		return err
	}
	libraries, err := needed(from)
	if err != nil {
		return err
	}
	for _, l := range libraries {
		if err := c.add(path.Join(libDir, l)); err != nil {
			return fmt.Errorf("%w (for %s)", err, name)
		}
	}
	return nil
}

// guestFiles adds guestPrograms, their libraries, and a link for each command of busybox that is no program of its own.
func (b *build) guestFiles(a *archive) error {
	have := map[string]bool{}
	fio := filepath.Join(b.dir, "fio")
	if err := slimFile(filepath.Join(b.root, guestFio), fio, guestFioWithout); err != nil {
		return err
	}
	all := closure{root: b.root, file: a.file, link: a.link, have: have, instead: map[string]string{guestFio: fio}}
	for _, p := range guestPrograms {
		if err := all.add(p); err != nil {
			return err
		}
	}
	if err := os.Remove(fio); err != nil {
		return err
	}
	// Programs name their dynamic linker by this path.
	if err := a.link("usr/lib64/ld-linux-x86-64.so.2", "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"); err != nil {
		return err
	}
	applets, err := output(b.ctx, b.root, "busybox", "--list-full")
	if err != nil {
		return err
	}
	for name := range strings.Lines(applets) {
		name = strings.TrimSpace(name)
		if !strings.HasPrefix(name, "usr/") {
			name = "usr/" + name
		}
		if other := strings.Replace(name, "bin/", "sbin/", 1); have[name] || have[other] || !strings.Contains(name, "bin/") {
			continue
		}
		have[name] = true
		if err := a.link(name, "/usr/bin/busybox"); err != nil {
			return err
		}
	}
	return nil
}

// needed returns the libraries that an ELF file names.
func needed(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	return f.ImportedLibraries()
}
