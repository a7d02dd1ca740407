package backend

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestVFIOOperations: an Op is converted by its number.
func TestVFIOOperations(t *testing.T) {
	for op, is := range map[Op]hostnvme.Op{
		OpRead: hostnvme.Read, OpWrite: hostnvme.Write, OpFlush: hostnvme.Flush, OpWriteZeroes: hostnvme.WriteZeroes,
		OpDiscard: hostnvme.Discard, OpCommand: hostnvme.Command,
	} {
		if hostnvme.Op(op) != is {
			t.Errorf("%v is %d", op, is)
		}
	}
}

// TestVFIOSlices: slices of a namespace do not overlap, but for those that are only read.
func TestVFIOSlices(t *testing.T) {
	var c vfioClaims
	take := func(key string, from, to uint64, readOnly bool, fits bool) *vfioSlice {
		t.Helper()
		s, err := c.take(key, from, to, readOnly)
		if (err == nil) != fits {
			t.Fatalf("%s %d to %d: %v", key, from, to, err)
		}
		return s
	}
	a := take("x 1", 1000, 2000, false, true)
	take("x 1", 1999, 3000, false, false)
	take("x 1", 0, 1001, true, false)
	take("x 1", 1200, 1300, false, false)
	take("x 1", 0, 9000, false, false)
	take("x 2", 0, 9000, false, true)
	b := take("x 1", 2000, 3000, true, true)
	take("x 1", 2500, 2600, true, true)
	if err := c.grow(a, 2001); err == nil {
		t.Fatal("it grows into its neighbour")
	}
	b.release()
	take("x 1", 2000, 2500, false, true)
	a.release()
	take("x 1", 0, 2000, false, true)
}

func TestVFIOSliceOfANamespace(t *testing.T) {
	const blocks, shift = 1000, 12
	for spec, want := range map[string]string{
		"":                          "0+1000",
		"offset=4096":               "1+999",
		"offset=4096,size=8192":     "1+2",
		"offset=1M":                 "256+744",
		"size=4096000":              "0+1000",
		"offset=512":                "multiple",
		"size=512":                  "multiple",
		"offset=4096000":            "behind its end",
		"offset=4096,size=4096000":  "at the most size=",
		"offset=4096,size=9000000M": "at the most size=",
	} {
		s := Spec{}
		for _, f := range strings.Split(spec, ",") {
			key, value, _ := strings.Cut(f, "=")
			n, _ := ParseSize(value)
			if key == "offset" {
				s.Offset = n
			} else if key == "size" {
				s.Size = n
			}
		}
		first, n, err := sliceOf(s, blocks, shift)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = FormatSize(first) + "+" + FormatSize(n)
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s", spec, got)
		}
	}
}

// TestVFIOTells: what becomes of the device is said to who opened it.
func TestVFIOTells(t *testing.T) {
	var out strings.Builder
	r, err := vfioTelling(t, Spec{}, nvmetest.Config{}, hclog.New(&hclog.LoggerOptions{Output: &out}))
	if err == nil {
		err = r.Close()
	}
	if got := out.String(); err != nil || !strings.Contains(got, "vfio: device opened") || !strings.Contains(got, "vfio: namespace closed") {
		t.Errorf("%v; the log says: %s", err, got)
	}
}

// TestVFIOGrows: the device says by an event that its namespace has grown. A slice that goes to the end hears of it and has the new blocks, which are
// read and written; those that another namespace has it does not take.
func TestVFIOGrows(t *testing.T) {
	const was, is = 1 << 20, 2 << 20
	r, err := vfioOver(t, Spec{NSID: 1, Offset: was / 2}, nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: was / 512, LBADS: 9}}})
	if err != nil {
		t.Fatal(err)
	}
	opened(t)(r, err)
	events := make(chan Event, 4)
	r.Watch(func(e Event) { events <- e })
	r.model.SetNamespaces(nvmetest.Namespace{Blocks: is / 512, LBADS: 9})
	notice := nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)
	for deadline := time.Now().Add(time.Minute); !r.model.Event(notice); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("hostmed does not ask for events")
		}
	}
	select {
	case e := <-events:
		if e != EventChanged {
			t.Errorf("event %v", e)
		}
	case <-time.After(time.Minute):
		t.Fatal("nobody was told")
	}
	if !r.Resized() {
		t.Error("it does not say so")
	}
	way, err := vfioSlices.take(r.key(), is-4096, is, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Resize(); err == nil || r.Info().Size() != was/2 {
		t.Errorf("it has taken another's blocks: %d bytes, %v", r.Info().Size(), err)
	}
	way.release()
	if err := r.Resize(); err != nil {
		t.Fatal(err)
	}
	if got := r.Info().Size(); got != is-was/2 || r.Resized() {
		t.Errorf("%d bytes, want %d", got, is-was/2)
	}
	q, data, back := newQueue(t, r), guestMemory(t, 4096), guestMemory(t, 4096)
	copy(data, "behind the old end")
	for _, req := range []*Request{write(is-was/2-4096, data), read(is-was/2-4096, back)} {
		if run(t, q, req); !req.Status.OK() {
			t.Fatal(req.Status)
		}
	}
	if !bytes.Equal(data, back) {
		t.Error("what is read is not what was written")
	}
}
