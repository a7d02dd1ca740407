package export

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

const mib = 1 << 20

// TestNBDInfo: libnbd understands what there is.
func TestNBDInfo(t *testing.T) {
	s := serve(t, []string{"mem:size=64MiB", "mem:size=32MiB,lba=4096"})
	var got struct {
		Structured, Extended bool
		Exports              []struct {
			Name       string `json:"export-name"`
			Size       uint64 `json:"export-size"`
			Contexts   []string
			ReadOnly   bool `json:"is_read_only"`
			DF         bool `json:"can_df"`
			FastZero   bool `json:"can_fast_zero"`
			Flush      bool `json:"can_flush"`
			FUA        bool `json:"can_fua"`
			MultiConn  bool `json:"can_multi_conn"`
			Trim       bool `json:"can_trim"`
			Zero       bool `json:"can_zero"`
			BlockSize  int  `json:"block_size_minimum"`
			MaxPayload int  `json:"block_size_maximum"`
		}
	}
	out := s.run("nbdinfo", "--json", "--list", s.uri(""))
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(got.Exports) != 2 {
		t.Fatal(out)
	}
	for i, e := range got.Exports {
		if e.Name != []string{"1", "2"}[i] || e.Size != []uint64{64 * mib, 32 * mib}[i] || e.BlockSize != []int{512, 4096}[i] || e.ReadOnly ||
			!e.DF || !e.FastZero || !e.Flush || !e.FUA || !e.MultiConn || !e.Trim || !e.Zero || e.MaxPayload != mib || len(e.Contexts) != 1 {
			t.Errorf("%+v", e)
		}
	}
	if !got.Structured || !got.Extended {
		t.Errorf("not by extended headers: %s", out)
	}
	s.stop()
	s = serve(t, []string{"mem:size=1MiB"}, "--read-only")
	if cmd, out := s.program("nbdcopy", os.Args[0], s.uri("1")); cmd.Run() == nil {
		t.Errorf("a read-only export was written to: %s", out)
	}
}

// image is a file with data and holes; it returns what is in it.
func image(t *testing.T, path string, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < size; at += 4 * mib {
		part := data[at:min(at+mib, size)]
		rng.Read(part)
		if _, err := f.WriteAt(part, int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return data
}

func mustHold(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the data differs", filepath.Base(path))
	}
}

// TestNBDCopy copies in and out by several connections with many requests under way, and looks at the map.
func TestNBDCopy(t *testing.T) {
	s := serve(t, []string{"mem:size=64MiB", "file:" + filepath.Join(t.TempDir(), "disk") + ",size=64MiB,lba=4096"})
	dir := t.TempDir()
	in := filepath.Join(dir, "in")
	want := image(t, in, 64*mib)
	for _, export := range []string{"1", "2"} {
		s.run("nbdcopy", "--connections=4", "--requests=32", "--flush", in, s.uri(export))
		for _, more := range [][]string{nil, {"--request-size=65536"}, {"--synchronous"}} {
			back := filepath.Join(dir, "out-"+export)
			s.run("nbdcopy", append(more, "--connections=4", s.uri(export), back)...)
			mustHold(t, back, want)
		}
		// Holes arrive as holes: three quarters of it. nbdinfo prints "offset length type description".
		holes := 0
		for line := range strings.Lines(s.run("nbdinfo", "--map", s.uri(export))) {
			if strings.Contains(line, "hole,zero") {
				holes++
			}
		}
		if holes != 16 {
			t.Errorf("export %s has %d holes, want 16:\n%s", export, holes, s.run("nbdinfo", "--map", s.uri(export)))
		}
	}
	// From one to the other, through the same server.
	s.run("nbdcopy", s.uri("2"), s.uri("1"))
	s.run("nbdcopy", s.uri("1"), filepath.Join(dir, "last"))
	mustHold(t, filepath.Join(dir, "last"), want)
}

// TestNBDQemuImg: QEMU's block layer works on it, and finds the holes.
func TestNBDQemuImg(t *testing.T) {
	s := serve(t, []string{"mem:size=64MiB", "mem:size=64MiB,lba=4096"})
	dir := t.TempDir()
	in := filepath.Join(dir, "in")
	want := image(t, in, 64*mib)
	for _, export := range []string{"1", "2"} {
		if out := s.run("qemu-img", "info", s.qemu(export)); !strings.Contains(out, "virtual size: 64 MiB (67108864 bytes)") {
			t.Error(out)
		}
		s.run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", in, s.qemu(export))
		s.run("qemu-img", "compare", "-f", "raw", "-F", "raw", in, s.qemu(export))
		qcow := filepath.Join(dir, "out-"+export+".qcow2")
		s.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.qemu(export), qcow)
		s.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow, filepath.Join(dir, "out"))
		mustHold(t, filepath.Join(dir, "out"), want)
		out := s.run("qemu-img", "map", "--output=json", s.qemu(export))
		var extents []struct {
			Length int
			Zero   bool
			Data   bool
		}
		if err := json.Unmarshal([]byte(out), &extents); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		data := 0
		for _, e := range extents {
			if e.Data {
				data += e.Length
			}
		}
		if data != 16*mib {
			t.Errorf("export %s: %d MiB of data, want 16: %s", export, data/mib, out)
		}
		for _, args := range [][]string{{}, {"-w"}, {"-w", "--flush-interval=64"}} {
			s.run("qemu-img", append(append([]string{"bench", "-f", "raw", "-n", "-t", "none", "-c", "4096", "-d", "64"}, args...), s.qemu(export))...)
		}
		// Discard, and zeroes with and without holes.
		s.run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 16M", "-c", "write -z 16M 16M", "-c", "write -z -u 32M 16M",
			"-c", "write -f -P 7 48M 64k", "-c", "read -P 0 16M 32M", "-c", "read -P 7 48M 64k", "-c", "flush", s.qemu(export))
	}
}

