package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
)

// figures are the cases that are not a rate between bare rings.
func figures() []benchCase {
	return []benchCase{
		{"idle", "0.0 % CPU on both sides; first command after idle: p50 at most 60 us", idle},
		{"overcommit", "two jobs and the mediator on one core: at least 0.6 of what sleeping doorbells give", overcommit},
		{"memory", "hostmed below 20 MiB with one controller, and 64 KiB more for each further idle one", memory},
		{"qos", "two of three guests within 5 % of their limits, which change meanwhile, and of their bursts; the third keeps 0.95 of its rate", limits},
		{"allocations", "none for an I/O, on both sides", allocations},
	}
}

// idle measures a pair that has worked and has nothing to do any more, and then how long the first command takes.
func idle(ctx context.Context, b *bench) (r caseResult, err error) {
	err = b.host(ctx, 1, []string{"--namespace", nullSpec}, func(h *process.Daemon, devices []string) error {
		cfg := load.Config{Depth: 32, Runtime: b.pick(time.Second, 200*time.Millisecond), CPUs: []int{b.loadCPU}}
		c, err := guestdrv.Open(ctx, devices[0], cfg.Options(guestdrv.Options{MaxQueuePairs: 2}))
		if err != nil {
			return err
		}
		defer c.Close()
		l, err := load.Open(c, cfg)
		if err != nil {
			return err
		}
		_, err = l.Run(ctx, load.Observer{})
		if err == nil {
			b.note("idle")
			err = idleCPU(ctx, b, &r, h)
		}
		if err = errors.Join(err, l.Close()); err != nil {
			return err
		}
		return firstCommands(ctx, b, &r, c)
	})
	return r, err
}

func idleCPU(ctx context.Context, b *bench, r *caseResult, h *process.Daemon) error {
	// What the load left behind is given back now, not bit by bit while we look.
	debug.FreeOSMemory()
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	read := func() (host, guest time.Duration, err error) {
		host, err1 := process.ThreadTime(h.PID())
		guest, err2 := process.ThreadTime(os.Getpid())
		return host, guest, errors.Join(err1, err2)
	}
	host0, guest0, err := read()
	if err != nil {
		return err
	}
	d := b.pick(10*time.Second, time.Second)
	if err := sleep(ctx, d); err != nil {
		return err
	}
	host1, guest1, err := read()
	if err != nil {
		return err
	}
	// 0.05 % is what 0.0 % is rounded from.
	r.aim("hostmed CPU, % of a core", 100*(host1-host0).Seconds()/d.Seconds(), atMost, 0.05)
	r.aim("guestdrv CPU, % of a core", 100*(guest1-guest0).Seconds()/d.Seconds(), atMost, 0.05)
	return nil
}

// firstCommands sends one command after another with 200 ms between, when both sides are asleep.
func firstCommands(ctx context.Context, b *bench, r *caseResult, c *guestdrv.Controller) error {
	buf, err := c.Alloc(4096)
	if err != nil {
		return err
	}
	defer buf.Free()
	q, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		return err
	}
	ns, err := c.Namespace(1)
	if err != nil {
		return errors.Join(err, q.Close())
	}
	n := 50
	if b.quick {
		n = 5
	}
	took := make([]time.Duration, 0, n)
	// A goroutine of its own, whose thread ends with it.
	done := make(chan error)
	go func() {
		err := cpus.Pin(b.loadCPU)
		io := []guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: uint32(4096 / ns.BlockSize()), IOVA: buf.IOVA()}}
		for i := 0; i < n && err == nil; i++ {
			b.note("first command after idle, %d of %d", i+1, n)
			if err = sleep(ctx, 200*time.Millisecond); err == nil {
				begin := time.Now()
				err = one(ctx, q, io)
				took = append(took, time.Since(begin))
			}
		}
		done <- err
	}()
	if err := errors.Join(<-done, q.Close()); err != nil {
		return err
	}
	echo, err := eventfdEcho(ctx, b, n)
	if err != nil {
		return err
	}
	slices.Sort(took)
	r.figure("the same two wake-ups by eventfd alone, p50, us", float64(echo.Nanoseconds())/1e3)
	r.aim("first command after idle, p50, us", float64(took[len(took)/2].Nanoseconds())/1e3, atMost, 60)
	r.figure("first command after idle, max, us", float64(took[len(took)-1].Nanoseconds())/1e3)
	return nil
}

