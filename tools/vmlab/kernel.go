package vmlab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// newerDir has the kernel from backports: in the lab bzImage, vmlinux and moduleArchive.
const newerDir = "backports"

// moduleArchive has the modules that are not in the initramfs.
const moduleArchive = "modules.cpio"

// kernelDir is where a kernel's bzImage and vmlinux are.
func (l *Lab) kernelDir(k Kernel) string {
	if k == Backports {
		return filepath.Join(l.dir, newerDir)
	}
	return l.dir
}

// kernel makes the stable kernel ready.
func (b *build) kernel() error {
	version, err := kernelVersion(b.root)
	if err != nil {
		return err
	}
	b.note = version
	return b.takeKernel(b.root, version, b.dir)
}

// modules makes the tree of the stable kernel's modules.
func (b *build) modules() error {
	version, err := kernelVersion(b.root)
	if err != nil {
		return err
	}
	return b.takeModules(b.root, version, filepath.Join(b.dir, "modules"), guestModules)
}

// newerKernel makes the kernel from backports ready, and an archive of its modules, which few guests want.
func (b *build) newerKernel() error {
	dir := filepath.Join(b.dir, newerDir)
	root, modules := filepath.Join(dir, "root"), filepath.Join(dir, "modules")
	if err := b.extract(newerDir, root); err != nil {
		return err
	}
	version, err := kernelVersion(root)
	if err != nil {
		return err
	}
	if err := b.takeKernel(root, version, dir); err != nil {
		return err
	}
	if err := b.takeModules(root, version, modules, newerModules); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, moduleArchive))
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	a.dirs["lib"] = true // a link in the initramfs
	if err := a.tree(modules); err != nil {
		return err
	}
	b.note = version
	return errors.Join(a.w.Close(), f.Close(), os.RemoveAll(root), os.RemoveAll(modules))
}

// kernelVersion is the version of the one kernel that a tree has.
func kernelVersion(root string) (string, error) {
	versions, err := os.ReadDir(filepath.Join(root, "usr/lib/modules"))
	if err != nil || len(versions) != 1 {
		return "", fmt.Errorf("expected the modules of one kernel, found %v (%v)", versions, err)
	}
	return versions[0].Name(), nil
}

// takeKernel takes bzImage from its package and cuts vmlinux out of it: QEMU enters that by PVH, which
// is 4 s faster under emulation. microvm and boot loaders need bzImage.
func (b *build) takeKernel(root, version, dir string) error {
	from := filepath.Join(root, "boot/vmlinuz-"+version)
	if _, err := os.Stat(from); err != nil {
		from = filepath.Join(root, "usr/lib/modules", version, "vmlinuz") // its place in newer packages
	}
	image, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.Rename(from, filepath.Join(dir, "bzImage")); err != nil {
		return err
	}
	payload, err := kernelPayload(image)
	if err != nil {
		return err
	}
	zst := filepath.Join(dir, "vmlinux.zst")
	if err := os.WriteFile(zst, payload, 0o644); err != nil {
		return err
	}
	vmlinux := filepath.Join(dir, "vmlinux")
	if _, err := output(b.ctx, b.root, "zstd", "-q", "-d", "--rm", zst, "-o", vmlinux); err != nil {
		return err
	}
	head := make([]byte, 4)
	f, err := os.Open(vmlinux)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Read(head); err != nil || string(head) != "\x7fELF" {
		return fmt.Errorf("the kernel's payload is not an ELF file: % x, %v", head, err)
	}
	return nil
}

// kernelPayload returns the compressed kernel inside a bzImage. Linux Documentation/arch/x86/boot.rst: payload_offset, payload_length
func kernelPayload(image []byte) ([]byte, error) {
	if len(image) < 0x250 || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("the kernel is not a bzImage")
	}
	sectors := uint64(image[0x1f1])
	off := (sectors+1)*512 + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	end := off + uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if end > uint64(len(image)) || end < off+8 {
		return nil, fmt.Errorf("the kernel's payload (%#x to %#x) is outside its file of %#x bytes", off, end, len(image))
	}
	payload := image[off : end-4] // the size of what it unpacks to stands behind it
	if !bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return nil, fmt.Errorf("the kernel's payload is not zstd: % x", payload[:4])
	}
	return payload, nil
}

// takeModules makes the tree base of the named modules and of what they depend on: unpacked, since busybox's modprobe reads no xz.
func (b *build) takeModules(root, version, base string, names []string) error {
	if err := b.depmod(root, version); err != nil {
		return err
	}
	from := filepath.Join(root, "usr/lib/modules", version)
	deps, err := os.ReadFile(filepath.Join(from, "modules.dep"))
	if err != nil {
		return err
	}
	to := filepath.Join(base, "usr/lib/modules", version)
	wanted, err := moduleClosure(string(deps), names)
	if err != nil {
		return err
	}
	var packed []string
	for _, m := range wanted {
		p := filepath.Join(to, m)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(from, m), p); err != nil {
			return err
		}
		packed = append(packed, p)
	}
	if _, err := output(b.ctx, b.root, "xz", append([]string{"-d"}, packed...)...); err != nil {
		return err
	}
	for _, name := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if err := os.Rename(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			return err
		}
	}
	if err := os.Symlink("usr/lib", filepath.Join(base, "lib")); err != nil {
		return err
	}
	b.note = fmt.Sprintf("%d", len(wanted))
	return errors.Join(b.depmod(base, version), os.RemoveAll(from))
}

func (b *build) depmod(base, version string) error {
	cmd := program(b.root, "usr/bin/kmod", "-b", base, version)
	// kmod is many programs and goes by its name.
	cmd.Args[slices.Index(cmd.Args, "--argv0")+1] = "depmod"
	_, err := command(b.ctx, cmd)
	return err
}

// moduleClosure returns the files of modules.dep that the named modules need, themselves included.
func moduleClosure(dep string, names []string) ([]string, error) {
	needs := map[string][]string{}
	byName := map[string]string{}
	for line := range strings.Lines(dep) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		needs[file] = strings.Fields(rest)
		name, _, _ := strings.Cut(filepath.Base(file), ".")
		byName[strings.ReplaceAll(name, "-", "_")] = file
	}
	seen := map[string]bool{}
	var files []string
	var add func(file string)
	add = func(file string) {
		if seen[file] {
			return
		}
		seen[file] = true
		files = append(files, file)
		for _, n := range needs[file] {
			add(n)
		}
	}
	for _, n := range names {
		file, ok := byName[strings.ReplaceAll(n, "-", "_")]
		if !ok {
			return nil, fmt.Errorf("the kernel has no module %s", n)
		}
		add(file)
	}
	return files, nil
}
