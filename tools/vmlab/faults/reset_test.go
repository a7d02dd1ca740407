package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal"
)

// resets are ways to reset a controller, as a shell command with the controller's name and its PCI address.
var resets = []struct{ name, command string }{
	{"nvme reset", "nvme reset /dev/%[1]s"},
	{"FLR", "echo 1 >/sys/bus/pci/devices/%[2]s/reset"},
	// Linux sees a subsystem reset only when it looks the next time.
	{"subsystem reset", "nvme subsystem-reset /dev/%[1]s && nvme reset /dev/%[1]s"},
	{"rescan", "nvme ns-rescan /dev/%[1]s && echo 1 >/sys/class/nvme/%[1]s/rescan_controller && echo 1 >/sys/bus/pci/rescan"},
}

// underFIO does a command three times while fio writes and verifies, again and again, and must end well.
const underFIO = `rm -f /tmp/enough
(while [ ! -e /tmp/enough ]; do %s || exit 1; done) >/tmp/fio 2>&1 & pid=$!
sleep 0.5
for i in 1 2 3; do
	%s || exit 9
	sleep 0.2
done
touch /tmp/enough
wait $pid || { cat /tmp/fio; exit 8; }`

// resetLines are what Linux says of a reset that went well.
var resetLines = []string{
	`resetting controller`,
	`Shutdown timeout set to`,
}

// TestResets has one guest, whose controllers are reset in every way there is, then the whole machine, again and again.
func TestResets(t *testing.T) {
	lab := vmlab.Open(t)
	g := &guest{lab: lab}
	c := vmlab.Config{Reboot: true, Files: map[string]string{"/boot/bzImage": filepath.Join(lab.Dir(), "bzImage")}, MemoryMiB: 1024, Append: "crashkernel=320M"}
	for i, mode := range modes {
		g.files = append(g.files, filepath.Join(t.TempDir(), fmt.Sprint(i)))
		c.Devices = append(c.Devices, vmlab.Controller(t, mode, "file:"+g.files[i]+",size=192MiB"))
	}
	g.hanging = hangingDisks(t)
	for _, h := range g.hanging {
		c.Devices = append(c.Devices, h.device)
	}
	g.acks = withAcks(t, &c)
	g.VM = lab.Boot(t, c)
	t.Run("under load", g.resetsUnderLoad)
	t.Run("while the disk hangs", g.resetsWhileTheDiskHangs)
	t.Run("restarts under load", g.restartsUnderLoad)
	if err := g.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}

// guest is a machine with a controller for each of modes, then as many whose disks hang.
type guest struct {
	*vmlab.VM
	lab     *vmlab.Lab
	files   []string // behind the first disks
	hanging []hangingDisk
	acks    ackFile
	runs    [3]int // of writers, by disk
}

// start starts the writers on disk i, which has a place for four runs.
func (g *guest) start(t *testing.T, i int) journal.Layout {
	t.Helper()
	if err := os.Truncate(string(g.acks), 0); err != nil {
		t.Fatal(err)
	}
	l := startWriter(t, g.VM, g.Disk(t, i).Namespace(1), g.runs[i])
	g.runs[i]++
	return l
}

// resetsUnderLoad resets the controllers while fio writes and verifies: in each doorbell mode, in each way. Then the driver is taken
// from the disk, and the disk from the bus, while the journal's writers work.
func (g *guest) resetsUnderLoad(t *testing.T) {
	for i, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			disk := g.Disk(t, i)
			for _, r := range resets {
				if r.name == "rescan" && mode != hostmed.Shadow {
					continue // it concerns no doorbell
				}
				t.Run(r.name, func(t *testing.T) {
					g.Run(t, fmt.Sprintf(underFIO, verified(disk.Namespace(1)), fmt.Sprintf(r.command, disk.Name, disk.PCI)))
					g.CheckDmesg(t, resetLines...)
				})
			}
			for _, gone := range []struct{ name, command string }{
				{"unbind", "echo %[1]s >/sys/bus/pci/drivers/nvme/unbind && echo %[1]s >/sys/bus/pci/drivers/nvme/bind"},
				{"remove", "echo 1 >/sys/bus/pci/devices/%[1]s/remove && echo 1 >/sys/bus/pci/rescan"},
			} {
				t.Run(gone.name, func(t *testing.T) {
					l := g.start(t, i)
					g.acks.more(t, 20)
					g.Run(t, fmt.Sprintf(gone.command, disk.PCI)+"; while pidof "+writer+" >/dev/null; do sleep 0.05; done")
					checkFile(t, g.files[i], l, g.acks.read(t), 10)
					g.Run(t, verified(g.Disk(t, i).Namespace(1)))
				})
			}
		})
	}
	// Of a disk that goes away under a writer the block layer may say that it has an end now.
	g.CheckDmesg(t, append(resetLines, `attempt to access beyond end of device`)...)
	g.Run(t, "dmesg -c >/dev/null")
}
