package sandbox

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUsesAreChecked(t *testing.T) {
	file, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(file) }()
	for _, u := range []Use{VFIOUser(file), VFIODevice(file), FileWrites(file), Listener(file, 1), FileWrites()} {
		if err := checkUses([]Use{u}); err != nil {
			t.Errorf("%s: %v", u.Name, err)
		}
	}
	for _, u := range append(Uses(), VFIOUser(1<<20), FileWrites(file, 1<<20)) {
		if err := checkUses([]Use{u}); err == nil || !strings.Contains(err.Error(), u.Name+": fd ") {
			t.Errorf("%s with an fd that is not open: %v", u.Name, err)
		}
	}
	if err := checkUses([]Use{Ublk(file)}); err == nil {
		t.Error("a file is an io_uring")
	}
}

func TestFDLimit(t *testing.T) {
	// However many are open: under the limit there are as many free numbers as were asked for.
	for _, n := range []int{0, 1, 5, 40} {
		limit, err := fdLimit(n, stdioFDs)
		if err != nil {
			t.Fatal(err)
		}
		free := 0
		for fd := range limit {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
				free++
			}
		}
		if free != n || limit < stdioFDs {
			t.Errorf("%d free numbers below %d, not %d", free, limit, n)
		}
	}
	if limit, err := fdLimit(1, 500); limit != 500 || err != nil {
		t.Errorf("%d, %v", limit, err)
	}
}
