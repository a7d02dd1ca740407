package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// resets are ways to reset a controller, as a shell command with the controller's name and its PCI address.
var resets = []struct{ name, command string }{
	{"nvme reset", "nvme reset /dev/%[1]s"},
	{"FLR", "echo 1 >/sys/bus/pci/devices/%[2]s/reset"},
	// Linux sees a subsystem reset only when it looks the next time.
	{"subsystem reset", "nvme subsystem-reset /dev/%[1]s && nvme reset /dev/%[1]s"},
	{"rescan", "nvme ns-rescan /dev/%[1]s && echo 1 >/sys/class/nvme/%[1]s/rescan_controller && echo 1 >/sys/bus/pci/rescan"},
}

// underFIO does a command four times while fio writes and verifies, again and again, and must end well.
const underFIO = `rm -f /tmp/enough
(while [ ! -e /tmp/enough ]; do %s || exit 1; done) >/tmp/fio 2>&1 & pid=$!
sleep 0.5
for i in 1 2 3 4; do
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

// TestResetsUnderLoad resets the controllers of one guest while fio writes and verifies: in each doorbell mode, in each way. Then the driver is taken
// from the disk, and the disk from the bus, while the journal's writers work.
func TestResetsUnderLoad(t *testing.T) {
	lab := vmlab.Open(t)
	var c vmlab.Config
	var files []string
	for i, mode := range modes {
		files = append(files, filepath.Join(t.TempDir(), fmt.Sprint(i)))
		c.Devices = append(c.Devices, vmlab.Controller(t, mode, "file:"+files[i]+",size=128MiB"))
	}
	acks := withAcks(t, &c)
	vm := lab.Boot(t, c)
	for i, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			disk := vm.Disk(t, i)
			for _, r := range resets {
				if r.name == "rescan" && mode != hostmed.Shadow {
					continue // it concerns no doorbell
				}
				t.Run(r.name, func(t *testing.T) {
					vm.Run(t, fmt.Sprintf(underFIO, fmt.Sprintf(verified, disk.Namespace(1)), fmt.Sprintf(r.command, disk.Name, disk.PCI)))
					vm.CheckDmesg(t, resetLines...)
				})
			}
			for run, gone := range []struct{ name, command string }{
				{"unbind", "echo %[1]s >/sys/bus/pci/drivers/nvme/unbind && echo %[1]s >/sys/bus/pci/drivers/nvme/bind"},
				{"remove", "echo 1 >/sys/bus/pci/devices/%[1]s/remove && echo 1 >/sys/bus/pci/rescan"},
			} {
				t.Run(gone.name, func(t *testing.T) {
					if err := os.Truncate(string(acks), 0); err != nil {
						t.Fatal(err)
					}
					l := startWriter(t, vm, vm.Disk(t, i).Namespace(1), run)
					acks.more(t, 20)
					vm.Run(t, fmt.Sprintf(gone.command, disk.PCI)+"; while pidof "+writer+" >/dev/null; do sleep 0.05; done")
					checkFile(t, files[i], l, acks.read(t), 10)
					vm.Run(t, fmt.Sprintf(verified, vm.Disk(t, i).Namespace(1)))
				})
			}
		})
	}
	// Of a disk that goes away under a writer the block layer may say that it has an end now.
	vm.CheckDmesg(t, append(resetLines, `attempt to access beyond end of device`)...)
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}
