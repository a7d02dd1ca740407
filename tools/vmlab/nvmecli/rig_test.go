// Package nvmecli has nvme-cli, fio, mkfs and the stock nvme driver of a Linux guest tell what they think of hostmed's controllers, and
// compares that with what hostmed was configured with and what was done.
//
// One guest serves all themes. Each is a subtest that plugs in a subsystem of its own; all subsystems are those of one daemon.
package nvmecli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is the guest, and the daemon that all themes are controllers of.
type rig struct {
	*vmlab.VM
	lab    *vmlab.Lab
	daemon *hostmed.Mediator
	config hostmed.Config
}

// theme is what one subtest looks at, on a subsystem of its own.
type theme struct {
	name string
	sub  hostmed.SubsystemConfig
	run  func(*testing.T, *bench)
	// allowed are lines of the kernel log that what the theme does brings about.
	allowed []string
}

// bench is one theme's part of the rig.
type bench struct {
	*rig
	sub   hostmed.SubsystemConfig
	disks []vmlab.Disk // of sub.Controllers, in order
	seen  []seen       // the same, as this project's own driver saw them before
}

// ctrl is the character device of the first controller, block the block device of its namespace nsid.
func (b *bench) ctrl() string          { return "/dev/" + b.disks[0].Name }
func (b *bench) block(nsid int) string { return b.disks[0].Namespace(nsid) }

// named makes names that say which theme a controller belongs to.
func named(name string, controllers int, namespaces ...hostmed.NamespaceConfig) hostmed.SubsystemConfig {
	return hostmed.SubsystemConfig{
		NQN: "nqn.2026-11.org.example:" + name, Serial: "SN-" + strings.ToUpper(name), Model: "Disk of " + name,
		Controllers: make([]hostmed.ControllerConfig, controllers), Namespaces: namespaces,
	}
}

func namespace(spec string) hostmed.NamespaceConfig { return hostmed.NamespaceConfig{Spec: spec} }

// runThemes boots one guest and runs the themes in it.
func runThemes(t *testing.T, c vmlab.Config, themes ...theme) {
	r := &rig{lab: vmlab.Open(t)}
	for _, th := range themes {
		r.config.Subsystems = append(r.config.Subsystems, th.sub)
		c.Ports += len(th.sub.Controllers)
	}
	r.daemon = vmlab.Serve(t, &r.config)
	var all [][]seen
	for _, s := range r.config.Subsystems {
		all = append(all, look(t, s))
	}
	r.VM = r.lab.Boot(t, c)
	for i, th := range themes {
		t.Run(th.name, func(t *testing.T) {
			begin := time.Now()
			b := &bench{rig: r, sub: r.config.Subsystems[i], seen: all[i]}
			for _, cc := range b.sub.Controllers {
				b.disks = append(b.disks, b.Plug(t, vmlab.VFIOUser(cc.Socket)))
			}
			th.run(t, b)
			b.CheckDmesg(t, th.allowed...)
			b.Run(t, "dmesg -c >/dev/null")
			t.Logf("%.1f s", time.Since(begin).Seconds())
		})
	}
}

// json runs a command of nvme-cli's that prints JSON, and decodes it.
func (b *bench) json(t *testing.T, into any, command string) {
	t.Helper()
	out := b.Run(t, command+" -o json")
	d := json.NewDecoder(strings.NewReader(out))
	d.UseNumber()
	if err := d.Decode(into); err != nil {
		t.Fatalf("%s: %v:\n%s", command, err, out)
	}
}

// object is json for what has too many keys for a struct.
func (b *bench) object(t *testing.T, command string) map[string]any {
	t.Helper()
	var m map[string]any
	b.json(t, &m, command)
	return m
}

var statusInParentheses = regexp.MustCompile(`\(0x([0-9a-f]+)\)`)

// fails runs a command of nvme-cli's that the controller has to refuse with want. What it says of errors is text.
func (b *bench) fails(t *testing.T, want nvme.Status, command string) {
	t.Helper()
	r := b.Try(t, command)
	m := statusInParentheses.FindStringSubmatch(r.Stderr)
	if r.Exit == 0 || m == nil {
		t.Errorf("%s: exit %d, want %v: %s%s", command, r.Exit, want, r.Stdout, r.Stderr)
		return
	}
	n, err := strconv.ParseUint(m[1], 16, 16)
	if got := nvme.Status(n); err != nil || got.Code() != want {
		t.Errorf("%s: %v, want %v", command, got, want)
	}
}

// says runs a command whose output must have all of want in it.
func (b *bench) says(t *testing.T, command string, want ...string) {
	t.Helper()
	out := b.Run(t, command)
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%s does not say %q:\n%s", command, w, out)
		}
	}
}

// put writes a file in the guest, get reads one.
func (b *bench) put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := b.WriteFile(t.Context(), path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) get(t *testing.T, path string) []byte {
	t.Helper()
	data, err := b.ReadFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// number is a number that nvme-cli printed, in decimal, or in hexadecimal as a string.
func number(t *testing.T, v any) uint64 {
	t.Helper()
	var s string
	base := 10
	switch v := v.(type) {
	case json.Number:
		s = v.String()
	case string:
		if s = v; strings.HasPrefix(s, "0x") || len(s) == 8 {
			s, base = strings.TrimPrefix(s, "0x"), 16
		}
	default:
		t.Fatalf("%v (%T) is not a number", v, v)
	}
	n, err := strconv.ParseUint(s, base, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// pattern is n bytes that are found nowhere else.
func pattern(name string, n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%s %08d\n", name, i)
	}
	return b.Bytes()[:n]
}

// onDisk reads from the file that a file: namespace is made of.
func onDisk(t *testing.T, spec string, off int64, n int) []byte {
	t.Helper()
	path, _, _ := strings.Cut(strings.TrimPrefix(spec, "file:"), ",")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, n)
	if _, err := f.ReadAt(data, off); err != nil {
		t.Fatal(err)
	}
	return data
}

// fileSpec names a file in the test's directory.
func fileSpec(t *testing.T, name, options string) string {
	return "file:" + filepath.Join(t.TempDir(), name) + "," + options
}
