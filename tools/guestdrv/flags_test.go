package main

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

func parse(t *testing.T, args string) (*grammar, error) {
	t.Helper()
	g := &grammar{}
	k, err := kong.New(g, kong.Name("guestdrv"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.Parse(strings.Fields(args))
	return g, err
}

func TestBenchFlags(t *testing.T) {
	plain := load.Config{NSID: 1, Kind: load.RandRead, Sizes: size.List{4096}, Depth: 32, Jobs: 4, Runtime: 10 * time.Second, Batch: 16}
	with := func(change func(*load.Config)) load.Config { c := plain; change(&c); return c }
	for _, c := range []struct {
		args string
		want load.Config
		mode guestdrv.DoorbellMode
		old  bool
	}{
		{"", plain, guestdrv.DoorbellsAuto, false},
		{"--doorbells mmio", plain, guestdrv.DoorbellsMMIO, false},
		{"--doorbells shadow", plain, guestdrv.DoorbellsShadow, false},
		{"--doorbells 2014", plain, guestdrv.DoorbellsShadow, true},
		{"--rw randrw --bs 512,4k --qd 128 --jobs 2 --runtime 60s --verify --nsid 3 --span 1GiB", with(func(c *load.Config) {
			c.Kind, c.Sizes, c.Depth, c.Jobs, c.Runtime, c.Verify, c.NSID, c.Span = load.RandRW, size.List{512, 4096}, 128, 2, time.Minute, true, 3, 1<<30
		}), guestdrv.DoorbellsAuto, false},
		{"--priority urgent,low --weights 8:4:1", with(func(c *load.Config) {
			c.Priorities = []guestdrv.Priority{guestdrv.PriorityUrgent, guestdrv.PriorityLow}
		}), guestdrv.DoorbellsAuto, false},
		{"--rate 500 --every 20ms", with(func(c *load.Config) { c.Rate = 500 }), guestdrv.DoorbellsAuto, false},
		{"--cpus 0 --poll --batch 1 --fill", with(func(c *load.Config) {
			c.CPUs, c.Poll, c.Batch, c.Fill = []int{0}, true, 1, true
		}), guestdrv.DoorbellsAuto, false},
	} {
		g, err := parse(t, "bench vfio-user:/s "+c.args)
		if err != nil {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		got := g.Bench.config()
		o := g.Bench.options(got)
		if !reflect.DeepEqual(got, c.want) || o.Doorbells != c.mode || o.Vendor2014 != c.old {
			t.Errorf("%s: %+v, doorbells %v, 2014 %v; want %+v", c.args, got, o.Doorbells, o.Vendor2014, c.want)
		}
	}
}

func TestFlagsThatAreWrong(t *testing.T) {
	for args, says := range map[string]string{
		"bench":                          "<device>",
		"bench d --rw hop":               "must be one of",
		"bench d --bs 0":                 "size 0",
		"bench d --bs 4q":                "unknown unit",
		"bench d --qd 0":                 "at least one command",
		"bench d --qd 5000":              "1 to 4095",
		"bench d --jobs 0":               "at least one job",
		"bench d --runtime 0s":           "more than 0",
		"bench d --runtime ten":          "duration",
		"bench d --doorbells bell":       "must be one of",
		"bench d --cpus 0,0":             "twice",
		"bench d --batch 0":              "at least one command",
		"bench d --batch 99":             "1 to 16",
		"bench d --nsid 0":               "counted from 1",
		"bench d --poll --spin off":      "exclude each other",
		"bench d --priority top":         "must be one of",
		"bench d --weights 1:2:3":        "without --priority",
		"bench d --weights 1:2":          "8:4:1",
		"bench d --weights 1:2:257":      "1 to 256",
		"bench d --every=-1s":            "negative",
		"read d --offset -1":             "",
		"read d --length x":              "no number",
		"identify d --sandbox sometimes": "must be one of",
	} {
		_, err := parse(t, args)
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want one line that says %q", args, err, says)
		}
	}
}

func TestResolve(t *testing.T) {
	ns := newMemory(10, 512) // 5 KiB
	length := func(n size.Bytes) *size.Bytes { return &n }
	for _, c := range []struct {
		r    rangeFlags
		have int64
		want int64
		says string
	}{
		{rangeFlags{}, -1, -1, ""},
		{rangeFlags{Offset: 5120}, -1, -1, ""},
		{rangeFlags{Offset: 100, Length: length(5020)}, -1, 5020, ""},
		{rangeFlags{}, 77, 77, ""},
		{rangeFlags{Length: length(7)}, 77, 7, ""},
		{rangeFlags{Offset: 5121}, -1, 0, "beyond the end"},
		{rangeFlags{Offset: 1 << 63}, -1, 0, "beyond the end"},
		{rangeFlags{Offset: 101, Length: length(5020)}, -1, 0, "do not fit"},
		{rangeFlags{Length: length(1 << 63)}, -1, 0, "do not fit"},
		{rangeFlags{Length: length(78)}, 77, 0, "the input has only 77 B"},
		{rangeFlags{Offset: 512}, 5120, 0, "do not fit"},
	} {
		got, err := c.r.resolve(ns, c.have)
		if c.says == "" && (err != nil || got != c.want) || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%+v, input %d: %d, %v; want %d %q", c.r, c.have, got, err, c.want, c.says)
		}
	}
}
