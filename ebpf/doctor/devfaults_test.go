package doctor

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// deviceFault is a fault of hostmed, from a build that has them (package hostmed/internal/broken).
type deviceFault struct {
	fault
	broken string // in SHADOWBELL_FAULTS
	medium string // if not memory
	mode   string // of the doorbells, if not shadow
}

// The device's faults, by the names that Rules has.
var deviceFaults = map[string]deviceFault{
	"slept on a lost race": {fault{"R3", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.missed()
		return nil
	}, "it loaded tail ", true}, "sleep-anyway", "", ""},
	"CQ armed at its tail": {fault{"R8", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.starved(1)
		g.must(p.head.Publish(p.cq.Head()))
		return nil
	}, "asked to be rung for head 3, and that is the CQ's tail", true}, "cq-at-tail", "", ""},
	"CQ promised twice": {fault{"R9", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, 4)
		for range 6 {
			p.read()
		}
		g.must(p.tail.Publish(p.sq.Tail()))
		return nil
	}, "6 completions are posted or promised in CQ 1 of 4 entries", false}, "overcommit", "fault:hold@read,over=mem:size=16MiB", ""},
	"kick dropped": {fault{"R10", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.asleep()
		p.flush(3)
		g.must(p.tail.Publish(p.sq.Tail()))
		return nil
	}, "1 doorbell message came while it slept", true}, "drop-kick", "", ""},
	"kick dropped, of a register": {fault{"R10", Device, 1, func(g *guest) func() {
		g.enable(false)
		p := g.pair(1, guestSize, guestSize)
		p.asleep()
		p.flush(3)
		g.must(p.tail.Publish(p.sq.Tail()))
		return nil
	}, "tail 3 in the register, device asleep", true}, "drop-kick", "", "trap"},
	"index counted up": {fault{"R11", Device, 1, func(g *guest) func() {
		g.enable(true)
		g.pair(1, guestSize, guestSize)
		return nil
	}, "it stored event index 1, which is neither", false}, "wrong-index", "", ""},
	"marker left": {fault{"R12", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.flush(5)
		g.must(p.tail.Publish(p.sq.Tail()))
		g.must(g.ring(nvme.SQTailDoorbell(1, 0), p.sq.Tail())) // which the device did not ask for
		p.reap(5)
		return nil
	}, "the marker of polling was left", false}, "no-arm", "", ""},
	"armed only when drained": {fault{"R13", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(2, guestSize, guestSize)
		p.flush(1)
		g.must(p.tail.Publish(1))
		g.must(g.ring(nvme.SQTailDoorbell(2, 0), 1)) // which the device did not ask for
		p.reap(1)
		g.pair(1, guestSize, guestSize)
		return nil
	}, "arming is tied to draining", false}, "arm-drained", "", ""},
	"fixed marker": {fault{"R14", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		g.busy(p)
		return nil
	}, "its event index was 0xffffffff, not one behind, so", false}, "sentinel", "", ""},
	"register for the truth": {fault{"R15", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.flush(3)
		g.must(p.tail.Publish(p.sq.Tail()))
		return nil
	}, "it reads tail 0 where the page holds 3", false}, "register", "", ""},
	"pages survive a reset": {fault{"R21", Device, -1, func(g *guest) func() {
		g.enable(true)
		g.pair(1, guestSize, guestSize).do(3)
		g.enable(false)
		return nil
	}, "configured in enable 1, and this is enable 2", false}, "keep-pages", "", ""},
	"stale slots": {fault{"R22", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.half(1, guestSize, guestSize)
		p.flush(5) // so that what is fetched by mistake is a command
		p.word[0].Store(5)
		g.create(p, guestSize)
		return nil
	}, "when the queue had been created its tail was 5", false}, "stale-slots", "", ""},
	"resumed without a look": {fault{"R27", Device, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.do(3)
		p.asleep()
		const command, memory, master = 4, 2, 4
		config := func(v byte) {
			g.must(g.c.RegionWrite(g.Context(), vfiouser.RegionConfig, command, []byte{v, 4}))
		}
		config(memory) // no bus master: nothing is fetched
		p.flush(2)
		g.must(p.tail.Publish(p.sq.Tail()))
		config(memory | master)
		return nil
	}, "paused or parked", true}, "no-probe", "", ""},
	"interrupt lost": {fault{Interrupt, Device, 1, func(g *guest) func() {
		g.interrupts()
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.do(3)
		return nil
	}, "3 completions were posted in CQ 1 up to entry 3, vector 0 is on", false}, "no-interrupt", "", ""},
}

