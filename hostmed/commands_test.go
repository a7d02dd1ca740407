package hostmed

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// command runs one command of the batch API.
func command(t *testing.T, c *guestdrv.Controller, io guestdrv.IO) nvme.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	io.NSID = 1
	if _, err := p.Submit([]guestdrv.IO{io}); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	var r [1]guestdrv.Result
	if n, err := p.Reap(r[:]); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	return r[0].Status
}

// TestMarksSurviveARestart has blocks that a guest has marked unreadable stay so until they are written, whoever ends meanwhile.
func TestMarksSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	serve := func() (c *guestdrv.Controller, stop func() error) {
		socket := filepath.Join(dir, "s")
		stop = start(t, Config{
			Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"file:" + filepath.Join(dir, "disk") + ",size=1MiB"}}},
			State:       filepath.Join(dir, "state"), Logger: testrig.Log(t),
		})
		return open(t, socket, guestdrv.Options{Timeout: patience / 4}), stop
	}
	read := func(c *guestdrv.Controller, lba uint64, want nvme.Status) {
		t.Helper()
		ns, err := c.Namespace(1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ns.ReadAt(make([]byte, 512), int64(lba*512)); nvme.StatusOf(err).Code() != want {
			t.Errorf("block %d: %v, want %v", lba, err, want)
		}
	}
	c, stop := serve()
	if st := command(t, c, guestdrv.IO{Op: nvme.IOWriteUncorrectable, LBA: 100, Blocks: 3}); !st.OK() {
		t.Fatal(st)
	}
	read(c, 101, nvme.StatusUnrecoveredRead)
	c.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	c, stop = serve()
	read(c, 99, nvme.StatusSuccess)
	read(c, 102, nvme.StatusUnrecoveredRead)
	if st := command(t, c, guestdrv.IO{Op: nvme.IOWriteZeroes, LBA: 100, Blocks: 3}); !st.OK() {
		t.Fatal(st)
	}
	c.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	c, _ = serve()
	read(c, 102, nvme.StatusSuccess)
}

// TestFailedCommandsAreInTheErrorLog reads the log right after a command has failed.
func TestFailedCommandsAreInTheErrorLog(t *testing.T) {
	socket, _ := one(t, Shadow, "mem:size=1MiB")
	c := open(t, socket, guestdrv.Options{Timeout: patience / 4})
	for i := range uint64(3) {
		st := command(t, c, guestdrv.IO{Op: nvme.IOVerify, LBA: 2048 + i, Blocks: 1})
		if st.Code() != nvme.StatusLBAOutOfRange || !st.More() {
			t.Fatal(st)
		}
		var e nvme.ErrorLogEntry
		var cmd nvme.Command
		if err := cmd.SetGetLogPage(nvme.LogError, nvme.NSIDAll, 0, 64, false); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Admin(context.Background(), &cmd, e.Bytes()[:]); err != nil {
			t.Fatal(err)
		}
		if e.SQID == 0 || e.Status() != st || e.NSID != 1 || e.LBA != 2048+i || e.Location != 40 {
			t.Errorf("%+v", e)
		}
	}
}
