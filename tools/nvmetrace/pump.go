package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/path"
	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

const (
	// pumpEvery is how often rings are read: the default one of hostmed's has room for some 50 ms at the highest rate.
	pumpEvery = 5 * time.Millisecond
	// settleFor is how long after its time an event may be read: on a busy machine some ms are some hundred.
	settleFor = 400 * time.Millisecond
	// lossesEvery is how often the kernel is asked what it has lost.
	lossesEvery = time.Second
)

// taps are the rings of hostmed's workers, which record for as long as taps are open.
type taps interface {
	rings() []*events.Reader
	media(context.Context) ([]events.Medium, error)
	close()
}

// pump moves what rings and the kernel have into a path.Matcher. It belongs to one goroutine; only the kernel's events come from another.
type pump struct {
	m     *path.Matcher
	taps  taps
	src   source // nil: no kernel
	files []string
	notes []string

	rings   []pumpRing
	guests  []*events.Reader // to be closed
	missing map[string]error // guests' files that cannot be read yet, and why

	interval, total path.Summary
	names           map[uint16]events.Medium
	lost            uint64
	asked           time.Time
	deaf            bool // hostmed has gone

	reading sync.WaitGroup
	stop    context.CancelFunc
	mu      sync.Mutex // of what follows
	kernel  []trace.Event
	spare   []trace.Event
	dropped uint64
	failed  error
}

type pumpRing struct {
	*events.Reader
	number int
	lost   uint64
	over   bool
	name   string
}

// newPump begins to read with what comes next, in all rings that are there.
func newPump(t taps, src source, files []string) (*pump, error) {
	p := &pump{taps: t, src: src, files: files, missing: map[string]error{}, names: map[uint16]events.Medium{}, stop: func() {}}
	p.m = path.New(path.Config{}, func(c *path.Command) { p.interval.Add(c) })
	for _, r := range t.rings() {
		if err := r.Skip(); err != nil {
			return nil, fmt.Errorf("hostmed's ring: %w", err)
		}
		p.rings = append(p.rings, pumpRing{Reader: r, number: p.m.Worker(r.Info()), name: r.Info().Name})
	}
	for _, f := range files {
		p.missing[f] = fs.ErrNotExist
	}
	if err := p.openGuests(true); err != nil {
		p.close()
		return nil, err
	}
	if src != nil {
		ctx, stop := context.WithCancel(context.Background())
		p.stop = stop
		p.reading.Go(func() {
			err := src.Read(ctx, p.event)
			if err != nil && ctx.Err() == nil {
				p.mu.Lock()
				defer p.mu.Unlock()
				p.failed = err
			}
		})
	}
	return p, nil
}

func (p *pump) close() {
	p.stop()
	p.reading.Wait()
	for _, r := range p.guests {
		r.Close()
	}
}

// event takes an event of the kernel's.
func (p *pump) event(e trace.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.kernel) == pumpEvents {
		p.dropped++
		return
	}
	p.kernel = append(p.kernel, e)
}

// pumpEvents is how many events of the kernel's wait for drain at the most.
const pumpEvents = 1 << 18

// openGuests opens the files that have come. What was in those that are there from the start is passed over.
func (p *pump) openGuests(skip bool) error {
	for f := range p.missing {
		r, err := events.Open(f)
		if err != nil {
			p.missing[f] = err // one that was just made may have no header yet
			if skip && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, events.ErrFormat) {
				return cli.Usagef("--guest %s: %w", f, err)
			}
			continue
		}
		p.guests = append(p.guests, r)
		if skip {
			if err := r.Skip(); err != nil {
				return fmt.Errorf("--guest %s: %w", f, err)
			}
		}
		delete(p.missing, f)
		p.rings = append(p.rings, pumpRing{Reader: r, number: p.m.Guest(), name: f})
	}
	return nil
}

// pumpChunk is how many records are read at once: where some are lost, one such piece is.
const pumpChunk = 256

// drain reads all that is there.
func (p *pump) drain() {
	if len(p.missing) > 0 {
		_ = p.openGuests(false)
	}
	var out [pumpChunk]events.Record
	for i := range p.rings {
		r := &p.rings[i]
		for !r.over {
			n, err := r.Read(out[:])
			if lost := r.Lost() - r.lost; lost > 0 {
				// Where among them nobody knows.
				r.lost = r.Lost()
				p.m.Lost(r.number, lost+uint64(n))
			} else {
				p.m.Records(r.number, out[:n])
			}
			if err != nil {
				r.over = true
				p.notes = append(p.notes, fmt.Sprintf("%s: %v", printable(r.name), err))
			}
			if n < len(out) {
				break
			}
		}
	}
	p.mu.Lock()
	list := p.kernel
	p.kernel, p.spare = p.spare[:0], list
	dropped := p.dropped
	p.dropped = 0
	p.mu.Unlock()
	p.m.Events(list)
	p.m.LostEvents(dropped)
}

