package suite

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts a mediator until the test ends.
func serve(t *testing.T, c hostmed.Config) {
	t.Helper()
	var log testrig.Buffer
	t.Cleanup(func() {
		if t.Failed() && testing.Verbose() { // thousands of lines
			t.Log(log.String())
		}
	})
	c.Logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: &log})
	m, err := hostmed.New(c)
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
}

func opener(socket string) func(context.Context) (device.Device, error) {
	return func(ctx context.Context) (device.Device, error) { return devices.Open(ctx, "vfio-user:"+socket) }
}

// TestHostmed runs every case against hostmed, in each doorbell mode. The subsystem has two controllers and a namespace that both have; the
// first has, of three namespace ids, one that is not active, and each mode has another kind of medium or stride. Short, all modes but the
// first run what they are about: doorbells and queues.
func TestHostmed(t *testing.T) {
	for i, c := range []struct {
		mode  hostmed.DoorbellMode
		spec  string
		dstrd uint8
	}{
		{hostmed.Shadow, "mem:size=64MiB", 0},
		{hostmed.Shadow, "mem:size=64MiB,lba=4096", 4},
		{hostmed.Trap, "file:%s/disk,size=64MiB", 4},
		{hostmed.Mmap, "mem:size=64MiB", 0},
	} {
		t.Run(fmt.Sprintf("%v-%d", c.mode, c.dstrd), func(t *testing.T) {
			t.Parallel() // most of it is waiting for what must not come
			filter := ""
			if testing.Short() && i > 0 {
				filter = "[dq]*"
			}
			dir := t.TempDir()
			a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			serve(t, hostmed.Config{Subsystems: []hostmed.SubsystemConfig{{
				Controllers: []hostmed.ControllerConfig{
					{Socket: a, Doorbells: c.mode, DSTRD: c.dstrd, Management: true}, {Socket: b, Doorbells: c.mode, DSTRD: c.dstrd},
				},
				Pool: hostmed.PoolConfig{Dir: filepath.Join(dir, "pool"), Capacity: 64 << 20},
				Namespaces: []hostmed.NamespaceConfig{
					{Spec: strings.ReplaceAll(c.spec, "%s", dir), Shared: true}, {Spec: "mem:size=16MiB", Controllers: []uint16{2}}, {Spec: "mem:size=32MiB,lba=4096"},
				},
			}}})
			results, err := Run(t.Context(), Config{Open: opener(a), Peer: opener(b), Filter: filter, Destructive: true, Timeout: 20 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			var reasons []string
			for _, r := range results {
				switch r.Outcome {
				case Failed:
					t.Errorf("%s: %s (%s): %s", r.Case.ID, r.Case.Text, r.Case.Ref, r.Seen)
				case Skipped:
					reasons = append(reasons, r.Case.ID+": "+r.Seen)
				}
			}
			t.Logf("%d passed, %d failed, %d skipped:\n%s", Count(results, Passed), Count(results, Failed), len(reasons), strings.Join(reasons, "\n"))
		})
	}
}

// TestCasesAreWellFormed holds the ids that documents and tests name.
func TestCasesAreWellFormed(t *testing.T) {
	cases, err := Cases("")
	if err != nil {
		t.Fatal(err)
	}
	form := regexp.MustCompile(`^[a-z]+(\.[a-z0-9-]+)+$`)
	ref := regexp.MustCompile(`^(NVMe Base 2\.0c|NVM Command Set 1\.0c|PCIe Transport 1\.0c|shadowbell R\d+)`)
	seen := map[string]bool{}
	for _, c := range cases {
		if seen[c.ID] {
			t.Errorf("%s: twice", c.ID)
		}
		seen[c.ID] = true
		if !form.MatchString(c.ID) || c.Text == "" || !ref.MatchString(c.Ref) || c.run == nil {
			t.Errorf("%s: id, text, reference or function is missing or malformed: %q", c.ID, c.Ref)
		}
	}
}
