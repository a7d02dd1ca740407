package hostmed

import (
	"errors"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func attachHere(t *testing.T, mode DoorbellMode) (*Mediator, *Function) {
	t.Helper()
	m, err := New(Config{
		NoSockets: true, Logger: testrig.Log(t),
		Controllers: []ControllerConfig{{Socket: "here", Doorbells: mode, Namespaces: []string{"null:size=1MiB"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	f, err := m.Attach("here")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return m, f
}

// TestAttachedFunction uses what a client in this process has, without a driver.
func TestAttachedFunction(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			_, f := attachHere(t, mode)
			if v, err := f.Read64(nvme.RegCAP); err != nil || nvme.CAP(v).CSS()&nvme.CAPCSSNVM == 0 {
				t.Errorf("CAP %#x, %v", v, err)
			}
			if err := f.Write64(nvme.RegASQ, 1<<32); err != nil {
				t.Error(err)
			}
			if v, err := f.Read64(nvme.RegASQ); err != nil || v != 1<<32 {
				t.Errorf("ASQ %#x, %v", v, err)
			}
			if _, err := f.Read32(nvme.RegCSTS + 1); err == nil {
				t.Error("a register was read that has no such place")
			}
			bells, err := f.Doorbells()
			if err != nil || (bells != nil) != (mode == Mmap) {
				t.Errorf("doorbells %v, %v", bells, err)
			}
			mem := shm.NewHeap(8192)
			if err := f.Map(1<<32, mem, true); err != nil {
				t.Fatal(err)
			}
			if err := f.Map(1<<32, mem, true); !errors.Is(err, unix.EEXIST) {
				t.Errorf("mapped twice: %v", err)
			}
			if err := f.Unmap(1<<32, 8192); err != nil {
				t.Error(err)
			}
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.SetVectors([]int{fd}); err != nil {
				t.Error(err)
			}
			if err := f.SetVectors(make([]int, f.Vectors()+1)[:0]); err != nil {
				t.Error(err)
			}
			if err := f.Reset(); err != nil {
				t.Error(err)
			}
			if v, err := f.Read64(nvme.RegASQ); err != nil || v != 0 {
				t.Errorf("ASQ %#x after a reset, %v", v, err)
			}
			if err := f.Ring(nvme.DoorbellBase+8*64, 1); err != nil { // of no queue: an event, if anybody had asked for one
				t.Error(err)
			}
			if f.Err() != nil {
				t.Error(f.Err())
			}
		})
	}
}

func TestAttachedFunctionEnds(t *testing.T) {
	m, f := attachHere(t, Shadow)
	if _, err := m.Attach("here"); !errors.Is(err, errBusy) {
		t.Errorf("two clients: %v", err)
	}
	if _, err := m.Attach("there"); err == nil {
		t.Error("a controller that does not exist")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	<-f.Done()
	if _, err := f.Read32(nvme.RegVS); !errors.Is(err, errNotAttached) || !errors.Is(err, io.EOF) {
		t.Errorf("read after Close: %v", err)
	}
	if err := f.Ring(nvme.DoorbellBase, 1); !errors.Is(err, errNotAttached) {
		t.Errorf("doorbell after Close: %v", err)
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SetVectors([]int{fd}); !errors.Is(err, errNotAttached) {
		t.Errorf("eventfds after Close: %v", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("an eventfd that was given away is still open: %v", err)
	}
	if f, err = m.Attach("here"); err != nil {
		t.Fatal(err)
	}
	go m.Close()
	select {
	case <-f.Done():
	case <-time.After(patience):
		t.Fatal("the mediator ended, and the function did not")
	}
	if err := f.Err(); !errors.Is(err, errShutdown) {
		t.Errorf("got %v", err)
	}
	if _, err := m.Attach("here"); !errors.Is(err, errShutdown) {
		t.Errorf("attached to what is closed: %v", err)
	}
}