// TestNBDFio writes and verifies at queue depth 32 from two connections.
func TestNBDFio(t *testing.T) {
	s := serve(t, []string{"mem:size=64MiB", "mem:size=64MiB,lba=4096"})
	for _, e := range []struct{ export, bs string }{{"1", "512-128k"}, {"2", "4k-128k"}} {
		s.run("fio", "--ioengine=nbd", "--uri="+s.uri(e.export), "--rw=randrw", "--bsrange="+e.bs, "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--size=24M",
			"--name=a", "--offset=0", "--name=b", "--offset=32M")
	}
}

// TestNBDClientThatIsKilled: others do not notice, and its place is free again.
func TestNBDClientThatIsKilled(t *testing.T) {
	s := serve(t, []string{"mem:size=64MiB"}, "--connections", "2")
	for range 4 {
		victim, _ := s.program("fio", "--ioengine=nbd", "--uri="+s.uri("1"), "--rw=randwrite", "--bs=128k", "--iodepth=64", "--size=32M", "--time_based", "--runtime=60", "--thread", "--name=victim")
		s.start(victim)
		s.run("fio", "--ioengine=nbd", "--uri="+s.uri("1"), "--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--offset=32M", "--size=2M", "--name=other")
		if err := victim.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = victim.Wait()
	}
	s.run("nbdinfo", "--size", s.uri("1"))
}

// TestNBDEndsUnderLoad: SIGTERM ends the server in order and soon, though a client goes on and on.
func TestNBDEndsUnderLoad(t *testing.T) {
	s := serve(t, []string{"mem:size=64MiB"})
	client, out := s.program("fio", "--ioengine=nbd", "--uri="+s.uri("1"), "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=64M", "--time_based", "--runtime=60", "--thread", "--name=a")
	s.start(client)
	time.Sleep(300 * time.Millisecond)
	s.stop() // fails if it takes too long or does not end with 0
	if err := client.Wait(); err == nil {
		t.Errorf("the client saw no end: %s", out)
	}
	if !regexp.MustCompile(`(?i)shutdown|connection|transport|error`).Match(out.Bytes()) {
		t.Errorf("the client does not say why it ended: %s", out)
	}
}

// TestNBDNamespacesComeAndGo: exports follow the controller's namespaces, in the sandbox and without a restart.
func TestNBDNamespacesComeAndGo(t *testing.T) {
	lab := vmlab.Open(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	one, two := hostmed.NamespaceConfig{NSID: 1, Spec: "file:" + file}, hostmed.NamespaceConfig{NSID: 2, Spec: "mem:size=2MiB"}
	c := hostmed.Config{Subsystems: []hostmed.SubsystemConfig{{
		NQN: "nqn.2014-08.org.example:export", Namespaces: []hostmed.NamespaceConfig{one}, Controllers: []hostmed.ControllerConfig{{ID: 1}},
	}}}
	m := vmlab.Serve(t, &c)
	sub := &c.Subsystems[0]
	s := serveDevice(t, lab, sub.Controllers[0].Socket)
	sizes := func() (out string) {
		for _, export := range []string{"1", "2"} {
			cmd, b := s.program("nbdinfo", "--size", s.uri(export))
			if err := cmd.Run(); err != nil {
				b.Reset()
				b.WriteString("none\n")
			}
			out += b.String()
		}
		return out
	}
	becomes := func(want string) {
		t.Helper()
		if err := m.Reload(c); err != nil {
			t.Fatal(err)
		}
		got := ""
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if got = sizes(); got == want {
				return
			}
		}
		t.Fatalf("exports of %q bytes, want %q", got, want)
	}
	becomes("1048576\nnone\n")
	sub.Namespaces = append(sub.Namespaces, two)
	becomes("1048576\n2097152\n")
	if err := os.Truncate(file, 4*mib); err != nil {
		t.Fatal(err)
	}
	becomes("4194304\n2097152\n")
	sub.Namespaces = []hostmed.NamespaceConfig{two}
	becomes("none\n2097152\n")
}