// one sends a command and waits for it.
func one(ctx context.Context, q *guestdrv.QueuePair, io []guestdrv.IO) error {
	var out [1]guestdrv.Result
	if _, err := q.Submit(io); err != nil {
		return err
	}
	if err := q.Publish(); err != nil {
		return err
	}
	for {
		n, err := q.Reap(out[:])
		if err != nil {
			return err
		}
		if n == 1 {
			return out[0].Status.Err()
		}
		if err := q.Wait(ctx); err != nil {
			return err
		}
	}
}

// eventfdEcho is the floor of a first command: with 200 ms between, one thread wakes another on the other core and is woken by it.
// It returns the median.
func eventfdEcho(ctx context.Context, b *bench, n int) (time.Duration, error) {
	ask, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(ask)
	answer, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(answer)
	done := make(chan error, 2)
	go func() {
		err := cpus.Pin(b.hostCPU)
		for i := 0; i < n && err == nil; i++ {
			if err = waitEvent(ask); err == nil {
				err = sendEvent(answer)
			}
		}
		done <- err
	}()
	var took []time.Duration
	go func() {
		err := cpus.Pin(b.loadCPU)
		for i := 0; i < n && err == nil; i++ {
			b.note("eventfd, %d of %d", i+1, n)
			time.Sleep(200 * time.Millisecond)
			begin := time.Now()
			if err = sendEvent(ask); err == nil {
				err = waitEvent(answer)
			}
			took = append(took, time.Since(begin))
		}
		done <- err
	}()
	if err := errors.Join(<-done, <-done, ctx.Err()); err != nil {
		return 0, err
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

func waitEvent(fd int) error {
	var buf [8]byte
	_, err := unix.Read(fd, buf[:])
	return err
}

func sendEvent(fd int) error {
	one := [8]byte{1}
	_, err := unix.Write(fd, one[:])
	return err
}

// overcommit puts everything on one core, with polling and without.
func overcommit(ctx context.Context, b *bench) (r caseResult, err error) {
	measure := func(spin string) (*load.Result, error) {
		b.note("spin %s", spin)
		var res *load.Result
		err := b.host(ctx, 1, []string{"--namespace", nullSpec, "--spin", spin}, func(h *process.Daemon, devices []string) error {
			var err error
			res, err = b.load(ctx, devices[0], load.Config{
				Jobs: 2, Depth: 32, Runtime: b.pick(5*time.Second, 500*time.Millisecond), CPUs: []int{b.hostCPU}, NoSpin: spin == "off",
			}, h)
			return err
		})
		return res, err
	}
	if r.Load, err = measure("on"); err != nil {
		return r, err
	}
	asleep, err := measure("off")
	if err != nil {
		return r, err
	}
	r.figure("IOPS with sleeping doorbells", asleep.IOPS)
	r.aim("part of sleeping doorbells", r.Load.IOPS/asleep.IOPS, atLeast, 0.6)
	return r, nil
}

// memory compares hostmed with one controller and with many, each with a client that has been at work.
func memory(ctx context.Context, b *bench) (r caseResult, err error) {
	const many = 65
	measure := func(n int) (process.Memory, error) {
		b.note("%d controllers", n)
		var m process.Memory
		err := b.host(ctx, n, []string{"--namespace", nullSpec}, func(h *process.Daemon, devices []string) (err error) {
			for _, d := range devices {
				c, err := guestdrv.Open(ctx, d, guestdrv.Options{DMASize: 4 << 20, Queues: 1})
				if err != nil {
					return err
				}
				defer c.Close()
				if err := readOnce(ctx, c); err != nil {
					return err
				}
			}
			// hostmed gives back what the set-up took when it has been quiet for two seconds.
			if err := sleep(ctx, 4*time.Second); err != nil {
				return err
			}
			m, err = process.ReadMemory(h.PID())
			return err
		})
		return m, err
	}
	one, err := measure(1)
	if err != nil {
		return r, err
	}
	all, err := measure(many)
	if err != nil {
		return r, err
	}
	each := func(one, all uint64) float64 { return (float64(all) - float64(one)) / (1 << 10) / (many - 1) }
	r.aim("hostmed with one controller, MiB", float64(one.Resident)/(1<<20), atMost, 20)
	r.aim("each further idle one, KiB", each(one.Resident, all.Resident), atMost, 64)
	r.figure("without the client's own queues and buffers, KiB", each(one.Resident-one.Shared, all.Resident-all.Shared))
	return r, nil
}

func readOnce(ctx context.Context, c *guestdrv.Controller) error {
	ns, err := c.Namespace(1)
	if err != nil {
		return err
	}
	_, err = ns.ReadAtContext(ctx, make([]byte, 4096), 0)
	return err
}

// allocations runs both sides in this process, where the Go runtime counts for both.
func allocations(ctx context.Context, b *bench) (r caseResult, err error) {
	socket := filepath.Join(b.dir, "alloc.sock")
	m, err := hostmed.New(hostmed.Config{
		Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{memSpec}}}, CPUs: []int{b.hostCPU},
	})
	if err != nil {
		return r, err
	}
	serving, stop := context.WithCancel(ctx)
	ended := make(chan error)
	go func() { ended <- m.Run(serving) }()
	defer func() {
		stop()
		if e := <-ended; err == nil {
			err = e
		}
	}()
	cfg := load.Config{Kind: load.RandRW, Depth: 32, Fill: true, CPUs: []int{b.loadCPU}, Runtime: b.pick(5*time.Second, 500*time.Millisecond)}
	c, err := guestdrv.Open(ctx, "vfio-user:"+socket, cfg.Options(guestdrv.Options{}))
	if err != nil {
		return r, err
	}
	defer c.Close()
	l, err := load.Open(c, cfg)
	if err != nil {
		return r, err
	}
	defer l.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if r.Load, err = l.Run(ctx, load.Observer{}); err != nil {
		return r, err
	}
	runtime.ReadMemStats(&after)
	// What a run allocates to begin and to end is counted too, but not thousands of times.
	r.figure("allocations in the run", float64(after.Mallocs-before.Mallocs))
	r.aim("allocations per I/O", float64(after.Mallocs-before.Mallocs)/float64(max(r.Load.IOs, 1)), atMost, 0.001)
	return r, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// copySpeed returns how many MiB/s this machine copies in pieces of 128 KiB, from memory that is not in the cache to memory that is.
func copySpeed(cpu int, d time.Duration) float64 {
	result := make(chan float64)
	go func() {
		_ = cpus.Pin(cpu) // not pinned is less exact, no more
		const piece = 128 << 10
		from, to := make([]byte, fileSize), make([]byte, 8*piece)
		for i := range from {
			from[i] = byte(i)
		}
		bytes, begin := 0, time.Now()
		for at := 0; time.Since(begin) < d; at = (at + piece) % len(from) {
			bytes += copy(to[at%len(to):][:piece], from[at:][:piece])
		}
		result <- float64(bytes) / time.Since(begin).Seconds() / (1 << 20)
	}()
	return <-result
}

func describeMachine(b *bench) machine {
	return machine{
		Go: runtime.Version(), Arch: runtime.GOARCH, Cores: runtime.NumCPU(), HostCPU: b.hostCPU, LoadCPU: b.loadCPU, Quick: b.quick,
		Model: cpuModel(), Time: time.Now().UTC().Format(time.RFC3339),
	}
}

func cpuModel() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	return modelName(string(data))
}