// missed publishes one command after the other until the device, which polls after each for a while, sleeps over one.
func (p *pair) missed() {
	p.g.Helper()
	for range 1000 {
		p.flush(1)
		p.g.must(p.tail.Publish(p.sq.Tail()))
		for look := time.Now().Add(200 * time.Millisecond); !p.cq.Ready(); {
			if time.Now().After(look) {
				if p.slept() {
					return
				}
				look = time.Now().Add(200 * time.Millisecond)
			}
		}
		p.reap(1)
		p.g.must(p.head.Publish(p.cq.Head()))
	}
	p.g.Fatal("the device slept over nothing")
}

// slept says whether the device sleeps and has not taken all that was published.
func (p *pair) slept() bool {
	for _, q := range p.g.sample().Controllers[0].Queues {
		if q.QID == p.qid {
			return q.State == "armed" && q.SQ.Private != p.sq.Tail()
		}
	}
	return false
}

// read pushes a read of 512 bytes.
func (p *pair) read() {
	var cmd nvme.Command
	cmd.SetRW(nvme.IORead, 1, 0, 0)
	cmd.PRP1 = ramAt + ramSize - shm.PageSize
	p.push(cmd)
}

// busy keeps the device polling until the test ends.
func (g *guest) busy(p *pair) {
	var load sync.WaitGroup
	ctx, stop := context.WithCancel(context.Background())
	load.Go(func() {
		for ctx.Err() == nil {
			p.do(1)
		}
	})
	g.Cleanup(func() { stop(); load.Wait() })
}

// another is a hostmed in another process.
type another struct {
	client *attach.Client
	conn   *attach.Conn
}

func (a *another) InspectMemory(ctx context.Context, which string) (inspect.Snapshot, []*os.File, error) {
	return a.conn.Inspect(ctx, which)
}

func (a *another) Kick(ctx context.Context, which string, qid uint16) (inspect.Kick, error) {
	return a.client.Kick(ctx, which, qid)
}

// start starts a hostmed that breaks a rule.
func start(t *testing.T, bin, broken, medium, mode string) (a *another, socket string) {
	t.Helper()
	dir := t.TempDir()
	socket, control := filepath.Join(dir, "s"), filepath.Join(dir, "control")
	var log testrig.Buffer
	cmd := exec.Command(bin, "serve", "--socket", socket, "--namespace", medium, "--doorbells", mode, "--control", control)
	cmd.Env = append(os.Environ(), "SHADOWBELL_FAULTS="+broken)
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	begun := make(chan error)
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // or Pdeathsig strikes when this thread ends
		begun <- cmd.Start()
		ended <- cmd.Wait()
	}()
	if err := <-begun; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil || t.Failed() {
			t.Errorf("hostmed: %v\n%s", err, log.String())
		}
	})
	a = &another{client: attach.New(control)}
	t.Cleanup(a.client.Close)
	var err error
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if a.conn, err = a.client.Attach(t.Context()); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%v\n%s", err, log.String())
		}
	}
	t.Cleanup(func() { a.conn.Close() })
	return a, socket
}

// TestDeviceFaults is TestFaults with the device's: a hostmed that was built to break rules is asked to.
func TestDeviceFaults(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "hostmed")
	build := exec.Command("go", "build", "-tags", "shadowbell_faults", "-o", bin, "github.com/shadowbell/shadowbell/tools/hostmed")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Run("device", func(t *testing.T) {
		for name, f := range deviceFaults {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				medium := f.medium
				if medium == "" {
					medium = "mem:size=16MiB"
				}
				mode := f.mode
				if mode == "" {
					mode = "shadow"
				}
				a, socket := start(t, bin, f.broken, medium, mode)
				g := connect(t, a, socket)
				if meanwhile := f.run(g); meanwhile != nil {
					g.sample()
					meanwhile()
				}
				g.named(f.fault)
			})
		}
	})
}
