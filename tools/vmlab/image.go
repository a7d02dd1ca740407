package vmlab

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The partitions of a boot image, in sectors.
const (
	sector        = 512
	coreStart     = 2048 // BIOS boot partition: GRUB's second stage
	coreSectors   = 2048
	espStart      = coreStart + coreSectors
	espSectors    = 16 << 20 / sector
	rootStart     = espStart + espSectors
	rootSectors   = debianMiB << 20 / sector
	imageSectors  = rootStart + rootSectors + 2048 // with room for the second partition table
	rootPartition = "5ead0be1-0000-4000-8000-00000000f00d"
)

// RootImage makes a disk image at path that is one ext4 file system with a small Debian in it, systemd and the agent: for
// Boot: RootDisk and Append: "root=/dev/nvme0n1 rw rootwait", with FastInit where systemd does not matter.
func (l *Lab) RootImage(ctx context.Context, path string) error {
	if err := copySparse(path, filepath.Join(l.dir, debianImage), 0); err != nil {
		return err
	}
	return l.installAgent(ctx, path)
}

// BootImage makes a disk image at path that SeaBIOS and UEFI can start: a GPT with GRUB for both, and the system of RootImage with its kernel.
func (l *Lab) BootImage(ctx context.Context, path string) error {
	s, err := newScratch()
	if err != nil {
		return err
	}
	defer s.remove()
	tmp, root := s.path, s.file("root")
	if err := l.RootImage(ctx, root); err != nil {
		return err
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(path, imageSectors*sector); err != nil {
		return err
	}
	table := filepath.Join(tmp, "table")
	layout := fmt.Sprintf(`label: gpt
first-lba: 2048
start=%d, size=%d, type=21686148-6449-6E6F-744E-656564454649
start=%d, size=%d, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
start=%d, size=%d, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, uuid=%s
`, coreStart, coreSectors, espStart, espSectors, rootStart, rootSectors, rootPartition)
	if err := os.WriteFile(table, []byte(layout), 0o600); err != nil {
		return err
	}
	cmd := program(l.root(), "usr/sbin/sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--lock=no", path)
	if cmd.Stdin, err = os.Open(table); err != nil {
		return err
	}
	if _, err := command(ctx, cmd); err != nil {
		return err
	}
	if err := copySparse(path, root, rootStart*sector); err != nil {
		return err
	}
	if err := l.grubBIOS(ctx, path, tmp); err != nil {
		return err
	}
	return l.grubEFI(ctx, path, tmp)
}

// grub writes an image of GRUB that starts the kernel without asking.
func (l *Lab) grub(ctx context.Context, tmp, format, out string, modules ...string) error {
	accel, _, err := l.Accel(ctx)
	if err != nil {
		return err
	}
	config := filepath.Join(tmp, "grub.cfg")
	text := fmt.Sprintf(`serial --unit=0
terminal_output serial
echo GRUB %s
search.fs_label vmlab root
linux /boot/vmlinuz root=PARTUUID=%s rw rootwait %s %s
boot
`, format, rootPartition, kernelLine(accel), FastInit)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	args := []string{"-d", filepath.Join(l.root(), "usr/lib/grub", format), "-O", format, "-o", out, "-p", "/boot/grub", "-c", config}
	args = append(args, modules...)
	_, err = output(ctx, l.root(), "grub-mkimage", append(args, "part_gpt", "ext2", "serial", "terminal", "echo", "search_label", "linux", "boot")...)
	return err
}

// grubBIOS does what grub-bios-setup does: it tells the first stage where the second is, and the second where the rest of itself is.
func (l *Lab) grubBIOS(ctx context.Context, path, tmp string) error {
	const (
		bootCode    = 440         // of the first sector; what follows is the partition table
		kernelAt    = 0x5c        // u64 in boot.img: first sector of the core image
		blockListAt = sector - 12 // u64 in diskboot.img: first sector of what follows it
	)
	file := filepath.Join(tmp, "core.img")
	if err := l.grub(ctx, tmp, "i386-pc", file, "biosdisk"); err != nil {
		return err
	}
	core, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	boot, err := os.ReadFile(filepath.Join(l.root(), "usr/lib/grub/i386-pc/boot.img"))
	if err != nil {
		return err
	}
	if len(boot) != sector || len(core) < 2*sector || len(core) > coreSectors*sector {
		return fmt.Errorf("GRUB's images have %d and %d bytes", len(boot), len(core))
	}
	binary.LittleEndian.PutUint64(boot[kernelAt:], coreStart)
	binary.LittleEndian.PutUint64(core[blockListAt:], coreStart+1)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(boot[:bootCode], 0); err != nil {
		return err
	}
	if _, err := f.WriteAt(core, coreStart*sector); err != nil {
		return err
	}
	return f.Close()
}

// grubEFI fills the EFI system partition: one program, where a removable disk has it.
func (l *Lab) grubEFI(ctx context.Context, path, tmp string) error {
	program := filepath.Join(tmp, "BOOTX64.EFI")
	if err := l.grub(ctx, tmp, "x86_64-efi", program); err != nil {
		return err
	}
	esp := filepath.Join(tmp, "esp")
	if err := os.WriteFile(esp, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(esp, espSectors*sector); err != nil {
		return err
	}
	for _, c := range [][]string{
		{"usr/sbin/mkfs.fat", esp},
		{"mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"},
		{"mcopy", "-i", esp, program, "::/EFI/BOOT/BOOTX64.EFI"},
	} {
		if _, err := output(ctx, l.root(), c[0], c[1:]...); err != nil {
			return err
		}
	}
	return copySparse(path, esp, espStart*sector)
}

// Tool runs a program of the lab's packages on this machine to its end, such as usr/sbin/e2fsck, and returns what it printed.
func (l *Lab) Tool(ctx context.Context, program string, args ...string) (string, error) {
	return output(ctx, l.root(), program, args...)
}

// installAgent puts the agent, as it is built now, into an ext4 image.
func (l *Lab) installAgent(ctx context.Context, image string) error {
	b, err := buildProgram(ctx, "vmlab/agent")
	if err != nil {
		return err
	}
	bin := image + ".agent"
	if err := os.WriteFile(bin, b, 0o755); err != nil {
		return err
	}
	defer os.Remove(bin)
	for _, request := range []string{fmt.Sprintf("write %q %s", bin, agentPath), "set_inode_field " + agentPath + " mode 0100755"} {
		out, err := output(ctx, l.root(), "usr/sbin/debugfs", "-w", "-R", request, image)
		if err != nil {
			return err
		}
		if strings.Contains(out, "No such file") {
			return fmt.Errorf("debugfs of %s: %s: %s", image, request, out)
		}
	}
	return nil
}

// copySparse copies the file at from into the file at to, at an offset, and leaves out what is zero.
func copySparse(to, from string, offset int64) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	fi, err := src.Stat()
	if err != nil {
		return err
	}
	end := offset + fi.Size()
	if now, err := dst.Stat(); err != nil {
		return err
	} else if now.Size() < end {
		if err := dst.Truncate(end); err != nil {
			return err
		}
	}
	block, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); at < fi.Size(); {
		n, err := src.ReadAt(block[:min(int64(len(block)), fi.Size()-at)], at)
		if err != nil {
			return err
		}
		if string(block[:n]) != string(zero[:n]) {
			if _, err := dst.WriteAt(block[:n], offset+at); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	return dst.Close()
}
