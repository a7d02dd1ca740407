package doctor

import (
	"flag"
	"os"
	"strings"
	"testing"
)

//go:generate go test -run ^TestRulesAreDocumented$ -update .

var update = flag.Bool("update", false, "write the table of docs/doctor.md anew")

// TestRulesAreDocumented holds the table to all rules, to the faults that are tested, and docs/doctor.md to the table.
func TestRulesAreDocumented(t *testing.T) {
	faults := map[string]fault{}
	for name, f := range driverFaults {
		faults[name] = f
	}
	for name, f := range deviceFaults {
		faults[name] = f.fault
	}
	if len(faults) != len(driverFaults)+len(deviceFaults) {
		t.Error("a name is given twice")
	}
	next := 1
	for _, r := range Rules {
		if r.N != 0 {
			if r.N != next && r.N != next-1 {
				t.Errorf("R%d after R%d", r.N, next-1)
			}
			next = max(next, r.N+1)
		}
		if (r.Side == "") != (r.Case == "") || r.How == "" {
			t.Errorf("%s: %+v", r.Name(), r)
		}
		for _, name := range strings.Split(r.Case, "; ") {
			if f, ok := faults[name]; r.Case != "" && (!ok || f.rule != r.Name() || f.side != r.Side) {
				t.Errorf("%s of the %s: the fault %q is %+v", r.Name(), r.Side, name, f.rule)
			}
			delete(faults, name)
		}
	}
	if next != 37 {
		t.Errorf("the table ends with R%d", next-1)
	}
	for name := range faults {
		t.Errorf("the fault %q is in no row", name)
	}
	const doc, begin, end = "../../docs/doctor.md", "<!-- rules -->\n", "<!-- end of rules -->"
	was, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(was), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table", doc)
	}
	want := head + begin + "\n" + Table() + "\n" + end + tail
	if want == string(was) {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the rules say: run make gen", doc)
	}
	if err := os.WriteFile(doc, []byte(want), 0o666); err != nil {
		t.Fatal(err)
	}
}
