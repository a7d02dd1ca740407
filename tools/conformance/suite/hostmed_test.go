package suite

import (
	"bytes"
	"context"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/guestdrv/device"
	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/hostmed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts a mediator until the test ends.
func serve(t *testing.T, c hostmed.Config) {
	t.Helper()
	var mu sync.Mutex
	var log bytes.Buffer
	c.Logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: &log, Mutex: &mu})
	m, err := hostmed.New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if t.Failed() && testing.Verbose() {
			t.Log(log.String())
		}
	})
}

func opener(socket string) func(context.Context) (device.Device, error) {
	return func(ctx context.Context) (device.Device, error) { return devices.Open(ctx, "vfio-user:"+socket) }
}

// TestHostmed runs every case against hostmed, in each doorbell mode.
func TestHostmed(t *testing.T) {
	for _, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap} {
		t.Run(mode.String(), func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			serve(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{
				Socket: socket, Namespaces: []string{"mem:size=64MiB", "mem:size=16MiB,lba=4096"}, Doorbells: mode,
			}}})
			results, err := Run(t.Context(), Config{Open: opener(socket), Destructive: true, Timeout: 20 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			reasons := map[string]int{}
			for _, r := range results {
				switch r.Outcome {
				case Failed:
					t.Errorf("%s: %s (%s): %s", r.Case.ID, r.Case.Text, r.Case.Ref, r.Seen)
				case Skipped:
					reasons[r.Seen]++
				}
			}
			t.Logf("%d passed, %d failed, skipped: %v", Count(results, Passed), Count(results, Failed), reasons)
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
