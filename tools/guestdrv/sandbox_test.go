package main

import (
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
)

// Without the sandbox there is a warning, also where nothing else is said; and no lock.
func TestSandboxOffWarns(t *testing.T) {
	device, _ := serve(t)
	code, _, stderr := guest(t, nil, "identify", device, "--sandbox=off", "--sandbox-report")
	if code != 0 || strings.Count(stderr, "warning: no sandbox: the device's other side is not trusted, and this process is not locked up") != 1 || strings.Contains(stderr, "seccomp:") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if code, _, stderr = guest(t, nil, "identify", device); code != 0 || strings.Contains(stderr, "no sandbox") {
		t.Errorf("with a sandbox: exit %d: %s", code, stderr)
	}
}

// The production binary has every layer on a kernel that gives them.
func TestSandboxReport(t *testing.T) {
	device, _ := serve(t)
	code, _, stderr := guest(t, nil, "identify", device, "--sandbox-report")
	for _, m := range []sandbox.Mechanism{
		sandbox.Seccomp, sandbox.Landlock, sandbox.MountNS, sandbox.NetworkNS, sandbox.IPCNS, sandbox.PIDNS, sandbox.NoNewPrivs, sandbox.Capabilities, sandbox.Limits,
	} {
		if code != 0 || !strings.Contains(stderr, string(m)+": ") || strings.Contains(stderr, string(m)+": NOT in force") {
			t.Errorf("exit %d, %s is not in force:\n%s", code, m, stderr)
		}
	}
}
