//go:build hostdev

package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/shared/device"
)

// What tools/vmlab/hostdev runs in a guest: the address of a device that vfio-pci has, and what is to become of it.
const (
	realDevice = "SHADOWBELL_HOST_DEVICE"
	realEnd    = "SHADOWBELL_HOST_DEVICE_END" // "": it is closed; "gone": somebody takes it away; "killed": the process ends
)

// TestRealDevice has commands under way on a device of the machine while it is reset, and then until its end.
func TestRealDevice(t *testing.T) {
	address := os.Getenv(realDevice)
	if address == "" {
		t.Fatal(realDevice + " names no device")
	}
	log := hclog.New(&hclog.LoggerOptions{Output: os.Stdout, Level: hclog.Debug})
	d, err := Open(context.Background(), address, Options{Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := ends(d)
	defer cancel()
	users := []*user{newUser(t, d, 31), newUser(t, d, 4)}
	if os.Getenv(realEnd) == "" {
		for range 20 {
			for _, u := range users {
				u.moves()
			}
			if err := d.Reset(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		for range 5 {
			d.fn.(interface{ Reset() error }).Reset() // behind its back: CC.EN is 0, and no command ends
			d.report(errFaulted, d.now())
			for _, u := range users {
				u.moves()
			}
		}
	}
	for _, u := range users {
		u.moves()
	}
	fmt.Printf("under load: %+v\n", d.Stats())
	switch os.Getenv(realEnd) {
	case "killed":
		select {}
	case "gone":
		for _, u := range users {
			u.lost(device.ErrGone)
		}
		await(t, "the event", func() bool { return gone.Load() == 1 })
		if err := d.Err(); !errors.Is(err, device.ErrGone) {
			t.Error(err)
		}
	default:
		for _, u := range users {
			u.stop()
			if len(u.bad) != 0 {
				t.Errorf("commands ended with %v", u.bad)
			}
		}
	}
	fmt.Println("all has ended")
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-d.buried:
	case <-time.After(3 * patience):
		t.Error("the kernel does not take it back")
	}
	if os.Getenv(realEnd) == "" {
		again, err := Open(context.Background(), address, Options{Logger: log})
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	}
}
