package sandbox

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// emptyRoot puts this process, in a mount namespace of its own, on an empty read-only root and lets go of everything else. The error
// names the step. pivot_root(2), "pivot_root(".", ".")".
func emptyRoot(pivot func(newRoot, putOld string) error) (how string, err error) {
	// First of all, or what follows would be propagated to the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("make mounts private: %w", err)
	}
	points := mountPoints()
	at, err := mountEmpty()
	if err != nil {
		return "", err
	}
	if err := unix.Chdir(at); err != nil {
		return "", fmt.Errorf("chdir to the empty tmpfs: %w", err)
	}
	how = "empty root"
	switch err := pivot(".", "."); {
	case err == nil:
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return "", fmt.Errorf("detach the old root: %w", err)
		}
	case errors.Is(err, unix.EINVAL):
		// The root is an initramfs, which cannot be pivoted away: it stays underneath, out of reach without CAP_SYS_CHROOT. Other mounts go, as far as the
		// kernel lets them: a file system that is held here is not unmounted elsewhere either, which is bad if its disk is served by this process.
		for _, p := range slices.Backward(points) {
			if p != "/" && p != at {
				_ = unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
		}
		if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
			return "", fmt.Errorf("move the empty tmpfs to /: %w", err)
		}
		if err := unix.Chroot("."); err != nil {
			return "", fmt.Errorf("chroot: %w", err)
		}
		how = "empty root (by chroot: an initramfs cannot be detached)"
	default:
		return "", fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return "", fmt.Errorf("chdir /: %w", err)
	}
	return how, nil
}

// mountPoints lists what is mounted where, in the order in which it was; nothing if that cannot be known. Field 5 of proc_pid_mountinfo(5).
func mountPoints() (points []string) {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			points = append(points, unescapeMount.Replace(f[4]))
		}
	}
	return points
}

var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// mountEmpty mounts an empty tmpfs on whichever directory there is; what it hides is gone in a moment anyway.
func mountEmpty() (string, error) {
	var first error
	for _, at := range []string{"/tmp", "/proc", "/dev", "/sys", "/etc", "/usr"} {
		err := unix.Mount("none", at, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=4k,mode=555")
		if err == nil {
			return at, nil
		}
		if first == nil {
			first = fmt.Errorf("mount an empty tmpfs: %w", err)
		}
	}
	return "", first
}

// checkRootEmpty looks, before Landlock forbids looking.
func checkRootEmpty() error {
	names, err := os.ReadDir("/")
	if err != nil {
		return fmt.Errorf("list the new root: %w", err)
	}
	if len(names) != 0 {
		return fmt.Errorf("the new root is not empty: %d entries, the first %q", len(names), names[0].Name())
	}
	var root, dot unix.Stat_t
	if err := unix.Stat("/", &root); err != nil {
		return fmt.Errorf("stat /: %w", err)
	}
	for _, p := range []string{".", "/..", ".."} {
		if err := unix.Stat(p, &dot); err != nil {
			return fmt.Errorf("stat %s: %w", p, err)
		}
		if dot.Dev != root.Dev || dot.Ino != root.Ino {
			// A mount on top of the old root was detached in its place; in a user namespace it is locked and cannot be.
			return &fault{"the old root can still be reached by " + p, nil, "unmount what is mounted over / (findmnt /)"}
		}
	}
	f, err := os.OpenFile("/x", os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_ = f.Close()
		return errors.New("the new root is writable")
	}
	return nil
}

// checkNetEmpty demands that no interface but the loopback exists, which is down in a new namespace.
func checkNetEmpty() error {
	b, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return fmt.Errorf("list network interfaces: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		name, _, ok := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); ok && name != "lo" && !fallbackTunnel(name) {
			return fmt.Errorf("the network namespace has an interface %q", name)
		}
	}
	return nil
}

// fallbackTunnel says whether name is one of the devices that tunnel modules put in every namespace unless net.core.fb_tunnels_only_for_init_net
// is set. They are down and lead nowhere.
func fallbackTunnel(name string) bool {
	switch name {
	case "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0":
		return true
	}
	return false
}
