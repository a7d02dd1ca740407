package vmlab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const verify = "fio --name=v --filename=%s --rw=randwrite --bs=4k --size=2M --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1"

// TestStockDriver: the stock driver takes our disks on each machine, reads back what it wrote, and has nothing to complain of.
func TestStockDriver(t *testing.T) {
	lab := Open(t)
	for _, machine := range []Machine{Q35, PC, Microvm} {
		t.Run(string(machine), func(t *testing.T) {
			file := t.TempDir() + "/disk"
			vm := lab.Boot(t, Config{Machine: machine, Devices: []Device{
				Controller(t, hostmed.Shadow, "mem:size=64MiB"),
				Controller(t, hostmed.Shadow, "file:"+file+",size=64MiB"),
			}})
			t.Logf("up after %.1f s under %s", vm.BootTime().Seconds(), vm.Accel())
			list := vm.Run(t, "nvme list")
			for i := range 2 {
				disk := vm.Disk(t, i).Namespace(1)
				if !strings.Contains(list, disk) {
					t.Errorf("no %s in\n%s", disk, list)
				}
				vm.Run(t, fmt.Sprintf(verify, disk))
			}
			// What the guest reads is what is in the file.
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := vm.Run(t, "md5sum "+vm.Disk(t, 1).Namespace(1)); !strings.HasPrefix(got, fmt.Sprintf("%x", md5.Sum(want))) {
				t.Errorf("the guest reads %s, which is not what is in the file", got)
			}
			vm.CheckDmesg(t)
			if err := vm.Poweroff(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGuest has one guest: its agent, then disks that are plugged in, and a crash.
func TestGuest(t *testing.T) {
	vm := Open(t).Boot(t, Config{Ports: 2, Reboot: true, Programs: []string{"guestdrv"}, Files: map[string]string{"/opt/of/test": "vm_test.go"}, Append: "vmlab_word=1"})
	devices := map[hostmed.DoorbellMode]Device{}
	for _, mode := range []hostmed.DoorbellMode{hostmed.Trap, hostmed.Mmap} {
		devices[mode] = Controller(t, mode, "mem:size=64MiB", "mem:size=32MiB")
	}
	t.Run("agent", func(t *testing.T) { agentWorks(t, vm) })
	t.Run("hot add", func(t *testing.T) { hotAdd(t, vm, devices) })
	t.Run("crash", func(t *testing.T) { crash(t, vm) })
}

// agentWorks: commands, files and restarts, and what is said when something takes too long.
func agentWorks(t *testing.T, vm *VM) {
	ctx := t.Context()
	r := vm.Try(t, "cat; echo to stderr >&2; exit 3")
	if want := (Result{Stderr: "to stderr\n", Exit: 3}); r != want {
		t.Errorf("%+v, want %+v", r, want)
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 32<<10)
	if err := vm.WriteFile(ctx, "/tmp/deep/down", big, 0o600); err != nil {
		t.Fatal(err)
	}
	back, err := vm.ReadFile(ctx, "/tmp/deep/down")
	if err != nil || !bytes.Equal(back, big) {
		t.Errorf("%d of %d bytes came back: %v", len(back), len(big), err)
	}
	if _, err := vm.ReadFile(ctx, "/nowhere"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
	if r, err := vm.ExecInput(ctx, "wc -c", big); err != nil || strings.TrimSpace(r.Stdout) != fmt.Sprint(len(big)) {
		t.Errorf("%+v, %v", r, err)
	}
	vm.Run(t, "guestdrv version && grep -q TestGuest /opt/of/test && grep -q vmlab_word=1 /proc/cmdline")
	// What is left in the background does not hold up the answer.
	vm.Run(t, "sleep 1000 &")

	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := vm.Exec(short, "echo so far; sleep 1000"); err == nil || !strings.Contains(err.Error(), "killed after") || !strings.Contains(err.Error(), "so far") {
		t.Errorf("a command that hangs: %v", err)
	}
	if _, err := vm.QMP(ctx, "no-such-command", nil); err == nil || !strings.Contains(err.Error(), "no-such-command") {
		t.Errorf("%v", err)
	}
	err = vm.Restarted(ctx, func() error {
		_, err := vm.Exec(ctx, "reboot -f")
		if !errors.Is(err, errRestarted) {
			return fmt.Errorf("it answered %w", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := vm.ReadFile(ctx, "/tmp/deep/down"); err == nil {
		t.Error("a file in memory has outlived a restart")
	}
	if _, err := vm.Event(ctx, "RESET"); err != nil {
		t.Error(err)
	}
}

// hotAdd: disks are plugged into the running guest, a subtest each.
func hotAdd(t *testing.T, vm *VM, devices map[hostmed.DoorbellMode]Device) {
	for mode, device := range devices {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			disk := vm.Plug(t, device)
			vm.Run(t, fmt.Sprintf(verify, disk.Namespace(2)))
			vm.CheckDmesg(t)
		})
	}
	if _, err := vm.HotAdd(t.Context(), QEMUNVMe("/dev/null", "x")); err == nil || !strings.Contains(err.Error(), "all 2 root ports") {
		t.Errorf("a third device: %v", err)
	}
}

// crash: the guest's kernel crashes, and the error says so. Afterwards nobody answers.
func crash(t *testing.T, vm *VM) {
	// From here on a restart ends the machine.
	if _, err := vm.QMP(t.Context(), "set-action", map[string]any{"reboot": "shutdown"}); err != nil {
		t.Fatal(err)
	}
	_, err := vm.Exec(t.Context(), "echo c > /proc/sysrq-trigger")
	if err == nil || !strings.Contains(err.Error(), "QEMU has ended") || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("after a crash: %v", err)
	}
	vm.Kill()
	if _, err := vm.Exec(t.Context(), "true"); !errors.Is(err, errEnded) {
		t.Errorf("after its end: %v", err)
	}
}

// TestNothingIsLeft: QEMU dies with the process that started it, even if that is killed.
func TestNothingIsLeft(t *testing.T) {
	lab := Open(t)
	if os.Getenv("VMLAB_VICTIM") != "" {
		vm, err := lab.Start(t.Context(), Config{NoAgent: true})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("victim %d\n", vm.PID())
		select {}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestNothingIsLeft$")
	cmd.Env = append(os.Environ(), "VMLAB_VICTIM=1", "TMPDIR="+t.TempDir()) // which has what a killed process cannot remove
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	var pid int
	for lines := bufio.NewScanner(out); pid == 0 && lines.Scan(); {
		if _, err := fmt.Sscanf(lines.Text(), "victim %d", &pid); err != nil {
			continue
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if pid == 0 {
		t.Fatal("the child has booted nothing")
	}
	for deadline := time.Now().Add(10 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatalf("QEMU (pid %d) has outlived its parent", pid)
		}
	}
}
