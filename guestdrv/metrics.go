package guestdrv

import "iter"

// MetricKind is how a metric behaves.
type MetricKind uint8

// The kinds.
const (
	Counter      MetricKind = iota // only grows, until the controller is opened again
	Gauge                          // goes up and down
	Distribution                   // a histogram, of seconds
)

// String returns "counter", "gauge" or "histogram", as Prometheus calls them.
func (k MetricKind) String() string {
	switch k {
	case Counter:
		return "counter"
	case Gauge:
		return "gauge"
	}
	return "histogram"
}

// Label tells metrics of one name apart.
type Label struct{ Name, Value string }

// Metric is one value for a monitoring system, named by the conventions of Prometheus and OpenMetrics.
type Metric struct {
	Name   string // of counters it ends in _total
	Help   string
	Kind   MetricKind
	Labels []Label

	Value     float64    // of a Counter or a Gauge
	Histogram *Histogram // of a Distribution; Histogram.Cumulative has its buckets
}

// Metrics yields the counts in the form in which monitoring systems want them, those of one name together:
//
//	shadowbell_guestdrv_commands_total{op="read"}             commands that have ended, by Op
//	shadowbell_guestdrv_command_errors_total{op="read"}       with a status other than success
//	shadowbell_guestdrv_command_duration_seconds{op="read"}   how long they took, a histogram
//	shadowbell_guestdrv_mmio_writes_total{queues="io"}        doorbells rung: by the I/O queues and by the admin queue
//	shadowbell_guestdrv_wakeups_total{queues="io"}            sleeps that an interrupt ended
//	shadowbell_guestdrv_rescued_completions_total             found without their interrupt
//	shadowbell_guestdrv_timeouts_total                        commands that missed their deadline
//	shadowbell_guestdrv_aborts_total                          Abort commands because of that
//	shadowbell_guestdrv_resets_total                          controller resets
//	shadowbell_guestdrv_queues                                I/O queue pairs that exist
//
// A kind of command has its metrics from its first command on. Which device it is about is for the caller to say, with a label of
// its own. The example shows all that a collector needs.
func (s *Stats) Metrics() iter.Seq[Metric] {
	return func(yield func(Metric) bool) {
		_ = s.opMetrics(yield) && s.queueMetrics(yield)
	}
}

func (s *Stats) opMetrics(yield func(Metric) bool) bool {
	for _, family := range []struct {
		metric Metric
		fill   func(*Metric, *OpStats)
	}{
		{
			Metric{Name: "shadowbell_guestdrv_commands_total", Help: "Commands that have ended."},
			func(m *Metric, o *OpStats) { m.Value = float64(o.Latency.Count()) },
		},
		{
			Metric{Name: "shadowbell_guestdrv_command_errors_total", Help: "Commands that the controller ended with a status other than success."},
			func(m *Metric, o *OpStats) { m.Value = float64(o.Errors) },
		},
		{
			Metric{Name: "shadowbell_guestdrv_command_duration_seconds", Help: "Time from sending a command to seeing its completion.", Kind: Distribution},
			func(m *Metric, o *OpStats) { m.Histogram = &o.Latency },
		},
	} {
		for i := range s.Ops {
			m, o := family.metric, &s.Ops[i]
			m.Labels = []Label{{"op", o.Op.String()}}
			family.fill(&m, o)
			if !yield(m) {
				return false
			}
		}
	}
	return true
}

func (s *Stats) queueMetrics(yield func(Metric) bool) bool {
	admin, io := s.adminQueue(), s.io()
	queues := 0
	for _, q := range s.Queues {
		if q.QID != 0 {
			queues++
		}
	}
	for _, m := range []Metric{
		{Name: "shadowbell_guestdrv_mmio_writes_total", Labels: []Label{{"queues", "admin"}}, Value: float64(admin.MMIOWrites)},
		{Name: "shadowbell_guestdrv_mmio_writes_total", Labels: []Label{{"queues", "io"}}, Value: float64(io.MMIOWrites)},
		{Name: "shadowbell_guestdrv_wakeups_total", Labels: []Label{{"queues", "admin"}}, Value: float64(admin.Wakeups)},
		{Name: "shadowbell_guestdrv_wakeups_total", Labels: []Label{{"queues", "io"}}, Value: float64(io.Wakeups)},
		{Name: "shadowbell_guestdrv_rescued_completions_total", Value: float64(s.Rescued)},
		{Name: "shadowbell_guestdrv_timeouts_total", Value: float64(s.Timeouts)},
		{Name: "shadowbell_guestdrv_aborts_total", Value: float64(s.Aborts)},
		{Name: "shadowbell_guestdrv_resets_total", Value: float64(s.Resets)},
		{Name: "shadowbell_guestdrv_queues", Kind: Gauge, Value: float64(queues)},
	} {
		m.Help = queueHelp[m.Name]
		if !yield(m) {
			return false
		}
	}
	return true
}

var queueHelp = map[string]string{
	"shadowbell_guestdrv_mmio_writes_total":         "Doorbell registers written.",
	"shadowbell_guestdrv_wakeups_total":             "Sleeps that an interrupt ended.",
	"shadowbell_guestdrv_rescued_completions_total": "Completions that were found without their interrupt.",
	"shadowbell_guestdrv_timeouts_total":            "Commands that missed their deadline.",
	"shadowbell_guestdrv_aborts_total":              "Abort commands that were sent.",
	"shadowbell_guestdrv_resets_total":              "Controller resets.",
	"shadowbell_guestdrv_queues":                    "I/O queue pairs that exist.",
}
