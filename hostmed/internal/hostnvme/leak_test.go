package hostnvme

import (
	"bytes"
	"sync/atomic"
	"testing"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestCopiesOfOthersDoNotLeak has a device that says that it has read, and has moved nothing: what is in the buffer was another guest's.
func TestCopiesOfOthersDoNotLeak(t *testing.T) {
	var lies atomic.Bool
	r := newRig(t, nvmetest.Config{Queues: 1, Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		if qid != 0 && lies.Load() {
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusSuccess}
		}
		return nvmetest.Verdict{}
	}}})
	victim, thief := r.queue(t, Attach{Slice: all}), r.queue(t, Attach{Slice: all})
	secret := r.guests.Memory(64 << 10)
	copy(secret, random(64<<10))
	for i := range uint64(bounceCount) {
		victim.must(t, Request{Op: Write, Off: i << 16, Len: 64 << 10, Vec: []Seg{seg(secret)}})
	}
	lies.Store(true)
	got := r.guests.Memory(64 << 10)
	for range bounceCount {
		if st := thief.do(t, Request{Op: Read, Off: 4 << 20, Len: 64 << 10, Vec: []Seg{seg(got)}}); !st.OK() {
			t.Fatal(st)
		}
		if !bytes.Equal(got, make([]byte, len(got))) {
			t.Fatal("a guest has what another one wrote")
		}
	}
}
