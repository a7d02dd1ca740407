package pcifn

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// uses are what the kernel's lists say of all block devices, by "major:minor".
type uses struct {
	mounts map[string][]string
	swaps  map[string]bool
	loops  map[string][]string // by the name of the device behind
}

func (h *host) readUses() (uses, error) {
	u := uses{mounts: map[string][]string{}, swaps: map[string]bool{}, loops: map[string][]string{}}
	b, err := os.ReadFile(filepath.Join(h.proc, "self/mountinfo"))
	if err != nil {
		return u, fmt.Errorf("what is mounted: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		// proc_pid_mountinfo(5): the third field is the device, the fifth the place, and behind " - " come type and source.
		head, tail, _ := strings.Cut(line, " - ")
		fields, source := strings.Fields(head), strings.Fields(tail)
		if len(fields) < 5 {
			continue
		}
		place := unescape(fields[4])
		u.mounts[fields[2]] = append(u.mounts[fields[2]], place)
		// Of btrfs and other file systems on several devices the third field is no device.
		if len(source) > 1 {
			if id := h.deviceID(unescape(source[1])); id != "" && id != fields[2] {
				u.mounts[id] = append(u.mounts[id], place)
			}
		}
	}
	b, err = os.ReadFile(filepath.Join(h.proc, "swaps"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return u, fmt.Errorf("what is swap: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 0 {
			if id := h.deviceID(unescape(fields[0])); id != "" {
				u.swaps[id] = true
			}
		}
	}
	loops, err := filepath.Glob(filepath.Join(h.sys, "block/loop*/loop/backing_file"))
	if err != nil {
		return u, err
	}
	for _, l := range loops {
		back := filepath.Base(text(l))
		u.loops[back] = append(u.loops[back], filepath.Base(filepath.Dir(filepath.Dir(l))))
	}
	return u, nil
}

// deviceID returns "major:minor" of a block device by its path, "" if it is none of this machine's.
func (h *host) deviceID(path string) string {
	rest, ok := strings.CutPrefix(path, "/dev/")
	if !ok {
		return ""
	}
	path = filepath.Join(h.dev, rest)
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // such as /dev/disk/by-uuid/…
	}
	return text(filepath.Join(h.sys, "class/block", filepath.Base(path), "dev"))
}

// unescape decodes the octal escapes of mountinfo and swaps.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// usesOf says what a disk and its partitions are used for.
func (h *host) usesOf(disk string, u *uses) []string {
	dir := filepath.Join(h.sys, "class/block", disk)
	parts := []string{disk}
	names, _ := filepath.Glob(filepath.Join(dir, "*", "partition"))
	for _, n := range names {
		parts = append(parts, filepath.Base(filepath.Dir(n)))
	}
	var out []string
	for _, p := range parts {
		at := dir
		if p != disk {
			at = filepath.Join(dir, p)
		}
		out = append(out, usesOfOne(p, at, u)...)
	}
	return out
}

// usesOfOne says what a disk or a partition, whose directory in sysfs is at, is used for, without its partitions.
func usesOfOne(p, at string, u *uses) (out []string) {
	id := text(filepath.Join(at, "dev"))
	for _, place := range u.mounts[id] {
		out = append(out, fmt.Sprintf("%s is mounted at %s", p, place))
	}
	if u.swaps[id] {
		out = append(out, p+" is swap")
	}
	holders, _ := os.ReadDir(filepath.Join(at, "holders"))
	for _, holder := range holders {
		out = append(out, fmt.Sprintf("%s is held by %s", p, holder.Name()))
	}
	for _, l := range u.loops[p] {
		out = append(out, fmt.Sprintf("%s is held by %s", p, l))
	}
	return out
}

// BlockUses says what each of these block devices of the machine is used for, by name (nvme0n1, nvme0n1p2): where it is mounted, that it is swap, what
// holds it. What their partitions are used for is not in it.
func BlockUses(names ...string) ([]string, error) { return machine.blockUses(names) }

func (h *host) blockUses(names []string) (out []string, err error) {
	u, err := h.readUses()
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		out = append(out, usesOfOne(n, filepath.Join(h.sys, "class/block", n), &u)...)
	}
	return out, nil
}

// claimDevice opens a block device as mount and swapon do. While it is open nobody else can, and the error is EBUSY if somebody has: also for
// a partition of it, and in mount namespaces that this process does not see.
func claimDevice(path string) (release func(), err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return func() { unix.Close(fd) }, nil
}
