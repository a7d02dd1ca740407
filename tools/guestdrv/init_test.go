package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"
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
