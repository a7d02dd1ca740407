package hostnvme

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	vendorRead  = 0xc2
	vendorWrite = 0xc5
)

func asked(op uint8, n int) nvme.Command {
	return nvme.Command{Opcode: op, NSID: 1, CDW10: uint32(n / 4)}
}

// TestAsk moves data both ways and hands on what the device says, without what means nothing to a guest.
func TestAsk(t *testing.T) {
	var got []byte
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Admin: func(cmd *nvme.Command, data []byte) (nvme.Status, uint32) {
		switch cmd.Opcode {
		case vendorWrite:
			got = bytes.Clone(data)
			return nvme.StatusSuccess, 7
		case vendorRead:
			copy(data, bytes.Repeat([]byte{0xab}, len(data)))
			return nvme.StatusSuccess, 8
		}
		return nvme.StatusInvalidField.WithMore().WithDNR(), 0
	}}})
	out, in := bytes.Repeat([]byte{0x5c}, MaxAsk), make([]byte, MaxAsk)
	if st, dw0, err := r.dev.Ask(t.Context(), asked(vendorWrite, len(out)), out); err != nil || !st.OK() || dw0 != 7 || !bytes.Equal(got, out) {
		t.Errorf("%v, %d, %v, and the device has %d bytes", st, dw0, err, len(got))
	}
	if st, dw0, err := r.dev.Ask(t.Context(), asked(vendorRead, len(in)), in); err != nil || !st.OK() || dw0 != 8 || !bytes.Equal(in, bytes.Repeat([]byte{0xab}, len(in))) {
		t.Errorf("%v, %d, %v", st, dw0, err)
	}
	if st, _, err := r.dev.Ask(t.Context(), asked(vendorRead, 4), make([]byte, MaxAsk+4)); err != nil || st.Code() != nvme.StatusInvalidField {
		t.Errorf("more than there is room for: %v, %v", st, err)
	}
	if st, _, err := r.dev.Ask(t.Context(), asked(0xc4, 0), nil); err != nil || st != nvme.StatusInvalidField.WithDNR() {
		t.Errorf("what the device refuses: %v, %v", st, err)
	}
}

// TestAskIsBounded: guests whose commands the device does not end, with as much data as there may be, have no more of the admin queue and of its
// memory than their share, also when they have given up. The device's own commands go on, and so does a reset.
func TestAskIsBounded(t *testing.T) {
	var mu sync.Mutex
	stuck, seen := true, 0
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{
		Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			mu.Lock()
			defer mu.Unlock()
			if qid == 0 && cmd.Opcode == vendorWrite && stuck {
				seen++
				return nvmetest.Verdict{Action: nvmetest.Hold}
			}
			return nvmetest.Verdict{}
		},
		Admin: func(*nvme.Command, []byte) (nvme.Status, uint32) { return nvme.StatusSuccess, 0 },
	}})
	data := make([]byte, MaxAsk)
	for range 3 * maxAsks { // each gives up; those after the first ones before their turn
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, _, err := r.dev.Ask(ctx, asked(vendorWrite, len(data)), data); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a command that does not end: %v", err)
		}
		cancel()
	}
	mu.Lock()
	if seen != maxAsks {
		t.Errorf("the device has %d commands of guests, at most %d", seen, maxAsks)
	}
	mu.Unlock()
	own := make([]byte, nvme.IdentifySize)
	var identify nvme.Command
	identify.SetIdentify(nvme.CNSController, 0, 0)
	if st, _, err := r.dev.Exec(t.Context(), identify, own); err != nil || !st.OK() {
		t.Errorf("its own command: %v, %v", st, err)
	}
	// They end one by one, and their places are free.
	mu.Lock()
	stuck = false
	mu.Unlock()
	r.model.ReleaseAdmin()
	if st, _, err := r.dev.Ask(t.Context(), asked(vendorWrite, len(data)), data); err != nil || !st.OK() {
		t.Errorf("when they have ended: %v, %v", st, err)
	}

	// A reset ends what is under way, and what waits for its turn goes on after it.
	mu.Lock()
	stuck, seen = true, 0
	mu.Unlock()
	ends := make(chan error, 2*maxAsks)
	for range maxAsks {
		go func() {
			_, _, err := r.dev.Ask(context.Background(), asked(vendorWrite, len(data)), data)
			ends <- err
		}()
	}
	for r.model.Held() < maxAsks {
		time.Sleep(time.Millisecond)
	}
	mu.Lock()
	stuck = false
	mu.Unlock()
	waits := make(chan error, 1)
	go func() {
		_, _, err := r.dev.Ask(context.Background(), asked(vendorWrite, len(data)), data)
		waits <- err
	}()
	if err := r.dev.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range maxAsks {
		if err := <-ends; !errors.Is(err, queue.ErrReset) {
			t.Errorf("a command that a reset came over: %v", err)
		}
	}
	if err := <-waits; err != nil {
		t.Errorf("a command that waited: %v", err)
	}
}

// TestAskEndsWithTheDevice: with the device what waits ends.
func TestAskEndsWithTheDevice(t *testing.T) {
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if cmd.Opcode == vendorWrite {
			return nvmetest.Verdict{Action: nvmetest.Drop}
		}
		return nvmetest.Verdict{}
	}}})
	ends := make(chan error, 3*maxAsks)
	for range cap(ends) {
		go func() {
			_, _, err := r.dev.Ask(context.Background(), asked(vendorWrite, 4096), make([]byte, 4096))
			ends <- err
		}()
	}
	time.Sleep(10 * time.Millisecond)
	r.guests.Gone()
	for range cap(ends) {
		if err := <-ends; err == nil {
			t.Error("a command of a device that is gone has ended well")
		}
	}
}

// TestHealthIsTold: a warning of the device reaches all who watch it.
func TestHealthIsTold(t *testing.T) {
	r := newRig(t, nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 8, LBADS: 9}, {Blocks: 8, LBADS: 9}}})
	told := make(chan Event, 8)
	for nsid := uint32(1); nsid <= 2; nsid++ {
		defer r.dev.Watch(nsid, func(e Event) { told <- e })()
	}
	for !r.model.Event(nvme.MakeAsyncEvent(nvme.EventSMART, nvme.EventSMARTSpare, nvme.LogSMART)) {
		time.Sleep(time.Millisecond) // its requests are on their way
	}
	for range 2 {
		if e := <-told; e != Health {
			t.Errorf("event %d", e)
		}
	}
}
