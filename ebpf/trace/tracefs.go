package trace

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tracefs is an open tracefs: the one that is mounted, or one of our own that no path leads to and that ends with its descriptor.
type tracefs struct {
	dir string
	own *os.File
}

var tracefsDirs = []string{"/sys/kernel/tracing", "/sys/kernel/debug/tracing"}

const remedyTracefs = "run as root, or: mount -t tracefs tracefs /sys/kernel/tracing"

func openTracefs() (*tracefs, error) {
	for _, dir := range tracefsDirs {
		_, err := os.Stat(filepath.Join(dir, "events"))
		if err == nil {
			return &tracefs{dir: dir}, nil
		}
		if errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("tracefs at %s may be read by root only: %w", dir, err)
		}
	}
	f, err := detached("tracefs")
	if err != nil {
		return nil, fmt.Errorf("tracefs is not mounted, and cannot be mounted (%w): %s", err, remedyTracefs)
	}
	return &tracefs{dir: fmt.Sprintf("/proc/self/fd/%d", f.Fd()), own: f}, nil
}

// detached mounts a file system without a place: only who has the descriptor sees it.
func detached(fs string) (*os.File, error) {
	ctx, err := unix.Fsopen(fs, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("fsconfig: %w", err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	return os.NewFile(uintptr(fd), fs), nil
}

func (t *tracefs) Close() error {
	if t.own == nil {
		return nil
	}
	return t.own.Close()
}

// id returns the number that perf_event_open knows a tracepoint by.
func (t *tracefs) id(group, name string) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(t.dir, "events", group, name, "id"))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
}

// format returns where the fields of a tracepoint's record are.
func (t *tracefs) format(group, name string) (map[string]uint32, error) {
	f, err := os.Open(filepath.Join(t.dir, "events", group, name, "format"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseFormat(f)
}

// maxRecord is far beyond any record that the programs read.
const maxRecord = 1 << 12

// parseFormat reads lines like "field:int qid;	offset:44;	size:4;	signed:1;". Linux Documentation/trace/events.rst
func parseFormat(r io.Reader) (map[string]uint32, error) {
	fields := map[string]uint32{}
	s := bufio.NewScanner(r)
	for s.Scan() {
		parts := strings.Split(strings.TrimSpace(s.Text()), ";")
		if len(parts) < 3 || !strings.HasPrefix(parts[0], "field:") {
			continue
		}
		name := parts[0][strings.LastIndexAny(parts[0], " \t*")+1:]
		name, _, _ = strings.Cut(name, "[")
		at, ok := strings.CutPrefix(strings.TrimSpace(parts[1]), "offset:")
		offset, err := strconv.ParseUint(at, 10, 32)
		if !ok || err != nil || offset >= maxRecord || name == "" {
			return nil, fmt.Errorf("tracefs: a field that cannot be: %q", s.Text())
		}
		fields[name] = uint32(offset)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(fields) == 0 {
		return nil, errors.New("tracefs: a format without fields")
	}
	return fields, nil
}
