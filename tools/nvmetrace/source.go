package main

import (
	"context"
	"errors"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// source is what commands read: the tracer in the kernel, or what a test makes of it.
type source interface {
	Snapshot() (*trace.Snapshot, error)
	Read(context.Context, func(trace.Event)) error
	Close() error
}

// sample is one look at everything that is shown.
type sample struct {
	at       time.Time
	kernel   *trace.Snapshot   // nil: not asked
	mediator *inspect.Snapshot // nil: not asked, or no answer
	known    *inspect.Snapshot // the last answer until then, what the next is compared with
	gone     string            // why there is no answer
}

// sampler looks. Either of its parts may be nil.
type sampler struct {
	src     source
	control *control
	filter  *filterFlags
	known   *inspect.Snapshot
}

func (s *sampler) look(ctx context.Context) (x sample, err error) {
	x.at = time.Now()
	if s.src != nil {
		if x.kernel, err = s.src.Snapshot(); err != nil {
			return x, err
		}
	}
	if s.control != nil {
		// hostmed may be started again meanwhile; openControl has seen it once.
		if x.mediator, err = s.control.inspect(ctx); err != nil {
			x.gone = cli.OneLine(err)
		} else {
			s.known = x.mediator
		}
		x.known = s.known
	}
	return x, nil
}

// notes are what a look could not see of hostmed.
func (x *sample) notes() []string {
	if x.gone != "" {
		return []string{"hostmed's queues are missing: " + x.gone}
	}
	if x.mediator == nil {
		return nil
	}
	return missing(x.mediator)
}

func (s *sampler) close() error {
	if s.control != nil {
		s.control.close()
	}
	if s.src != nil {
		return s.src.Close()
	}
	return nil
}

// step is one interval: what was before it, what is after it.
type step struct{ before, now sample }

func (s step) seconds() float64 { return s.now.at.Sub(s.before.at).Seconds() }

// kernel is what the kernel counted within the interval, nil if it is not asked.
func (s step) kernel(f *filterFlags) *trace.Snapshot {
	if s.now.kernel == nil {
		return nil
	}
	d := s.now.kernel
	if s.before.kernel != nil {
		d = d.Sub(s.before.kernel)
	}
	return f.only(d)
}

// watch calls show for each interval until ctx ends, duration (0: for ever) has passed, or show returns errEnough. The last one may be short. It
// returns the whole time as one step. An interval of 0 is the whole time.
func (s *sampler) watch(ctx context.Context, interval, duration time.Duration, show func(step) error) (step, error) {
	first, err := s.look(ctx)
	if err != nil {
		return step{first, first}, err
	}
	var ends, ticks <-chan time.Time
	if duration > 0 {
		t := time.NewTimer(duration)
		defer t.Stop()
		ends = t.C
	}
	if interval > 0 {
		t := time.NewTicker(interval)
		defer t.Stop()
		ticks = t.C
	}
	for last := first; ; {
		end := false
		select {
		case <-ctx.Done():
			end = true
		case <-ends:
			end = true
		case <-ticks:
			if duration > 0 && duration-time.Since(first.at) < interval/4 {
				continue // what is left goes with this one
			}
		}
		// The look that follows Ctrl-C is made all the same.
		now, err := s.look(context.WithoutCancel(ctx))
		if err != nil {
			return step{first, last}, err
		}
		if err := show(step{last, now}); err != nil || end {
			if errors.Is(err, errEnough) {
				err = nil
			}
			return step{first, now}, err
		}
		last = now
	}
}

// errEnough ends watch.
var errEnough = errors.New("enough")
