// Package cpus reads lists of CPUs, as taskset(1) writes them, and pins threads to them.
package cpus

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// limit bounds what a list may expand to; it is the kernel's largest NR_CPUS.
const limit = 8192

// List is a list of CPU numbers. As a flag it takes what Parse takes.
type List []int

// Parse reads "0", "0,2" or "0-3,8". The order is kept; a CPU that is named twice is an error, as is one that this
// process may not run on.
func Parse(s string) (List, error) {
	bad := func(why string) (List, error) {
		return nil, fmt.Errorf("CPU list %q: %s; write it as 0, 0,2 or 0-3,8", s, why)
	}
	var l List
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		from, err := strconv.ParseUint(first, 10, 16)
		to := from
		if err == nil && isRange {
			to, err = strconv.ParseUint(last, 10, 16)
		}
		switch {
		case err != nil:
			return bad(fmt.Sprintf("%q is not a CPU or a range", part))
		case to < from:
			return bad(fmt.Sprintf("range %q runs backwards", part))
		case to >= limit:
			return bad(fmt.Sprintf("CPU %d is past the last one that Linux can have", to))
		}
		for cpu := int(from); cpu <= int(to); cpu++ {
			if slices.Contains(l, cpu) {
				return bad(fmt.Sprintf("CPU %d is in it twice", cpu))
			}
			l = append(l, cpu)
		}
	}
	usable, err := Usable()
	if err != nil {
		return nil, err
	}
	for _, cpu := range l {
		if !slices.Contains(usable, cpu) {
			return nil, fmt.Errorf("CPU list %q: this process may not run on CPU %d; it may run on %v", s, cpu, usable)
		}
	}
	return l, nil
}

// UnmarshalText lets a flag be of type List.
func (l *List) UnmarshalText(text []byte) error {
	v, err := Parse(string(text))
	if err != nil {
		return err
	}
	*l = v
	return nil
}

// String prints the list in the form that Parse takes, runs as ranges.
func (l List) String() string {
	var b strings.Builder
	for i := 0; i < len(l); {
		j := i
		for j+1 < len(l) && l[j+1] == l[j]+1 {
			j++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, l[i])
		if j > i {
			fmt.Fprintf(&b, "-%d", l[j])
		}
		i = j + 1
	}
	return b.String()
}

// Usable returns the CPUs that this process may run on, rising.
func Usable() (List, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("sched_getaffinity: %w", err)
	}
	var l List
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			l = append(l, cpu)
		}
	}
	return l, nil
}

// Pin locks the calling goroutine to its thread, and the thread to cpu.
func Pin(cpu int) error {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pinning a thread to CPU %d: %w", cpu, err)
	}
	return nil
}
