package hostmed

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// told serves one controller and returns its socket and how often the warnings so far contain each text.
func told(t *testing.T) (socket string, count func(text string) int) {
	t.Helper()
	log := &testrig.Buffer{}
	socket = filepath.Join(t.TempDir(), "s")
	start(t, Config{
		Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=1MiB"}}},
		Logger:      hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: log}),
	})
	return socket, func(text string) int { return strings.Count(log.String(), text) }
}

// QEMU without a memory backend hands out no descriptors.
func TestAdviceForMemoryThatIsNotShared(t *testing.T) {
	socket, count := told(t)
	c, err := vfiouser.Dial(context.Background(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := context.Background()
	// ROM and frame buffers never have one.
	for _, m := range []struct {
		iova, size uint64
		flags      uint32
	}{{0xfffc0000, 0x40000, vfiouser.DMARead}, {0xfd000000, 16 << 20, vfiouser.DMARead | vfiouser.DMAWrite}} {
		if err := c.DMAMap(ctx, m.iova, m.size, 0, -1, m.flags); err != nil {
			t.Fatal(err)
		}
	}
	const remedy = "memory-backend-memfd,id=mem,size=SIZE,share=on"
	if n := count(remedy); n != 0 {
		t.Errorf("%d warnings about ROM and a frame buffer", n)
	}
	for range 3 {
		if err := c.DMAMap(ctx, 0, 512<<20, 0, -1, vfiouser.DMARead|vfiouser.DMAWrite); err != nil {
			t.Fatal(err)
		}
		if err := c.DMAUnmap(ctx, 0, 512<<20); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(remedy); n != 1 {
		t.Errorf("%d warnings about memory without a descriptor, want 1", n)
	}
}

// A file on a disk is no memory: the client gets an error, and the log says what would be.
func TestAdviceForMemoryOnADisk(t *testing.T) {
	socket, count := told(t)
	c, err := vfiouser.Dial(context.Background(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 3 {
		if err := c.DMAMap(context.Background(), 0, 4096, 0, int(f.Fd()), vfiouser.DMARead); err == nil {
			t.Fatal("a file on a disk was taken for memory")
		}
	}
	if n := count("memfd or a file on tmpfs"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
}

// share=off: the client's file is not what its guest writes to. The sign is an admin command of zeroes, the first of all.
func TestAdviceForPrivateMemory(t *testing.T) {
	socket, count := told(t)
	r := attach(t, socket)
	for i := range 3 {
		r.reg32(nvme.DoorbellBase, uint32(i+1))
		r.wait(rawACQ, i)
	}
	if n := count("an admin command of zeroes"); n != 1 {
		t.Errorf("%d warnings about memory that is not shared, want 1", n)
	}
}

func TestAdviceForAClientThatSpeaksSomethingElse(t *testing.T) {
	version := vfiouser.Version{Major: 7}
	body := version.Append(nil)
	h := vfiouser.Header{ID: 1, Cmd: vfiouser.CmdVersion, Size: uint32(vfiouser.HeaderSize + len(body))}
	vhost := make([]byte, 20) // VHOST_USER_SET_FEATURES, and what follows
	binary.LittleEndian.PutUint32(vhost, 2)
	binary.LittleEndian.PutUint32(vhost[4:], 1)
	binary.LittleEndian.PutUint32(vhost[8:], 8)
	for name, msg := range map[string][]byte{"another version": append(h.Append(nil), body...), "vhost-user": vhost, "HTTP": []byte("GET / HTTP/1.1\r\nHost: example\r\n\r\n")} {
		t.Run(name, func(t *testing.T) {
			socket, count := told(t)
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write(msg); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF && !os.IsTimeout(err) && !strings.Contains(err.Error(), "reset") {
				t.Errorf("it was answered: %v", err)
			}
			eventually(t, "a warning that names QEMU 10.1", func() bool { return count("QEMU 10.1") == 1 })
		})
	}
}

// QEMU aborts when the connection ends before it has taken the answer: a client that is refused is left to go by itself.
func TestRefusedClientGoesByItself(t *testing.T) {
	socket, _ := told(t)
	open(t, socket, guestdrv.Options{})
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	h := vfiouser.Header{ID: 7, Cmd: vfiouser.CmdVersion, Size: vfiouser.HeaderSize + 200}
	if _, err := conn.Write(append(h.Append(nil), make([]byte, 200)...)); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	var answer [vfiouser.HeaderSize]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		t.Fatal(err)
	}
	if h, _ = vfiouser.ParseHeader(answer[:]); h.ID != 7 || h.Errno != uint32(unix.EBUSY) {
		t.Errorf("answer %v", h)
	}
	_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); !os.IsTimeout(err) {
		t.Errorf("the connection ended: %v", err)
	}
}

// A client that tries again and again does not fill the log.
func TestAdviceForTheSecondClient(t *testing.T) {
	socket, count := told(t)
	open(t, socket, guestdrv.Options{})
	for range 20 {
		if _, err := guestdrv.Open(context.Background(), "vfio-user:"+socket, guestdrv.Options{}); err == nil {
			t.Fatal("a second client was served")
		}
	}
	if n := count("a socket of its own"); n != 1 {
		t.Errorf("%d warnings about 20 refused clients, want 1", n)
	}
	var r refusals
	now := time.Now()
	for i, want := range []struct {
		after   time.Duration
		tell    bool
		dropped int
	}{{0, true, 0}, {time.Second, false, 0}, {2 * time.Second, false, 0}, {refusalPeriod, true, 2}, {refusalPeriod + time.Second, false, 0}} {
		if tell, dropped := r.again(now.Add(want.after)); tell != want.tell || dropped != want.dropped {
			t.Errorf("refusal %d: told %v, %d were not", i, tell, dropped)
		}
	}
}
