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

// kernel takes bzImage from its package and cuts vmlinux out of it: QEMU enters that by PVH, which
// is 4 s faster under emulation. microvm and boot loaders need bzImage.
func (b *build) kernel() error {
	images, err := filepath.Glob(filepath.Join(b.root, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("expected one kernel in the packages, found %v (%v)", images, err)
	}
	image, err := os.ReadFile(images[0])
	if err != nil {
		return err
	}
	if err := os.Rename(images[0], filepath.Join(b.dir, "bzImage")); err != nil {
		return err
	}
	b.note = strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return b.vmlinux(image)
}

// vmlinux cuts the kernel out of a bzImage.
func (b *build) vmlinux(image []byte) error {
	payload, err := kernelPayload(image)
	if err != nil {
		return err
	}
	zst := filepath.Join(b.dir, "vmlinux.zst")
	if err := os.WriteFile(zst, payload, 0o644); err != nil {
		return err
	}
	vmlinux := filepath.Join(b.dir, "vmlinux")
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

// modules makes the tree of guestModules and of what they depend on: unpacked, since busybox's modprobe reads no xz.
func (b *build) modules() error {
	versions, err := os.ReadDir(filepath.Join(b.root, "usr/lib/modules"))
	if err != nil || len(versions) != 1 {
		return fmt.Errorf("expected the modules of one kernel, found %v (%v)", versions, err)
	}
	version := versions[0].Name()
	if err := b.depmod(b.root, version); err != nil {
		return err
	}
	from := filepath.Join(b.root, "usr/lib/modules", version)
	deps, err := os.ReadFile(filepath.Join(from, "modules.dep"))
	if err != nil {
		return err
	}
	to := filepath.Join(b.dir, "modules/usr/lib/modules", version)
	wanted, err := moduleClosure(string(deps), guestModules)
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
	if err := os.Symlink("usr/lib", filepath.Join(b.dir, "modules/lib")); err != nil {
		return err
	}
	b.note = fmt.Sprintf("%d", len(wanted))
	return errors.Join(b.depmod(filepath.Join(b.dir, "modules"), version), os.RemoveAll(from))
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
