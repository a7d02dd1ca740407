package tracedemo

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// Depths are the queue depths of 4 KiB random reads.
var Depths = []int{1, 32}

// Ways are what runs beside the load. What the others are compared with comes first.
var Ways = []Way{
	{"nothing", ""},
	{"counting alone", "nvmetrace top --plain --interval 1h"},
	{"top", "nvmetrace top --plain"},
	{"snoop: every event", "nvmetrace snoop --write /dev/shm/record"},
}

// Way is a command of nvmetrace.
type Way struct {
	Name    string
	Command string
}

// Overhead is the IOPS of one load: by round, then in the order of Ways.
type Overhead struct {
	Depth  int         `json:"qd"`
	Rounds [][]float64 `json:"iops"`
}

// Report is what Measure has found. Its JSON form is that of `vmlab tracebench --json`.
type Report struct {
	Accel   string     `json:"accel"` // tcg: the guest's CPU is emulated
	Rounds  int        `json:"rounds"`
	Seconds float64    `json:"seconds"` // of each measurement
	Ways    []string   `json:"ways"`
	Results []Overhead `json:"results"`
}

// Measure boots a guest and has fio run beside each of Ways in turn, rounds times. say is told what is being done.
func Measure(ctx context.Context, lab *vmlab.Lab, rounds int, runtime time.Duration, say func(string)) (*Report, error) {
	accel, _, err := lab.Accel(ctx)
	if err != nil {
		return nil, err
	}
	report := &Report{Accel: accel, Rounds: rounds, Seconds: runtime.Seconds()}
	for _, w := range Ways {
		report.Ways = append(report.Ways, w.Name)
	}
	err = boot(ctx, lab, 1, say, func(r *rig) error {
		if _, err := r.fio(ctx, Way{}, 1, time.Second); err != nil { // what is slow only once
			return err
		}
		for _, depth := range Depths {
			o := Overhead{Depth: depth}
			for round := range rounds {
				figures := make([]float64, len(Ways))
				for k := range Ways {
					i := (k + round) % len(Ways) // nobody comes always first
					if round%2 == 1 {
						i = len(Ways) - 1 - i
					}
					say(fmt.Sprintf("queue depth %d: round %d of %d, beside %s", depth, round+1, rounds, Ways[i].Name))
					if figures[i], err = r.fio(ctx, Ways[i], depth, runtime); err != nil {
						return fmt.Errorf("beside %s: %w", Ways[i].Name, err)
					}
				}
				o.Rounds = append(o.Rounds, figures)
			}
			report.Results = append(report.Results, o)
		}
		return nil
	})
	return report, err
}

// fio returns the IOPS of a load beside a command, which is ended by Ctrl-C.
func (r *rig) fio(ctx context.Context, w Way, depth int, runtime time.Duration) (float64, error) {
	fio := fmt.Sprintf("fio --name=x --filename=%s --rw=randread --bs=4k --iodepth=%d --ioengine=libaio --direct=1 --time_based --runtime=%d --output-format=json", r.disks[0], depth, max(1, int(runtime.Seconds())))
	if w.Command != "" {
		fio = fmt.Sprintf(`rm -f /dev/shm/record
%s >/tmp/out 2>/tmp/err & trace=$!
sleep 1.5
kill -0 $trace || { cat /tmp/err >&2; exit 1; }
%s || exit 1
kill -INT $trace; wait $trace || { cat /tmp/err >&2; exit 1; }`, w.Command, fio)
	}
	printed, err := r.exec(ctx, time.Minute+3*runtime, fio)
	if err != nil {
		return 0, err
	}
	return parseFio(printed)
}

func parseFio(printed string) (float64, error) {
	b := []byte(printed)
	var out struct {
		Jobs []struct {
			Error int
			Read  struct{ IOPS float64 }
		}
	}
	if err := json.Unmarshal(b[max(0, bytes.IndexByte(b, '{')):], &out); err != nil || len(out.Jobs) != 1 || out.Jobs[0].Error != 0 || out.Jobs[0].Read.IOPS == 0 {
		return 0, fmt.Errorf("fio: %v: %s", err, tail(printed))
	}
	return out.Jobs[0].Read.IOPS, nil
}

// Ratios returns, for each way, the median of the rounds' IOPS, that of its ratios to the first way of the same round, and the least and the greatest of these.
func (o *Overhead) Ratios(way int) (iops, ratio, least, most float64) {
	var all, ratios []float64
	for _, r := range o.Rounds {
		all = append(all, r[way])
		ratios = append(ratios, r[way]/r[0])
	}
	slices.Sort(all)
	slices.Sort(ratios)
	middle := func(v []float64) float64 { return (v[(len(v)-1)/2] + v[len(v)/2]) / 2 }
	return middle(all), middle(ratios), ratios[0], ratios[len(ratios)-1]
}

// Table is the report for people.
func (r *Report) Table() string {
	t := text.Table{Head: []string{"queue depth", "beside", "IOPS", "of nothing", "least", "most"}, Left: map[int]bool{1: true}}
	for i := range r.Results {
		for way, name := range r.Ways {
			iops, ratio, least, most := r.Results[i].Ratios(way)
			cells := []string{"", name, text.Count(iops), "", "", ""}
			if way == 0 {
				cells[0] = fmt.Sprint(r.Results[i].Depth)
			} else {
				cells[3], cells[4], cells[5] = fmt.Sprintf("%.3f", ratio), fmt.Sprintf("%.3f", least), fmt.Sprintf("%.3f", most)
			}
			t.Add(cells...)
		}
	}
	return t.String()
}
