package volatile

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// MountFor is Mount for a test. It is skipped where there can be no such file, except in CI.
func MountFor(t testing.TB, d *Disk) *File {
	t.Helper()
	if err := unix.Access("/dev/fuse", unix.R_OK|unix.W_OK); err != nil && os.Getenv("CI") != "true" {
		t.Skipf("a disk that loses power is a FUSE file system, and /dev/fuse: %v: be root, and load the module fuse", err)
	}
	f, err := Mount(d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}
