package backend

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// optional are the interfaces that a Backend or a Queue may have beside its own, and what becomes of each under faults: either a medium with faults
// has it, by handing on to the one below, or who wants it asks what Plain returns. holds says whether one with faults has it over a medium that has.
var optional = map[string]struct {
	byPlain bool
	holds   func(b Backend, q Queue) bool
}{
	"Administered": {byPlain: true},
	"Watched":      {byPlain: true},
	"Warner":       {byPlain: true},
	"Counted":      {byPlain: true},
	"Alterable":    {holds: func(b Backend, _ Queue) bool { _, ok := b.(Alterable); return ok }},
	"Mapper":       {holds: func(b Backend, _ Queue) bool { _, ok := b.(Mapper); return ok }},
	"Sharer":       {holds: func(b Backend, _ Queue) bool { _, ok := b.(Sharer); return ok }},
	"Pinner":       {holds: func(b Backend, _ Queue) bool { _, ok := b.(Pinner); return ok }},
	"Poller":       {holds: func(_ Backend, q Queue) bool { p, ok := q.(Poller); return ok && p.Polled() }},
	"Keeper":       {holds: func(_ Backend, q Queue) bool { _, ok := q.(Keeper); return ok }},
}

// TestFaultsHandOn: whatever is optional of a medium is handed on by one with faults, or is asked of the plain one. An interface that is new has
// to be in the table.
func TestFaultsHandOn(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for n := range ast.Preorder(f) {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				continue
			}
			if i, ok := spec.Type.(*ast.InterfaceType); ok && spec.Name.IsExported() && slices.ContainsFunc(i.Methods.List, extends) {
				found[spec.Name.Name] = true
				if _, ok := optional[spec.Name.Name]; !ok {
					t.Errorf("%s: %s is optional, and nothing says what becomes of it under faults", name, spec.Name.Name)
				}
			}
		}
	}
	medium, err := vfioOf(t, Spec{Poll: true}, testSize, 512)
	opened(t)(medium, err)
	rules, err := parseFaults("delay=1us")
	if err != nil {
		t.Fatal(err)
	}
	for name, x := range optional {
		if !found[name] {
			t.Errorf("there is no %s", name)
		}
		if x.byPlain {
			continue
		}
		var over Alterable = medium
		if name == "Mapper" {
			over = opened(t)(Open("mem:size=1MiB")).(Alterable)
		}
		b := withFaults(over, medium.spec, rules)
		if !x.holds(b, newQueue(t, b)) {
			t.Errorf("%s is lost under faults", name)
		}
	}
	if _, ok := Plain(withFaults(medium, medium.spec, rules)).(Administered); !ok {
		t.Error("the plain medium is not Administered")
	}
}

// extends says whether a method of an interface stands for those of a Backend or a Queue.
func extends(f *ast.Field) bool {
	id, ok := f.Type.(*ast.Ident)
	return len(f.Names) == 0 && ok && (id.Name == "Backend" || id.Name == "Queue")
}

// TestPlainIsAsked: who wants what a medium with faults does not hand on asks the plain one.
func TestPlainIsAsked(t *testing.T) {
	want := regexp.MustCompile(`(.*)\.\((?:backend\.)?(\w+)\)`)
	if err := filepath.WalkDir("..", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for line := range strings.Lines(string(text)) {
			if m := want.FindStringSubmatch(line); m != nil && optional[m[2]].byPlain && !strings.Contains(m[1], "Plain(") {
				t.Errorf("%s: %s", path, strings.TrimSpace(line))
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
