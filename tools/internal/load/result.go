package load

// Result is what a load measured. Its JSON form is that of `guestdrv bench --json`.
type Result struct {
	IOPS         float64 `json:"iops"`
	BandwidthMiB float64 `json:"bw_mib"`         // MiB/s of successful transfers
	Latency      Latency `json:"lat_ns"`         // of each command, Submit to Reap
	MMIOPerIO    float64 `json:"mmio_per_io"`    // doorbell register writes
	WakeupsPerIO float64 `json:"wakeups_per_io"` // sleeps on the interrupt that ended
	CPU          CPU     `json:"cpu_s_per_mio"`
	Errors       uint64  `json:"errors"`        // commands that failed
	VerifyErrors uint64  `json:"verify_errors"` // blocks that were not what they had to be
	Doorbells    string  `json:"doorbells"`     // as the driver used them: shadow, mmap, mmio
	Kind         Kind    `json:"rw"`
	BlockSize    uint64  `json:"bs"` // bytes; the largest if there are several
	Depth        int     `json:"qd"` // of each job
	Jobs         int     `json:"jobs"`
	Seconds      float64 `json:"seconds"`

	Priorities []PriorityShare `json:"priorities,omitempty"` // of each that jobs have, in order of rank

	Ops         []Op     `json:"ops,omitempty"`    // of each kind of command that was sent
	BlockSizes  []uint64 `json:"bs_mix,omitempty"` // bytes, if there are several
	Interrupted bool     `json:"interrupted,omitempty"`
	Idle        *Idle    `json:"idle,omitempty"`
	Trouble     *Trouble `json:"trouble,omitempty"`  // nil: there was none
	Problems    []string `json:"problems,omitempty"` // the first errors, described
	IOs         uint64   `json:"-"`
}

// Latency is a distribution, in ns. A quantile is exact to three figures.
type Latency struct {
	Mean int64 `json:"mean"`
	P50  int64 `json:"p50"`
	P99  int64 `json:"p99"`
	P999 int64 `json:"p999"`
	Max  int64 `json:"max"`
}

// PriorityShare is what the jobs of one priority did.
type PriorityShare struct {
	Priority string  `json:"priority"`
	Jobs     int     `json:"jobs"`
	IOPS     float64 `json:"iops"`
}

// Op is one kind of command, as the driver counts them. A quantile is at most 1/16 too long.
type Op struct {
	Op      string  `json:"op"` // read, write
	IOs     uint64  `json:"ios"`
	Errors  uint64  `json:"errors"`
	Latency Latency `json:"lat_ns"`
}

// Trouble is what the driver did about commands that missed their deadline, from Open on.
type Trouble struct {
	Timeouts uint64 `json:"timeouts"` // commands
	Aborts   uint64 `json:"aborts"`
	Resets   uint64 `json:"resets"` // of the controller
}

// CPU is user and system time in seconds for a million commands; nil: not known.
type CPU struct {
	Guest   *float64 `json:"guest"`
	Host    *float64 `json:"host"`
	Polling *float64 `json:"guest_polling,omitempty"` // of Guest, what was spent with looking for completions in vain: an estimate
}

// Idle is what both sides cost while nothing is asked of them, in percent of one core.
type Idle struct {
	Seconds float64  `json:"seconds"`
	Guest   float64  `json:"guest_cpu_pct"`
	Host    *float64 `json:"host_cpu_pct"` // nil: not known
}
