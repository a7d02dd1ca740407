package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestKernelArgs(t *testing.T) {
	for line, want := range map[string][]string{
		"console=ttyS0 quiet\n": nil,
		"shadowbell.device=sysfs:0000:00:02.0 quiet nokaslr shadowbell.unbind -- /bin/prog a --b": {"--device=sysfs:0000:00:02.0", "--unbind", "/bin/prog", "a", "--b"},
		`x="a b" shadowbell.on-failure="/bin/sh" -- /bin/sh -c "echo  two words" ""`:              {"--on-failure=/bin/sh", "/bin/sh", "-c", "echo  two words", ""},
		"-- --device=sysfs:0000:00:02.0 prog -- shadowbell.x":                                     {"--device=sysfs:0000:00:02.0", "prog", "--", "shadowbell.x"},
	} {
		got, err := kernelArgs(line)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v, want %q", line, got, err, want)
		}
	}
	if _, err := kernelArgs(`a="b`); err == nil {
		t.Error("a quote without its end was taken")
	}
}

func TestInitFlags(t *testing.T) {
	args, err := kernelArgs("quiet shadowbell.device=sysfs:0000:00:02.0 shadowbell.unbind shadowbell.depth=8 shadowbell.no-chroot -- /bin/prog --flag arg")
	if err != nil {
		t.Fatal(err)
	}
	g, err := parse(t, "init "+strings.Join(args, " "))
	if err != nil {
		t.Fatal(err)
	}
	i := g.Init
	if i.Device != "sysfs:0000:00:02.0" || !i.Unbind || i.Depth != 8 || i.Chroot || !slices.Equal(i.Program, []string{"/bin/prog", "--flag", "arg"}) {
		t.Errorf("got %+v", i)
	}
	if s, err := parse(t, strings.Join(i.serveArgs()[1:], " ")); err != nil {
		t.Errorf("serve does not take %q: %v", i.serveArgs(), err)
	} else if s.Serve.UblkDepth != 8 || s.Serve.ID != 0 || !s.Serve.Ublk || !s.Serve.Keep {
		t.Errorf("serve: %+v", s.Serve)
	}
}

func TestInitIsTheFirstProcessOnly(t *testing.T) {
	if isInit() {
		t.Error("this is no first process")
	}
	if err := (&initCmd{}).Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "docs/microvm.md") {
		t.Errorf("got %v", err)
	}
}

func TestModuleErrorsNameTheFile(t *testing.T) {
	name := t.TempDir() + "/broken.ko.xz"
	if err := loadModule(name); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("one that is not there: %v", err)
	}
	if err := os.WriteFile(name, []byte("no module"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := loadModule(name); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("one that is none: %v", err)
	}
}

func TestUblkFlags(t *testing.T) {
	for args, want := range map[string]string{
		"--ublk":                             "",
		"--ublk --id 3 --recover 3 --keep":   "",
		"--ublk --depth 4096":                "--depth 4096",
		"--ublk --max-io 6K":                 "--max-io",
		"--ublk --max-io 2MiB":               "--max-io",
		"--ublk --id 3 --recover 4":          "two devices",
		"--nbd unix:/s --recover 4":          "are for --ublk",
		"":                                   "nothing to do",
		"--ublk --id=-2":                     "0 or more",
		"--ublk --max-io 4KiB --depth 1":     "",
		"--ublk --nbd unix:/s --queues 2 -v": "",
	} {
		_, err := parse(t, "serve vfio-user:/s "+args)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}

func TestDMAOfUblkHoldsItsBuffers(t *testing.T) {
	if got, least := ublkDMA(2, 64, 128<<10), uint64(2*64*(128<<10)); got < least+2<<20 || got > least+8<<20 {
		t.Errorf("2 queues of 64 requests of 128 KiB: %d bytes", got)
	}
	if sinceBoot() < time.Second {
		t.Errorf("this machine has run for %v", sinceBoot())
	}
}

const reaperEnv = "SHADOWBELL_REAPER_TEST"

// A reaper takes the ends of all children of its process, so its test has a process of its own.
func init() {
	if os.Getenv(reaperEnv) != "" {
		reaperChild()
		os.Exit(0)
	}
}

func reaperChild() {
	// Orphans come here, as they do to a first process.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Println(err)
		return
	}
	r := newReaper()
	var ends []<-chan syscall.WaitStatus
	for _, script := range []string{"exit 3", "kill -9 $$", "(sleep 0.1; exit 5) & exit 0", "exit 0"} {
		_, ended, err := r.start("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		if err != nil {
			fmt.Println(err)
			return
		}
		ends = append(ends, ended)
	}
	if _, _, err := r.start("/nothing", []string{"nothing"}, &syscall.ProcAttr{}); err == nil {
		fmt.Println("what is not there was started")
	}
	for _, ended := range ends {
		fmt.Println(describe(<-ended))
	}
	// The orphan is reaped too, and after a time without children another start is waited for.
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
		if err != nil || len(b) == 0 || time.Now().After(deadline) {
			fmt.Printf("children: %q\n", b)
			break
		}
	}
	_, ended, err := r.start("/bin/sh", []string{"sh", "-c", "exit 7"}, &syscall.ProcAttr{})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(describe(<-ended))
}

func TestReaper(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), reaperEnv+"=1")
	out, err := cmd.CombinedOutput()
	want := "exit status 3\nkilled by signal 9 (killed)\nexit status 0\nexit status 0\nchildren: \"\"\nexit status 7\n"
	if err != nil || string(out) != want {
		t.Errorf("%v\n%s, want\n%s", err, out, want)
	}
}
