package faults

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var modes = []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap}

// writer is the journal's writer in a guest.
const (
	writerProgram = "vmlab/journal/writer"
	writer        = "vmlab-journal-writer"
	stopWriter    = "killall -q " + writer + "; while pidof " + writer + " >/dev/null; do sleep 0.05; done"
)

// ackFile gets what writers in a guest acknowledge: QEMU writes it, so it is there when QEMU is gone.
type ackFile string

// withAcks gives a machine the port that writers look for.
func withAcks(t *testing.T, c *vmlab.Config) ackFile {
	t.Helper()
	a := ackFile(filepath.Join(t.TempDir(), "acks"))
	c.Programs = append(c.Programs, writerProgram)
	c.Args = append(c.Args,
		"-chardev", fmt.Sprintf("file,id=acks,path=%s,append=on", a), "-device", "virtio-serial-pci,id=acks,addr=0x1d", "-device", "virtserialport,bus=acks.0,chardev=acks,name=acks")
	return a
}

func (a ackFile) read(t *testing.T) journal.Acks {
	t.Helper()
	b, err := os.ReadFile(string(a))
	if err != nil {
		t.Fatal(err)
	}
	acks, err := journal.ReadAcks(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return acks
}

// more waits until n more acknowledgements have come.
func (a ackFile) more(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		b, err := os.ReadFile(string(a))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(b, []byte("\n"))
	}
	want := count() + n
	eventually(t, fmt.Sprintf("%d acknowledgements", want), func() (bool, string) { have := count(); return have >= want, fmt.Sprint(have) })
}

// patience is for what takes a moment on an idle machine.
const patience = 40 * time.Second

// eventually waits for done, which says what it saw.
func eventually(t *testing.T, what string, done func() (bool, string)) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		ok, saw := done()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s: %s", patience, what, saw)
		}
	}
}

// verified is fio that writes and verifies a little, on devices, side by side.
func verified(devices ...string) string {
	command := "fio --name=global --rw=randwrite --bs=4k --size=1M --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1"
	for i, d := range devices {
		command += fmt.Sprintf(" --name=v%d --filename=%s", i, d)
	}
	return command
}

func checkFile(t *testing.T, path string, l journal.Layout, acks journal.Acks, least int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := journal.Check(f, l, acks)
	if err != nil {
		t.Fatal(err)
	}
	found(t, r, least)
}

// found fails the test for everything that a check has found lost, or if it has not looked at enough to say anything.
func found(t *testing.T, r journal.Report, least int) {
	t.Helper()
	for _, l := range r.Lost {
		t.Error(l)
	}
	if r.Missing > len(r.Lost) {
		t.Errorf("and %d more", r.Missing-len(r.Lost))
	}
	if r.Records < least {
		t.Errorf("only %d were acknowledged, %d are needed to say anything", r.Records, least)
	}
	t.Logf("%d acknowledged and there, %d beyond", r.Records, r.Beyond)
}

// shortDir is a directory whose sockets have names that are short enough, which those in t.TempDir need not have.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "faults-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
