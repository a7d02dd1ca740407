package tracedemo

import (
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRatiosAreWithinARound(t *testing.T) {
	o := Overhead{Depth: 1, Rounds: [][]float64{{100, 90}, {1000, 990}, {10, 8}}} // the machine was busy in the others
	iops, ratio, least, most := o.Ratios(1)
	if iops != 90 || ratio != 0.9 || least != 0.8 || most != 0.99 {
		t.Errorf("%v, %v from %v to %v", iops, ratio, least, most)
	}
	r := Report{Ways: []string{"nothing", "top"}, Results: []Overhead{o}}
	if s := r.Table(); !strings.Contains(s, "0.900  0.800  0.990") || strings.Count(s, "\n") != 4 {
		t.Errorf("%s", s)
	}
}

func TestFioIsRead(t *testing.T) {
	if v, err := parseFio("note\n{\"jobs\":[{\"error\":0,\"read\":{\"iops\":12.5}}]}"); v != 12.5 || err != nil {
		t.Error(v, err)
	}
	for _, s := range []string{"", "{}", `{"jobs":[{"error":5,"read":{"iops":12.5}}]}`, `{"jobs":[{"read":{}}]}`} {
		if _, err := parseFio(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}
