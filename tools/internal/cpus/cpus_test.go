package cpus

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	usable, err := Usable()
	if err != nil || len(usable) == 0 {
		t.Fatalf("Usable() = %v, %v", usable, err)
	}
	first := usable[0]
	for s, want := range map[string]List{
		fmt.Sprint(first):                  {first},
		fmt.Sprintf("%d-%d", first, first): {first},
		usable.String():                    usable,
	} {
		got, err := Parse(s)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Parse(%q) = %v, %v; want %v", s, got, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for s, why := range map[string]string{
		"": "not a CPU", "x": "not a CPU", "0,": "not a CPU", "-1": "not a CPU", "0-": "not a CPU", "0,0": "twice", "1-0": "backwards",
		"9000": "past the last", "0-65535": "past the last", "99999": "not a CPU", "8191": "may not run",
	} {
		_, err := Parse(s)
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("Parse(%q): error %v; want one that says %q", s, err, why)
		}
	}
}

func TestString(t *testing.T) {
	for want, l := range map[string]List{"": nil, "3": {3}, "0-3,8": {0, 1, 2, 3, 8}, "2,0": {2, 0}, "4-5,1-2": {4, 5, 1, 2}} {
		if got := l.String(); got != want {
			t.Errorf("%v prints as %q, want %q", []int(l), got, want)
		}
	}
}

func TestPin(t *testing.T) {
	usable, err := Usable()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { // a goroutine of its own: its thread is thrown away with it
		cpu := usable[len(usable)-1]
		err := Pin(cpu)
		var set unix.CPUSet
		if err == nil {
			err = unix.SchedGetaffinity(0, &set)
		}
		if err == nil && (set.Count() != 1 || !set.IsSet(cpu)) {
			err = fmt.Errorf("affinity is %v after Pin(%d)", set, cpu)
		}
		done <- err
		runtime.Goexit()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
