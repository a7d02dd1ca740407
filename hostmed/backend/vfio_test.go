package backend

import (
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
)

// TestVFIOOperations: an Op is converted by its number.
func TestVFIOOperations(t *testing.T) {
	for op, is := range map[Op]hostnvme.Op{
		OpRead: hostnvme.Read, OpWrite: hostnvme.Write, OpFlush: hostnvme.Flush, OpWriteZeroes: hostnvme.WriteZeroes,
		OpDiscard: hostnvme.Discard, OpCommand: hostnvme.Command,
	} {
		if hostnvme.Op(op) != is {
			t.Errorf("%v is %d", op, is)
		}
	}
}

// TestVFIOSlices: slices of a namespace do not overlap, but for those that are only read.
func TestVFIOSlices(t *testing.T) {
	var c vfioClaims
	take := func(key string, from, to uint64, readOnly bool, fits bool) *vfioSlice {
		t.Helper()
		s, err := c.take(key, from, to, readOnly)
		if (err == nil) != fits {
			t.Fatalf("%s %d to %d: %v", key, from, to, err)
		}
		return s
	}
	a := take("x 1", 1000, 2000, false, true)
	take("x 1", 1999, 3000, false, false)
	take("x 1", 0, 1001, true, false)
	take("x 1", 1200, 1300, false, false)
	take("x 1", 0, 9000, false, false)
	take("x 2", 0, 9000, false, true)
	b := take("x 1", 2000, 3000, true, true)
	take("x 1", 2500, 2600, true, true)
	if err := c.grow(a, 2001); err == nil {
		t.Fatal("it grows into its neighbour")
	}
	b.release()
	take("x 1", 2000, 2500, false, true)
	a.release()
	take("x 1", 0, 2000, false, true)
}

func TestVFIOSliceOfANamespace(t *testing.T) {
	const blocks, shift = 1000, 12
	for spec, want := range map[string]string{
		"":                          "0+1000",
		"offset=4096":               "1+999",
		"offset=4096,size=8192":     "1+2",
		"offset=1M":                 "256+744",
		"size=4096000":              "0+1000",
		"offset=512":                "multiple",
		"size=512":                  "multiple",
		"offset=4096000":            "behind its end",
		"offset=4096,size=4096000":  "at the most size=",
		"offset=4096,size=9000000M": "at the most size=",
	} {
		s := Spec{}
		for _, f := range strings.Split(spec, ",") {
			key, value, _ := strings.Cut(f, "=")
			n, _ := ParseSize(value)
			if key == "offset" {
				s.Offset = n
			} else if key == "size" {
				s.Size = n
			}
		}
		first, n, err := sliceOf(s, blocks, shift)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = FormatSize(first) + "+" + FormatSize(n)
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s", spec, got)
		}
	}
}

// TestVFIOTells: what becomes of the device is said to who opened it.
func TestVFIOTells(t *testing.T) {
	var out strings.Builder
	r, err := vfioTelling(t, Spec{}, nvmetest.Config{}, hclog.New(&hclog.LoggerOptions{Output: &out}))
	if err == nil {
		err = r.Close()
	}
	if got := out.String(); err != nil || !strings.Contains(got, "vfio: device opened") || !strings.Contains(got, "vfio: namespace closed") {
		t.Errorf("%v; the log says: %s", err, got)
	}
}
