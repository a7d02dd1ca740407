package main

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export/nbd"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

func TestNSIDList(t *testing.T) {
	for text, want := range map[string]nsidList{"all": nil, "1": {1}, "3,1": {3, 1}} {
		var l nsidList
		if err := l.UnmarshalText([]byte(text)); err != nil || !slices.Equal(l, want) {
			t.Errorf("%s: %v, %v", text, l, err)
		}
	}
	for _, text := range []string{"", "0", "1,1", "4294967295", "x", "1,"} {
		var l nsidList
		if err := l.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken: %v", text, l)
		}
	}
}

func TestServeFlagsThatAreWrong(t *testing.T) {
	for args, says := range map[string]string{
		"serve d":              "nothing to do",
		"serve d --nbd /run/s": "unix:PATH",
		"serve d --nbd unix:":  "unix:PATH",
		"serve d --nbd unix:/run/s --connections 0":    "1 to 1024",
		"serve d --nbd unix:/run/s --nsid 0":           "no namespace",
		"serve d --nbd unix:/run/s --nsid 1,1":         "twice",
		"serve d --nbd unix:/run/s --connections 9999": "1 to 1024",
	} {
		if _, err := parse(t, args); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want %q", args, err, says)
		}
	}
}

func TestServeOptions(t *testing.T) {
	g, err := parse(t, "serve d --nbd unix:/run/a?b/s --queues 3")
	if err != nil {
		t.Fatal(err)
	}
	o := g.Serve.options(func(guestdrv.Change) {})
	if o.Queues != 3 || o.OnReset != guestdrv.ResetReplay || o.OnChange == nil || o.DMASize != 0 {
		t.Errorf("%+v", o)
	}
	if u := g.Serve.uri(); u != "nbd+unix:///?socket=/run/a%3Fb/s" {
		t.Error(u)
	}
	if g, err = parse(t, "serve d --nbd unix:/s --ublk"); err != nil {
		t.Fatal(err)
	}
	with := g.Serve.options(nil).DMASize
	g.Serve.NBD = ""
	if with != g.Serve.options(nil).DMASize+nbd.DefaultDMAMemory {
		t.Errorf("%d bytes of DMA memory for both servers", with)
	}
}

// TestServeNBD: the server is there when it says so, in its sandbox, greets, and ends in order without leaving its socket.
func TestServeNBD(t *testing.T) {
	device, _ := serve(t)
	for _, sandbox := range []string{"on", "off"} {
		socket := filepath.Join(t.TempDir(), "s")
		d, err := process.StartGuestdrv(t.Context(), guestdrvBin, nil, device, "--nbd", "unix:"+socket, "--nsid", "1,3", "--sandbox", sandbox)
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.DialTimeout("unix", socket, patience)
		if err != nil {
			t.Fatal(errors.Join(err, d.Stop()))
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		hello := make([]byte, 18)
		if _, err := io.ReadFull(c, hello); err != nil || string(hello[:16]) != "NBDMAGICIHAVEOPT" {
			t.Errorf("greeting %q, %v", hello, err)
		}
		if err := d.Stop(); err != nil {
			t.Errorf("sandbox %s: %v", sandbox, err)
		}
		if _, err := c.Read(hello); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
		c.Close()
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("sandbox %s: the socket is still there (%v)", sandbox, err)
		}
	}
}

// TestServeNBDEndsWithItsController: it ends by itself, says why, and hangs up on its clients.
func TestServeNBDEndsWithItsController(t *testing.T) {
	device, h := serve(t)
	socket := filepath.Join(t.TempDir(), "s")
	d, err := process.StartGuestdrv(t.Context(), guestdrvBin, nil, device, "--nbd", "unix:"+socket)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialTimeout("unix", socket, patience)
	if err != nil {
		t.Fatal(errors.Join(err, d.Stop()))
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if err := h.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("the client is not hung up on: %v", err)
	}
	if err := d.Stop(); err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(err.Error(), "gone") {
		t.Errorf("it ended with %v", err)
	}
}
