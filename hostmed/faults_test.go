package hostmed

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// within fails the test if f takes longer than what a driver and an operator are told.
func within(t *testing.T, what string, limit time.Duration, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	if d := time.Since(begin); d > limit {
		t.Errorf("%s took %v", what, d)
	}
}

// stuckRead returns a pair with a read, command identifier 0, that does not end, and that the controller has begun.
func stuckRead(t *testing.T, c *guestdrv.Controller) *guestdrv.QueuePair {
	t.Helper()
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 8})
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Free)
	if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: 8, IOVA: b.IOVA(), Tag: 1}, {Op: nvme.IOFlush, NSID: 1, Tag: 2}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	if r := reapOne(t, p); r.Tag != 2 {
		t.Fatalf("the read has ended: %v", r.Status)
	}
	return p
}

func reapOne(t *testing.T, p *guestdrv.QueuePair) guestdrv.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	results := make([]guestdrv.Result, 2)
	if n, err := p.Reap(results); n != 1 || err != nil {
		t.Fatalf("%d results, %v", n, err)
	}
	return results[0]
}

// TestDroppedCommandsHoldNothingUp has commands that never end, and everything that waits for commands.
func TestDroppedCommandsHoldNothingUp(t *testing.T) {
	const limit = 20 * time.Second // far from the driver's own minute, and from the hour of the delay
	for _, rules := range []string{"drop@read", "hold@read", "delay=1h@read"} {
		for _, over := range []string{"mem:size=16MiB", "file:" + t.TempDir() + "/disk,size=16MiB"} {
			t.Run(strings.Split(rules, "@")[0]+" over "+over[:4], func(t *testing.T) {
				socket, stop := one(t, Shadow, "fault:"+rules+",over="+over, "mem:size=1MiB")
				c := open(t, socket, guestdrv.Options{Timeout: time.Minute, DMASize: 8 << 20})
				pair := func() *guestdrv.QueuePair { return stuckRead(t, c) }
				p := pair()
				within(t, "deleting the queue", limit, func() {
					if err := p.Close(); err != nil {
						t.Error(err)
					}
				})
				// A format waits for the namespace's commands.
				p = pair()
				within(t, "formatting", limit, func() {
					cmd := &nvme.Command{Opcode: nvme.AdminFormatNVM, NSID: 1}
					if _, err := c.Admin(context.Background(), cmd, nil); err != nil {
						t.Error(err)
					}
				})
				pair()
				within(t, "closing the driver", limit, func() {
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				})
				// Once more, and the mediator ends first.
				c = open(t, socket, guestdrv.Options{Timeout: time.Minute, DMASize: 8 << 20})
				pair()
				within(t, "shutdown", limit, func() {
					if err := stop(); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// TestAbortOfDroppedCommands aborts one that may be, and one that is lost.
func TestAbortOfDroppedCommands(t *testing.T) {
	for rule, want := range map[string]uint32{"hold": 0, "drop": 1} {
		socket, _ := one(t, Shadow, "fault:"+rule+"@read,over=mem:size=1MiB")
		c := open(t, socket, guestdrv.Options{Timeout: time.Minute, DMASize: 8 << 20})
		p := stuckRead(t, c)
		abort := &nvme.Command{Opcode: nvme.AdminAbort}
		abort.SetAbort(p.QID(), 0)
		got, err := c.Admin(context.Background(), abort, nil)
		if err != nil || got&1 != want {
			t.Errorf("%s: dword 0 is %d, %v", rule, got, err)
		}
		if want == 0 {
			if r := reapOne(t, p); r.Tag != 1 || r.Status.Code() != nvme.StatusAbortRequested {
				t.Errorf("tag %d, %v", r.Tag, r.Status)
			}
		}
		p.Close()
		c.Close()
	}
}

func TestFaultsAreAnnounced(t *testing.T) {
	var said testrig.Buffer
	m, err := New(Config{
		NoSockets: true, Logger: hclog.New(&hclog.LoggerOptions{Output: &said}),
		Controllers: []ControllerConfig{{Socket: "a", Namespaces: []string{"fault:drop,over=null:size=1MiB"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if s := said.String(); !strings.Contains(s, "[WARN]") || !strings.Contains(s, "on purpose") || !strings.Contains(s, "fault:drop,over=null:size=1MiB") {
		t.Errorf("the log says %q", s)
	}
}
