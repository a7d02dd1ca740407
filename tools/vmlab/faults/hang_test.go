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

// hangingDisk is a disk on which the first read of one place takes longer than QEMU waits for the answer of a server, and so does the first read of another.
type hangingDisk struct {
	device vmlab.Device
	data   []byte // from hangAt on
}

const hangAt, hangPiece = 64 << 20, 1 << 20

func hangingDisks(t *testing.T) (all []hangingDisk) {
	for _, mode := range modes {
		file := filepath.Join(t.TempDir(), mode.String())
		data := bytes.Repeat([]byte(mode.String()+" "), hangPiece)[:hangPiece]
		if err := os.WriteFile(file, append(make([]byte, hangAt), data...), 0o600); err != nil {
			t.Fatal(err)
		}
		block := func(off int) string {
			return fmt.Sprintf("lba=%d-%d@first=1", (hangAt+off)/512, (hangAt+off+4096)/512-1)
		}
		spec := fmt.Sprintf("fault:stuck=9s@read@%s,stuck=9s@read@%s,over=file:%s", block(0), block(hangPiece/2), file)
		all = append(all, hangingDisk{vmlab.Controller(t, mode, spec), data})
	}
	return all
}

// hang is a command that reads such a place of each disk, $dd_NAME, and goes on when they hang.
func hang(disks []vmlab.Disk, off int) string {
	text := ""
	for _, d := range disks {
		text += fmt.Sprintf("dd if=%[1]s of=/tmp/hung.%[2]s bs=4096 count=1 skip=%[3]d iflag=direct 2>/tmp/dd.%[2]s & dd_%[2]s=$!\n", d.Namespace(1), d.Name, (hangAt+off)/4096)
	}
	return text + "sleep 1\n"
}

// resetsWhileTheDiskHangs: reads hang, and meanwhile the guest resets the controllers, all three at once, since each only waits. The disks stay: they answer whatever
// else is asked, the resets end when the reads have, and then all is well. Then the whole machine is reset beside such reads, and its next kernel finds the disks.
func (g *guest) resetsWhileTheDiskHangs(t *testing.T) {
	disks := func() (all []vmlab.Disk, namespaces []string) {
		for i := range g.hanging {
			d := g.Disk(t, len(modes)+i)
			all, namespaces = append(all, d), append(namespaces, d.Namespace(1))
		}
		return all, namespaces
	}
	t.Run("controllers", func(t *testing.T) {
		all, namespaces := disks()
		text := hang(all, 0)
		for _, d := range all {
			text += fmt.Sprintf(`
nvme reset /dev/%[1]s & reset_%[1]s=$!
(while kill -0 $dd_%[1]s 2>/dev/null; do
	# The function's registers, by the server: all ones if it does not answer.
	od -An -v -tx1 -w8 -N256 /sys/bus/pci/devices/%[2]s/config | grep -c 'ff ff ff ff ff ff ff ff'
	sleep 0.1
done) >/tmp/asked.%[1]s & asked_%[1]s=$!`, d.Name, d.PCI)
		}
		for _, d := range all {
			text += fmt.Sprintf("\nwait $asked_%[1]s\nwait $reset_%[1]s || exit 9\nwait $dd_%[1]s || { cat /tmp/dd.%[1]s; exit 8; }", d.Name)
		}
		g.Run(t, text)
		for i, d := range all {
			if asked := strings.Fields(g.Run(t, "cat /tmp/asked."+d.Name)); len(asked) < 3 || strings.Trim(strings.Join(asked, ""), "0") != "" {
				t.Errorf("%v: what the function answered while it was reset, in lines of ones: %v", modes[i], asked)
			}
			if got := g.Run(t, "cat /tmp/hung."+d.Name); got != string(g.hanging[i].data[:4096]) {
				t.Errorf("%v: the read has other data", modes[i])
			}
		}
		g.Run(t, verified(namespaces...))
		g.CheckDmesg(t, resetLines...)
	})
	t.Run("machine", func(t *testing.T) {
		all, _ := disks()
		text := hang(all, hangPiece/2)
		err := g.Restarted(t.Context(), func() error {
			_, err := g.Exec(t.Context(), text+"(sleep 0.3; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 </dev/null &")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		all, namespaces := disks()
		for i, d := range all {
			if got := g.Run(t, fmt.Sprintf("dd if=%s bs=4096 count=1 skip=%d iflag=direct 2>/dev/null", d.Namespace(1), (hangAt+hangPiece/2)/4096)); got != string(g.hanging[i].data[hangPiece/2:][:4096]) {
				t.Errorf("%v: the next kernel reads other data", modes[i])
			}
		}
		g.Run(t, verified(namespaces...))
	})
}
