package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/ebpf/doctor"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/hostmed/api"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/testrig"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is hostmed with its control socket, and the doctor.
type rig struct {
	m         *hostmed.Mediator
	nvmetrace string
	control   string
}

func serve(t *testing.T, c *hostmed.Config) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{control: filepath.Join(dir, "control")}
	var err error
	if r.nvmetrace, err = process.Binary(t.Context(), "nvmetrace", "", dir); err != nil {
		t.Fatal(err)
	}
	r.m = vmlab.Serve(t, c)
	s, err := api.Listen(r.control, r.m, testrig.Log(t))
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, s.Serve)
	return r
}

// look runs nvmetrace doctor, and returns its exit code and what it found; after a fix, what it found then.
func (r *rig) look(t *testing.T, args ...string) (code int, all []doctor.Finding) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), r.nvmetrace, append([]string{"doctor", "--control", r.control, "--for", "2s", "--json"}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var d struct{ Findings, After []doctor.Finding }
	if err := json.Unmarshal(out, &d); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if d.After != nil {
		d.Findings = d.After
	}
	return cmd.ProcessState.ExitCode(), d.Findings
}

// TestStockGuestIsHealthy: a stock kernel's driver under load, in every doorbell mode, breaks no rule, and nor does hostmed: after it has booted, while fio
// keeps queues full, has one command at a time and pauses, after the driver has reset its controllers, and when all is quiet.
func TestStockGuestIsHealthy(t *testing.T) {
	lab := vmlab.Open(t)
	c := hostmed.Config{}
	for i, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap} {
		c.Controllers = append(c.Controllers, hostmed.ControllerConfig{Namespaces: []string{fmt.Sprintf("mem:size=%dMiB", 64+i)}, Doorbells: mode})
	}
	r := serve(t, &c)
	seen := map[string]map[doctor.Verdict]int{} // by socket
	looks := 0
	look := func(during string) {
		code, all := r.look(t)
		looks++
		for _, f := range all {
			if seen[f.Controller] == nil {
				seen[f.Controller] = map[doctor.Verdict]int{}
			}
			seen[f.Controller][f.Verdict]++
			if f.Verdict == doctor.Broken {
				t.Errorf("%s: %+v", during, f)
			}
		}
		if code != 0 {
			t.Errorf("%s: exit %d", during, code)
		}
	}

	config := vmlab.Config{CPUs: 2}
	for _, x := range c.Controllers {
		config.Devices = append(config.Devices, vmlab.VFIOUser(x.Socket))
	}
	vm := lab.Boot(t, config)
	look("after the boot")
	var jobs strings.Builder
	for i := range c.Controllers {
		d := vm.Disk(t, i).Namespace(1)
		for name, how := range map[string]string{
			"deep": "--rw=randrw --iodepth=32", "one": "--rw=randread --iodepth=1 --thinktime=3000", "rare": "--rw=randwrite --iodepth=4 --rate_iops=20",
		} {
			fmt.Fprintf(&jobs, " --name=%s%d --filename=%s %s", name, i, d, how)
		}
	}
	vm.Run(t, "rm -f /tmp/code; { fio --ioengine=libaio --direct=1 --bs=4k --time_based --runtime=20 --thread"+jobs.String()+" > /tmp/fio 2>&1; echo $? > /tmp/code; } > /dev/null 2>&1 &")
	for vm.Try(t, "[ -e /tmp/code ]").Exit != 0 {
		look("under load")
	}
	if r := vm.Try(t, "cat /tmp/code /tmp/fio"); !strings.HasPrefix(r.Stdout, "0\n") {
		t.Errorf("fio: %s", r.Stdout)
	}
	vm.Run(t, "for i in 0 1 2; do echo 1 > /sys/class/nvme/nvme$i/reset_controller; done")
	look("after a reset")
	look("idle")
	for _, x := range c.Controllers {
		n := seen[x.Socket]
		if n[doctor.Busy] == 0 || n[doctor.Idle] == 0 {
			t.Errorf("%v: %v", x.Doorbells, n)
		}
		t.Logf("%v: %d looks: %v", x.Doorbells, looks, n)
	}
}
