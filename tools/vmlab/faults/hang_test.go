package faults

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestResetWhileTheDiskHangs: reads hang for longer than QEMU waits for the answer of a server, and meanwhile the guest resets its controller. The disk stays:
// it answers whatever else is asked, the reset ends when the reads have, and then all is well. Then the whole machine is reset beside such reads, and its next
// kernel finds the disk.
func TestResetWhileTheDiskHangs(t *testing.T) {
	lab := vmlab.Open(t)
	const at, piece = 64 << 20, 1 << 20
	c := vmlab.Config{Reboot: true}
	var data [][]byte
	for _, mode := range modes {
		file := filepath.Join(t.TempDir(), mode.String())
		b := bytes.Repeat([]byte(mode.String()+" "), piece)[:piece]
		data = append(data, b)
		if err := os.WriteFile(file, append(make([]byte, at), b...), 0o600); err != nil {
			t.Fatal(err)
		}
		// The first read of the one place hangs, and so does the first of the other.
		block := func(off int) string { return fmt.Sprintf("lba=%d-%d@first=1", (at+off)/512, (at+off+4096)/512-1) }
		spec := fmt.Sprintf("fault:stuck=9s@read@%s,stuck=9s@read@%s,over=file:%s", block(0), block(piece/2), file)
		c.Devices = append(c.Devices, vmlab.Controller(t, mode, spec))
	}
	vm := lab.Boot(t, c)
	hang := func(disk vmlab.Disk, off int) string {
		return fmt.Sprintf("dd if=%s of=/tmp/hung bs=4096 count=1 skip=%d iflag=direct 2>/tmp/dd & dd=$!; sleep 1\n", disk.Namespace(1), (at+off)/4096)
	}
	for i, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			disk := vm.Disk(t, i)
			out := vm.Run(t, hang(disk, 0)+fmt.Sprintf(`
nvme reset /dev/%[1]s & reset=$!
while kill -0 $dd 2>/dev/null; do
	# The function's registers, by the server: all ones if it does not answer.
	od -An -v -tx1 -w8 -N256 /sys/bus/pci/devices/%[2]s/config | grep -c 'ff ff ff ff ff ff ff ff'
	sleep 0.3
done
wait $reset || exit 9
wait $dd || { cat /tmp/dd; exit 8; }`, disk.Name, disk.PCI))
			if asked := strings.Fields(out); len(asked) < 3 || strings.Trim(strings.Join(asked, ""), "0") != "" {
				t.Errorf("what the function answered while it was reset, in lines of ones: %v", asked)
			}
			if got := vm.Run(t, "cat /tmp/hung"); got != string(data[i][:4096]) {
				t.Error("the read has other data")
			}
			vm.Run(t, fmt.Sprintf(verified, disk.Namespace(1)))
			vm.CheckDmesg(t, resetLines...)
		})
	}
	t.Run("machine", func(t *testing.T) {
		text := ""
		for i := range modes {
			text += hang(vm.Disk(t, i), piece/2)
		}
		err := vm.Restarted(t.Context(), func() error {
			_, err := vm.Exec(t.Context(), text+"(sleep 0.3; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 </dev/null &")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for i := range modes {
			disk := vm.Disk(t, i)
			if got := vm.Run(t, fmt.Sprintf("dd if=%s bs=4096 count=1 skip=%d iflag=direct 2>/dev/null", disk.Namespace(1), (at+piece/2)/4096)); got != string(data[i][piece/2:][:4096]) {
				t.Error("the next kernel reads other data")
			}
			vm.Run(t, fmt.Sprintf(verified, disk.Namespace(1)))
		}
	})
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}
