package load

import (
	"context"
	"encoding/json"
	"testing"
	"time"
)

// TestRate: never more than it allows, and what is not measured is not paced.
func TestRate(t *testing.T) {
	for _, c := range []Config{
		{Rate: 200, Jobs: 2, Depth: 4, Runtime: 300 * time.Millisecond},
		{Rate: 1, Fill: true, Runtime: time.Millisecond}, // which takes minutes at that rate
	} {
		begin := time.Now()
		r, err := newTestLoad(t, c, newDisk(1<<20)).Run(context.Background(), Observer{})
		if err != nil {
			t.Fatal(err)
		}
		most := float64(max(c.Jobs, 1)) * (float64(c.Rate)*(r.Seconds+paceDebt.Seconds()) + 1)
		if r.IOs == 0 || float64(r.IOs) > most {
			t.Errorf("rate %d: %d commands in %.3f s", c.Rate, r.IOs, r.Seconds)
		}
		if d := time.Since(begin); d > 30*time.Second {
			t.Errorf("rate %d: it took %v", c.Rate, d)
		}
	}
	p := newPace(1000)
	if p.next = time.Now().Add(-time.Hour); !p.due() || time.Until(p.next) < -paceDebt {
		t.Error("an hour is made up for")
	}
	p = newPace(1)
	if !p.due() || p.due() || time.Until(p.next) < time.Second/2 {
		t.Error("one a second is not one")
	}
}

// TestEndOfPaced: it does not wait for its next place.
func TestEndOfPaced(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	begin := time.Now()
	if r, err := newTestLoad(t, Config{Rate: 1, Runtime: time.Hour}, newDisk(1<<20)).Run(ctx, Observer{}); err != nil || r.IOs == 0 || !r.Interrupted {
		t.Errorf("%+v, %v", r, err)
	}
	if d := time.Since(begin); d > 30*time.Second {
		t.Error(d)
	}
}

func TestProgressAsJSON(t *testing.T) {
	p := Progress{Phase: PhaseMeasure, Elapsed: 1500 * time.Millisecond, IOs: 5, Bytes: 4096, Errors: 1}
	data, err := json.Marshal(p)
	if want := `{"phase":"measuring","elapsed_s":1.5,"ios":5,"bytes":4096,"errors":1}`; err != nil || string(data) != want {
		t.Errorf("%s, %v", data, err)
	}
	var back Progress
	if err := json.Unmarshal(data, &back); err != nil || back != p {
		t.Errorf("%+v, %v", back, err)
	}
	if json.Unmarshal([]byte(`{"iops":5}`), &back) == nil {
		t.Error("a result was taken for progress")
	}
}