// step drains and takes what is settled up to the time until.
func (p *pump) step(ctx context.Context, until int64) error {
	p.drain()
	if p.m.Unknown() && !p.deaf {
		media, err := p.taps.media(ctx)
		if err != nil && ctx.Err() == nil {
			p.deaf = true // what the rings have is shown all the same
			p.notes = append(p.notes, "hostmed does not say what its media are: "+cli.OneLine(err))
		}
		for _, x := range media {
			p.names[x.ID] = x
		}
		p.m.Media(media)
	}
	if time.Since(p.asked) > lossesEvery {
		if err := p.losses(); err != nil {
			return err
		}
	}
	p.m.Advance(until)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed
}

// losses asks the kernel what it has lost.
func (p *pump) losses() error {
	p.asked = time.Now()
	if p.src == nil {
		return nil
	}
	s, err := p.src.Snapshot()
	if err != nil {
		return err
	}
	n := s.Losses.Ring + s.Losses.Map + s.Losses.Recursion
	p.m.LostEvents(n - p.lost)
	p.lost = n
	return nil
}

// run pumps until ctx ends or duration (0: for ever) has passed, and calls show for each interval (0: none), and tick often. It returns the whole time.
func (p *pump) run(ctx context.Context, interval, duration time.Duration, show func(pathJSON) error, tick func(time.Duration)) (pathJSON, error) {
	begun := time.Now()
	ticker := time.NewTicker(pumpEvery)
	defer ticker.Stop()
	last, shown := begun, begun
	for {
		now, end := time.Now(), false
		select {
		case <-ctx.Done():
			end = true
		case now = <-ticker.C:
			end = duration > 0 && now.Sub(begun) >= duration
		}
		if end {
			break
		}
		if err := p.step(ctx, events.Now()-int64(settleFor)); err != nil && ctx.Err() == nil {
			return pathJSON{}, err
		}
		if now.Sub(shown) > time.Second/4 {
			shown = now
			tick(now.Sub(begun))
		}
		if interval > 0 && now.Sub(last) >= interval {
			x := p.figures(&p.interval, now, now.Sub(last))
			last = now
			p.total.Merge(&p.interval)
			p.interval = path.Summary{}
			if err := show(x); err != nil {
				return x, err
			}
		}
	}
	// What has come until now is taken, and of what comes meanwhile only the ends.
	now := time.Now()
	until := events.Now()
	late := context.WithoutCancel(ctx)
	for events.Now() < until+int64(settleFor) {
		<-ticker.C
		p.drain()
	}
	p.stop()
	p.reading.Wait()
	err := errors.Join(p.step(late, until), p.losses())
	p.total.Merge(&p.interval)
	for f, err := range p.missing {
		p.notes = append(p.notes, fmt.Sprintf("--guest %s: %v", f, err))
	}
	return p.figures(&p.total, now, now.Sub(begun)), err
}

// figures are what --json prints.
func (p *pump) figures(s *path.Summary, at time.Time, took time.Duration) pathJSON {
	x := pathJSON{Time: at, Seconds: took.Seconds(), Counts: pathCounts{p.m.Counts(), p.m.UnderWay()}, Notes: p.notes, Groups: []pathGroup{}}
	for _, g := range s.Groups() {
		y := pathGroup{
			Name: printable(p.names[g.Medium].Name), Kind: p.names[g.Medium].Kind, Guest: g.Guest, Commands: g.Total.Count(), Unmatched: g.Unmatched.Count(),
			Mean: int64(g.Total.Mean()), P50: int64(g.Total.Quantile(0.5)), P99: int64(g.Total.Quantile(0.99)),
		}
		switch {
		case g.Own:
			y.Name, y.Kind = "answered by hostmed", "hostmed"
		case y.Name == "":
			y.Name = "not known"
		}
		for i := range path.Spans {
			h := &g.Spans[i]
			if !g.Guest && (i == path.GuestQueue || i == path.ToGuest) || g.Own && (i == path.RealQueue || i == path.Device || i == path.Back) {
				continue
			}
			y.Spans = append(y.Spans, pathSpan{i.String(), int64(h.Mean()), int64(h.Quantile(0.5)), int64(h.Quantile(0.99)), g.Share(i), i})
		}
		x.Groups = append(x.Groups, y)
	}
	return x
}
