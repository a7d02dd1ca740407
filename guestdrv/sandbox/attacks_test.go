package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What attacks work on; open before Enter.
var (
	heldFile     int    // a memfd that may not be mapped
	heldMap      int    // a memfd that may
	heldPair     [2]int // a socket pair
	heldListener int    // a socket that listens
	heldAnon     []byte // anonymous memory
	hostPID      int    // the first process
)

func prepareAttacks() {
	heldFile = must(unix.MemfdCreate("file", unix.MFD_CLOEXEC))
	heldMap = must(unix.MemfdCreate("map", unix.MFD_CLOEXEC))
	_ = must(0, errors.Join(unix.Ftruncate(heldFile, 4096), unix.Ftruncate(heldMap, 4096)))
	heldPair = must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	heldListener = must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))
	_ = must(0, errors.Join(unix.Bind(heldListener, &unix.SockaddrUnix{}), unix.Listen(heldListener, 1)))
	heldAnon = must(unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE))
	// Of the first process, as the host's /proc has it: inside it has none.
	hostPID = must(strconv.Atoi(parentInProc()))
}

// libcMay says whether the attack is no attack in a binary that is linked with cgo; see libcRules.
func libcMay(attack string) bool {
	switch attack {
	case "clone3", "mprotect write", "open", "open create":
		return cgoLinked
	}
	return false
}

// Each attack stands once and has its reason.
func TestAttackList(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range attacks() {
		if a.why == "" || seen[a.name] {
			t.Errorf("%q: twice, or without a reason (%q)", a.name, a.why)
		}
		seen[a.name] = true
	}
	if len(seen) < 200 {
		t.Errorf("%d attacks", len(seen))
	}
}

// Every attack is refused by the filter itself: EPERM is its answer, and hardly ever the kernel's to arguments like these.
func TestAttacksAreRefused(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			var got map[string]string
			if err := json.Unmarshal([]byte(run(t, who, "attacks", "")), &got); err != nil {
				t.Fatal(err)
			}
			if len(got) != len(attacks()) {
				t.Errorf("%d results for %d attacks", len(got), len(attacks()))
			}
			for _, a := range attacks() {
				if got[a.name] != unix.EPERM.Error() && !libcMay(a.name) {
					t.Errorf("%s, to win %q: %s", a.name, a.why, got[a.name])
				}
			}
		})
	}
}

// The same, each in its own process, with the action of production: the process is dead before the call returns. It is one action for all calls, so
// every fifth attack is enough.
func TestAttacksAreDeadly(t *testing.T) {
	us := slices.Sorted(maps.Keys(users()))
	for i, a := range attacks() {
		if i%5 != 0 || libcMay(a.name) {
			continue
		}
		who := us[i/5%len(us)]
		c := start(t, users()[who], "attack", a.name)
		ws := c.wait(t)
		if out := c.out.String(); ws.ExitStatus() != 128+int(unix.SIGSYS) || out != "entered\n" || !strings.Contains(c.err.String(), "killed by its sandbox") {
			t.Errorf("%s as %s: exit %d\n%s%s", a.name, who, ws.ExitStatus(), out, c.err.String())
		}
	}
}

// With the filter opened for files and sockets the other layers must hold by themselves.
func TestOtherLayersHoldAlone(t *testing.T) {
	abstract := fmt.Sprintf("sandbox-test-%d", os.Getpid())
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(l) }()
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: "@" + abstract}), unix.Listen(l, 1)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SANDBOX_TEST_ABSTRACT", abstract)
	for name, who := range users() {
		for _, mode := range []string{"", "disable"} {
			if mode == "disable" && len(without(all)) < len(all) {
				continue // there is no other layer, and the attacks would hit the host
			}
			t.Run(name+mode, func(t *testing.T) {
				var got struct {
					Results map[string]string
					Report  *Report
				}
				if err := json.Unmarshal([]byte(run(t, who, "weakened", mode)), &got); err != nil {
					t.Fatal(err)
				}
				landlock, ns := got.Report.Has(Landlock), got.Report.Has(MountNS)
				if ns != (mode == "") {
					t.Fatalf("report:\n%s", got.Report)
				}
				for what, result := range got.Results {
					holds := landlock || ns
					switch what {
					case "list", "listen":
						holds = landlock // an empty directory may be listed, and a loopback that is down bound
					case "mount", "chroot", "unshare":
						holds = got.Report.Has(Capabilities)
					}
					if holds && result == "<nil>" {
						t.Errorf("%s worked", what)
					}
				}
			})
		}
	}
}
