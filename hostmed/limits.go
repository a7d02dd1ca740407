package hostmed

import (
	"fmt"
	"math"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
)

// Limits are how many commands and bytes a second a namespace, or a controller, may use. What counts as what is in the comment of Limit.
type Limits = qos.Limits

// Limit is a rate, and how much may be done at once after a time of less: Rate/10 if Burst is 0. A Rate of 0 is no limit. A command larger than
// the burst passes, and those after it wait for what it took too much.
//
// Read, Compare and Verify are reads, Write and Write Zeroes are writes, of as many bytes as they name. A Copy is a write; the bytes are read
// and written. Dataset Management and Write Uncorrectable are writes of no bytes. Flush counts in IOPS only, a vendor specific command as its opcode says which way its
// data goes. A fused pair is two commands. Reservation commands are free.
type Limit = qos.Limit

// ParseLimits reads limits as the command line has them: "iops=2000,read_bandwidth=100MiB,iops_burst=500".
func ParseLimits(s string) (l Limits, err error) {
	seen := map[string]bool{}
	for part := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok {
			return Limits{}, fmt.Errorf("limit %q is not KEY=VALUE: write it as iops=2000,bandwidth=100MiB", part)
		}
		if seen[key] {
			return Limits{}, fmt.Errorf("limit %s is given twice: name it once", key)
		}
		seen[key] = true
		if err := setLimit(&l, key, value); err != nil {
			return Limits{}, err
		}
	}
	if _, err := l.Check(); err != nil {
		return Limits{}, err
	}
	return l, nil
}

// setLimit sets what key, that of a rate or of a burst, names.
func setLimit(l *Limits, key, value string) error {
	var known []string
	for _, f := range l.Fields() {
		known = append(known, f.Name)
		to := &f.Limit.Rate
		switch key {
		case f.Name + "_burst":
			to = &f.Limit.Burst
		case f.Name:
		default:
			continue
		}
		n, err := strconv.ParseUint(value, 10, 64)
		example := "2000 (commands)"
		if f.Bytes {
			n, err = backend.ParseSize(value)
			example = "100MiB"
		}
		if err != nil || n == 0 || n > math.MaxInt64 {
			return fmt.Errorf("%s: %q is no limit: use a number as in %s, or leave it out for none", key, value, example)
		}
		*to = n
		return nil
	}
	return fmt.Errorf("limit %q is none of %s, each also with _burst", key, strings.Join(known, ", "))
}

// limitsInFile has what setLimit takes.
type limitsInFile struct {
	IOPS                size `toml:"iops"`
	IOPSBurst           size `toml:"iops_burst"`
	ReadIOPS            size `toml:"read_iops"`
	ReadIOPSBurst       size `toml:"read_iops_burst"`
	WriteIOPS           size `toml:"write_iops"`
	WriteIOPSBurst      size `toml:"write_iops_burst"`
	Bandwidth           size `toml:"bandwidth"`
	BandwidthBurst      size `toml:"bandwidth_burst"`
	ReadBandwidth       size `toml:"read_bandwidth"`
	ReadBandwidthBurst  size `toml:"read_bandwidth_burst"`
	WriteBandwidth      size `toml:"write_bandwidth"`
	WriteBandwidthBurst size `toml:"write_bandwidth_burst"`
}

func (x *limitsInFile) config(path string) (l Limits, err error) {
	v := reflect.ValueOf(x).Elem()
	for i := range v.NumField() {
		if text := v.Field(i).Interface().(size).text; text != "" {
			key := v.Type().Field(i).Tag.Get("toml")
			if err := setLimit(&l, key, text); err != nil {
				return l, wrongField(path+"."+key, "%w", err)
			}
		}
	}
	return l, checkLimits(l, path)
}

func checkLimits(l Limits, path string) error {
	if field, err := l.Check(); err != nil {
		return wrongField(path+"."+field, "%w", err)
	}
	return nil
}

// SetControllerLimits makes l the limits of the controller behind socket, of all its namespaces together, at once: also for commands that wait. A
// Reload leaves them alone unless its configuration has others than the last one.
func (m *Mediator) SetControllerLimits(socket string, l Limits) error {
	if _, err := l.Check(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.subsystems {
		for _, p := range s.ports {
			if p.path == socket {
				s.setLimits(p.self.Limiter(), l)
				return nil
			}
		}
	}
	return fmt.Errorf("no controller has the socket %s", socket)
}

// SetNamespaceLimits makes l the limits of namespace nsid of the subsystem nqn, for all controllers together. Otherwise it is as
// SetControllerLimits.
func (m *Mediator) SetNamespaceLimits(nqn string, nsid uint32, l Limits) error {
	if _, err := l.Check(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s, n, err := m.namespace(nqn, nsid)
	if err != nil {
		return err
	}
	s.setLimits(n.Limiter(), l)
	return nil
}

// NamespaceStats is what has become of a namespace's commands since it is there.
type NamespaceStats struct {
	Throttled    uint64        // commands that limits, the namespace's or a controller's, held back
	ThrottledFor time.Duration // the sum of how long
	// Medium is what the medium was asked to do, and whether data was copied. It stays zero for those that hostmed moves the data of itself: null:,
	// mem: and file:.
	Medium MediumCounts
}

// MediumCounts is what a namespace's medium was asked to do since it was opened.
type MediumCounts = backend.Counts

// NamespaceStats returns the counters of namespace nsid of the subsystem nqn.
func (m *Mediator) NamespaceStats(nqn string, nsid uint32) (NamespaceStats, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, n, err := m.namespace(nqn, nsid)
	if err != nil {
		return NamespaceStats{}, err
	}
	return namespaceStats(n), nil
}

func namespaceStats(n *subsys.Namespace) NamespaceStats {
	commands, ns := n.Limiter().Held()
	s := NamespaceStats{Throttled: commands, ThrottledFor: time.Duration(ns)}
	if c, ok := backend.Plain(n.Medium().Backend).(backend.Counted); ok {
		s.Medium = c.Counts()
	}
	return s
}

// namespace is called with mu held.
func (m *Mediator) namespace(nqn string, nsid uint32) (*subsystem, *subsys.Namespace, error) {
	for _, s := range m.subsystems {
		if s.NQN() != nqn {
			continue
		}
		if n := s.Namespace(nsid); n != nil {
			return s, n, nil
		}
		return nil, nil, fmt.Errorf("subsystem %s has no namespace %d", nqn, nsid)
	}
	return nil, nil, fmt.Errorf("no subsystem has the NQN %s", nqn)
}

// setLimits makes l the limits of of, and returns when all sessions go by them. It is called with mu held.
func (s *subsystem) setLimits(of *qos.Limiter, l Limits) {
	of.Set(l, ioq.Now())
	var shown sync.WaitGroup
	for _, p := range s.ports {
		p.mu.Lock()
		x := p.session
		p.mu.Unlock()
		if x != nil {
			shown.Add(1)
			x.do(call{run: x.data.SetLimits, done: shown.Done})
		}
	}
	shown.Wait()
}
