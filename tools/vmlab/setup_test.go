package vmlab

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab/internal/wire"
)

// TestSetupThatFails names the remedy and leaves nothing behind that the next one would take for whole.
func TestSetupThatFails(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(envDir, dir)
	t.Setenv(envMirror, "file://"+dir+"/no-mirror")
	var log bytes.Buffer
	_, err := Setup(t.Context(), &log)
	if err == nil || !strings.Contains(err.Error(), envMirror) || !strings.Contains(err.Error(), "no-mirror") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Setup(ctx, &log); err == nil {
		t.Error("a set-up that was called off is done")
	}
	left, err := filepath.Glob(dir + "/*")
	if err != nil || !slices.Equal(left, []string{dir + "/lock"}) {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestSetupWaits: who comes second waits for the first, and as long as its context lasts.
func TestSetupWaits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var log bytes.Buffer
	unlock, err := lock(t.Context(), path, &log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, path, &log); err == nil || !strings.Contains(log.String(), "waiting for another") {
		t.Errorf("%v, %q", err, &log)
	}
	go func() {
		time.Sleep(20 * time.Millisecond)
		unlock()
	}()
	again, err := lock(t.Context(), path, &log)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// TestSweep: what a killed process has left goes, what is in use stays.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	used, err := newScratch()
	if err != nil {
		t.Fatal(err)
	}
	defer used.remove()
	for _, name := range []string{scratchPrefix + "left", "other"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	sweep(dir, time.Hour)
	if left, _ := filepath.Glob(dir + "/*"); len(left) != 3 {
		t.Errorf("young ones are gone: %v", left)
	}
	sweep(dir, 0)
	if left, _ := filepath.Glob(dir + "/*"); !slices.Equal(left, []string{dir + "/other", used.path}) {
		t.Errorf("left: %v", left)
	}
}

func TestOldCachesGo(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"new", "old", "broken.tmp"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	then := time.Now().Add(-2 * unusedFor)
	if err := os.Chtimes(filepath.Join(dir, "old"), then, then); err != nil {
		t.Fatal(err)
	}
	if err := removeOld(dir); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(dir + "/*"); !slices.Equal(left, []string{dir + "/new"}) {
		t.Errorf("left: %v", left)
	}
}

func TestClean(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	t.Setenv(envDir, dir)
	if err := Clean(t.Context(), os.Stderr); err != nil {
		t.Errorf("with nothing there: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "0123", "root"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Clean(t.Context(), os.Stderr); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func TestMirrorsOf(t *testing.T) {
	const out = `'http://tools.example/apt/dists/nodistro/InRelease' tools_InRelease 0
'http://mirror.example/debian/dists/bookworm/InRelease' mirror_InRelease 0
'http://mirror.example/debian/dists/bookworm-updates/main/binary-amd64/Packages.xz' mirror_Packages 0
'http://mirror.example/debian-security/dists/bookworm-security/InRelease' security_InRelease 0
Some other line
`
	if got, want := mirrorsOf(out), []string{"http://mirror.example/debian", "http://tools.example/apt"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestKernelPackages: one package, as Debian stable's kernels have it, and several.
func TestKernelPackages(t *testing.T) {
	for out, want := range map[string][]string{
		`linux-image-cloud-amd64
  Depends: linux-image-6.12.9+deb13-cloud-amd64
linux-image-6.12.9+deb13-cloud-amd64
  Depends: kmod
  Depends: linux-base
 |Depends: initramfs-tools
kmod
linux-base
`: {"linux-image-6.12.9+deb13-cloud-amd64"},
		`linux-image-cloud-amd64
  Depends: linux-image-7.3.4+deb13-cloud-amd64
  Depends: linux-modules-cloud-amd64
linux-image-7.3.4+deb13-cloud-amd64
  Depends: linux-binary-7.3.4+deb13-cloud-amd64
linux-modules-cloud-amd64
linux-binary-7.3.4+deb13-cloud-amd64
linux-modules-7.3.4+deb13-cloud-amd64
`: {"linux-image-7.3.4+deb13-cloud-amd64", "linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"},
		"": nil,
	} {
		if got := kernelPackages(out); !slices.Equal(got, want) {
			t.Errorf("%v, want %v, of\n%s", got, want, out)
		}
	}
}

func TestModuleClosure(t *testing.T) {
	const dep = "kernel/a/one-x.ko.xz: kernel/b/two.ko.xz kernel/b/three.ko.xz\nkernel/b/two.ko.xz: kernel/b/three.ko.xz\nkernel/b/three.ko.xz:\nkernel/c/four.ko.xz:\n"
	got, err := moduleClosure(dep, []string{"one_x", "two"})
	if want := []string{"kernel/a/one-x.ko.xz", "kernel/b/two.ko.xz", "kernel/b/three.ko.xz"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := moduleClosure(dep, []string{"five"}); err == nil || !strings.Contains(err.Error(), "five") {
		t.Errorf("%v", err)
	}
}

func TestKernelPayload(t *testing.T) {
	image := make([]byte, 4096)
	copy(image[0x202:], "HdrS")
	image[0x1f1] = 1                                      // sectors of set-up code behind the first
	binary.LittleEndian.PutUint32(image[0x248:], 16)      // offset behind them
	binary.LittleEndian.PutUint32(image[0x24c:], 12)      // with 4 bytes for its size
	copy(image[1024+16:], "\x28\xb5\x2f\xfdkern\x00\x00") // zstd
	got, err := kernelPayload(image)
	if err != nil || string(got) != "\x28\xb5\x2f\xfdkern" {
		t.Errorf("%q, %v", got, err)
	}
	for name, spoil := range map[string]func(b []byte) []byte{
		"short":      func(b []byte) []byte { return b[:100] },
		"no bzImage": func(b []byte) []byte { b[0x202] = 0; return b },
		"outside":    func(b []byte) []byte { b[0x24b] = 0xff; return b },
		"too long":   func(b []byte) []byte { b[0x24f] = 0xff; return b },
		"empty":      func(b []byte) []byte { b[0x24c] = 4; return b },
		"gzip":       func(b []byte) []byte { b[1024+16] = 0x1f; return b },
	} {
		if _, err := kernelPayload(spoil(bytes.Clone(image))); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestConfigThatCannotBe(t *testing.T) {
	for _, c := range []struct {
		config Config
		says   string
	}{
		{Config{Machine: "vax"}, "vax"},
		{Config{Machine: PC, Ports: 1}, "use q35"},
		{Config{Machine: Microvm, VIOMMU: true}, "use q35"},
		{Config{Machine: Microvm, Firmware: OVMF}, "OVMF"},
		{Config{Machine: Microvm, Boot: FromDisk}, "disk"},
		{Config{Kernel: Backports, Boot: RootDisk}, "Boot: Direct"},
		{Config{Kernel: Backports, Initramfs: &Initramfs{}}, "no initramfs of its own"},
		{Config{Ports: 13}, "at most 12"},
		{Config{Devices: make([]Device, 15)}, "at most 14"},
	} {
		if err := c.config.check(); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v", c.config, err)
		}
	}
}

// TestClientSurvivesARestart: half a line of the agent that was there before spoils nothing, and its requests are answered with an error.
func TestClientSurvivesARestart(t *testing.T) {
	ours, guest := net.Pipe()
	c := newClient(ours)
	defer guest.Close()
	go func() {
		buf := make([]byte, 4096)
		if _, err := guest.Read(buf); err == nil { // the request that is never answered
			_, _ = guest.Write([]byte(`{"id":1,"exi` + "\nnoise\n\n" + `{"id":0}` + "\n"))
		}
		if _, err := guest.Read(buf); err == nil {
			_, _ = guest.Write([]byte(`{"id":1,"exit":9}` + "\n" + `{"id":2,"exit":7}` + "\n"))
		}
	}()
	q := wire.Request{Op: "run", Limit: 10 * time.Second}
	if _, err := c.do(t.Context(), q); err != errRestarted {
		t.Errorf("%v", err)
	}
	if err := c.started(t.Context(), 1); err != nil {
		t.Error(err)
	}
	if r, err := c.do(t.Context(), q); err != nil || r.Exit != 7 {
		t.Errorf("%+v, %v", r, err)
	}
	guest.Close()
	if err := c.started(t.Context(), 2); err == nil {
		t.Error("a second start was seen")
	}
}
