package sandbox

import (
	"errors"
	"fmt"
	"strings"
)

// Mechanism names one layer of the box.
type Mechanism string

// The layers, in the order in which a Report lists them.
const (
	Seccomp      Mechanism = "seccomp"
	Landlock     Mechanism = "landlock"
	MountNS      Mechanism = "mount ns"
	NetworkNS    Mechanism = "network ns"
	IPCNS        Mechanism = "ipc ns"
	PIDNS        Mechanism = "pid ns"
	NoNewPrivs   Mechanism = "no_new_privs"
	Capabilities Mechanism = "capabilities"
	Limits       Mechanism = "limits"
)

// Item says of one layer whether it is in force.
type Item struct {
	Mechanism Mechanism `json:"mechanism"`
	InForce   bool      `json:"in_force"`
	Detail    string    `json:"detail"`           // what holds, or why the layer is missing
	Remedy    string    `json:"remedy,omitempty"` // what to do about a missing layer
}

// String is one line without a line end.
func (i Item) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: ", i.Mechanism)
	if !i.InForce {
		b.WriteString("NOT in force: ")
	}
	b.WriteString(i.Detail)
	if i.Remedy != "" {
		fmt.Fprintf(&b, " (%s)", i.Remedy)
	}
	return b.String()
}

// Report says what holds after Enter. Nothing is listed as in force that was not verified after it was set.
type Report struct {
	Items []Item `json:"items"` // one for each Mechanism, in the order of the constants
}

// String is one line for each mechanism.
func (r *Report) String() string {
	lines := make([]string, len(r.Items))
	for i, it := range r.Items {
		lines[i] = it.String()
	}
	return strings.Join(lines, "\n")
}

// Missing lists the layers that are not in force.
func (r *Report) Missing() []Item {
	var out []Item
	for _, it := range r.Items {
		if !it.InForce {
			out = append(out, it)
		}
	}
	return out
}

// Has says whether m is in force.
func (r *Report) Has(m Mechanism) bool {
	for _, it := range r.Items {
		if it.Mechanism == m {
			return it.InForce
		}
	}
	return false
}

func (r *Report) holds(m Mechanism, format string, args ...any) {
	r.Items = append(r.Items, Item{Mechanism: m, InForce: true, Detail: fmt.Sprintf(format, args...)})
}

// misses records why m is not in force; a fault brings its own remedy.
func (r *Report) misses(m Mechanism, err error) {
	it := Item{Mechanism: m, Detail: err.Error()}
	var f *fault
	if errors.As(err, &f) {
		it.Detail, it.Remedy = f.detail(), f.remedy
	}
	r.Items = append(r.Items, it)
}

// fault is an error that knows what to do about it.
type fault struct {
	what   string
	err    error // may be nil
	remedy string
}

func (f *fault) detail() string {
	if f.err == nil {
		return f.what
	}
	return f.what + ": " + f.err.Error()
}

func (f *fault) Error() string {
	if f.remedy == "" {
		return f.detail()
	}
	return f.detail() + " (" + f.remedy + ")"
}

func (f *fault) Unwrap() error { return f.err }
