package text

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestNumbers(t *testing.T) {
	for want, got := range map[string]string{
		"0": Count(0.4), "999": Count(999), "1,000": Count(999.6), "12,345,678": Count(12345678), "-1,000": Count(-1000),
		"2.00": Ratio(2), "0.031": Ratio(0.0312), "0.00012": Ratio(0.000123), "0.50": Ratio(0.5), "<1e-9": Ratio(1e-12), "1.00": Ratio(1),
		"690 ns": Duration(690), "3.92 us": Duration(3921), "12.3 us": Duration(12345), "123 us": Duration(123456), "1.20 ms": Duration(1200 * time.Microsecond),
		"2.50 s": Duration(2500 * time.Millisecond), "5000 s": Duration(5000 * time.Second),
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestTable(t *testing.T) {
	tab := Table{Head: []string{"doorbells", "IOPS", "what"}, Left: map[int]bool{2: true}}
	tab.Add("trap", "300,000", "all messages")
	tab.Add("shadow", "8,000,000")
	const want = "" +
		"  doorbells       IOPS  what\n" +
		"  ----------------------------------\n" +
		"  trap         300,000  all messages\n" +
		"  shadow     8,000,000\n"
	if got := tab.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestBars(t *testing.T) {
	bars := []Bar{{"trap", 1, "1"}, {"shadow", 16, "16"}, {"none", 0, "0"}, {"tiny", 0.001, "0.001"}}
	const plain = "" +
		"  trap    # 1\n" +
		"  shadow  ################ 16\n" +
		"  none     0\n" +
		"  tiny    | 0.001\n"
	if got := Bars(bars, 16, false); got != plain {
		t.Errorf("got\n%swant\n%s", got, plain)
	}
	const fine = "" +
		"  trap    ▌ 1\n" +
		"  shadow  ████████ 16\n" +
		"  none     0\n" +
		"  tiny    ▎ 0.001\n"
	if got := Bars(bars, 8, true); got != fine {
		t.Errorf("got\n%swant\n%s", got, fine)
	}
	if got := Bars([]Bar{{"a", 0, "-"}}, 8, true); got != "  a   -\n" {
		t.Errorf("got %q", got)
	}
}

func TestMeter(t *testing.T) {
	for want, got := range map[string]string{
		"[###############...............]  50%  5 of 10  2 s left": Meter(5, 10, "5 of 10", 2*time.Second, 80),
		"[..............................]   0%  0 of 10":           Meter(0, 10, "0 of 10", 2*time.Second, 80),
		"[##############################] 100%  x":                 Meter(11, 10, "x", 2*time.Second, 80),
		"[#####.....]  50%  x":                                     Meter(1, 2, "x", 0, 21),
		"[]   0%  x":                                               Meter(1, 0, "x", 0, 0),
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestLineIsSilentOnAFile: what is redirected gets no control characters.
func TestLineIsSilentOnAFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := NewLine(f, 0)
	l.Set("working")
	l.Clear()
	if st, err := f.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("%v bytes, %v", st.Size(), err)
	}
	if HasUnicode(f) || Width(f) != 80 {
		t.Error("a file is not a terminal")
	}
}
