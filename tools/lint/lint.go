// Package lint holds the checks of this repository that no general linter knows: which room may import
// which, where unsafe may stand, that every doorbell rule has its test, and a few habits. They run as
// ordinary Go tests; each check takes the files of a tree and returns what is wrong with them.
//
// It does not format, vet or analyse code: make lint runs gofmt, go vet and staticcheck for that.
package lint

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const (
	// Module is the import path that the rooms stand below.
	Module = "github.com/shadowbell/shadowbell"
	// MaxLines is how long a Go file that nobody generated may be.
	MaxLines = 600
)

// A File is one file of the tree. Path is slash-separated and relative to the top; AST is nil unless it is Go.
type File struct {
	Path   string
	Source []byte
	AST    *ast.File
	Fset   *token.FileSet
}

// NewFile parses src if p names a Go file. The error is the parser's.
func NewFile(p string, src []byte) (File, error) {
	f := File{Path: p, Source: src, Fset: token.NewFileSet()}
	if path.Ext(p) != ".go" {
		return f, nil
	}
	var err error
	f.AST, err = parser.ParseFile(f.Fset, p, src, parser.ParseComments|parser.SkipObjectResolution)
	return f, err
}

func (f File) isTest() bool { return strings.HasSuffix(f.Path, "_test.go") }

func (f File) at(n ast.Node) string {
	p := f.Fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

func room(p string) string {
	first, _, _ := strings.Cut(p, "/")
	return first
}

// mayImport says which rooms of the module the code of a room may import.
var mayImport = map[string][]string{
	"shared":   {"shared"},
	"guestdrv": {"shared", "guestdrv"},
	"hostmed":  {"shared", "hostmed"},
	"ebpf":     {"shared", "ebpf"},
	"tools":    {"shared", "guestdrv", "hostmed", "ebpf", "tools"},
}

// What shared may import beside the standard library, and what its tests may import beside that.
var (
	sharedModules     = []string{"golang.org/x/sys"}
	sharedTestModules = []string{"pgregory.net/rapid", "go.uber.org/goleak"}
)

// Imports checks the import law: shared imports the standard library and golang.org/x/sys; guestdrv, hostmed
// and ebpf import shared and never each other; tools may import all. Tests of the three may cross over.
func Imports(files []File) (problems []string) {
	for _, f := range files {
		if f.AST == nil {
			continue
		}
		from := room(f.Path)
		allowed, ok := mayImport[from]
		if !ok {
			problems = append(problems, fmt.Sprintf("%s: Go code outside the rooms", f.Path))
			continue
		}
		for _, spec := range f.AST.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			to, ours := strings.CutPrefix(imported, Module+"/")
			switch {
			case ours && from != "shared" && f.isTest():
			case ours:
				if !slices.Contains(allowed, room(to)) {
					problems = append(problems, fmt.Sprintf("%s: %s imports %s", f.at(spec), from, to))
				}
			case from == "shared" && !isStandard(imported):
				if !within(imported, sharedModules) && !(f.isTest() && within(imported, sharedTestModules)) {
					problems = append(problems, fmt.Sprintf("%s: shared imports %s", f.at(spec), imported))
				}
			}
		}
	}
	return problems
}

// isStandard uses that the first element of a module path has a dot in it.
func isStandard(imported string) bool { return !strings.Contains(room(imported), ".") }

func within(imported string, modules []string) bool {
	return slices.ContainsFunc(modules, func(m string) bool {
		return imported == m || strings.HasPrefix(imported, m+"/")
	})
}

// Unsafe checks that unsafe is imported only in *_unsafe.go and *_unsafe_test.go, and cgo nowhere.
func Unsafe(files []File) (problems []string) {
	for _, f := range files {
		if f.AST == nil {
			continue
		}
		named := strings.HasSuffix(f.Path, "_unsafe.go") || strings.HasSuffix(f.Path, "_unsafe_test.go")
		for _, spec := range f.AST.Imports {
			switch {
			case spec.Path.Value == `"unsafe"` && !named:
				problems = append(problems, fmt.Sprintf("%s: unsafe in a file that is not *_unsafe.go", f.at(spec)))
			case spec.Path.Value == `"C"`:
				problems = append(problems, fmt.Sprintf("%s: cgo", f.at(spec)))
			}
		}
	}
	return problems
}

// PackageNames checks that no package is named after nothing in particular.
func PackageNames(files []File) (problems []string) {
	for _, f := range files {
		if f.AST == nil {
			continue
		}
		name := strings.TrimSuffix(f.AST.Name.Name, "_test")
		for _, n := range []string{name, path.Base(path.Dir(f.Path))} {
			switch n {
			case "util", "utils", "common", "helper", "helpers":
				problems = append(problems, fmt.Sprintf("%s: package %s", f.at(f.AST.Name), n))
			}
		}
	}
	return slices.Compact(problems)
}

var (
	ruleTest  = regexp.MustCompile(`^TestRule([0-9]{2})_[A-Z][A-Za-z0-9_]*$`)
	citesRule = regexp.MustCompile(`^TestRule_?[0-9]`)
)

// RuleTests checks that a test that cites a rule by number is called TestRuleNN_Name, and that every rule has
// one, apart from those in later, which gives the reason why a rule has no test yet.
func RuleTests(files []File, later map[int]string) (problems []string) {
	tested := make(map[int]string)
	for _, f := range files {
		if f.AST == nil || !f.isTest() {
			continue
		}
		for _, decl := range f.AST.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !citesRule.MatchString(fn.Name.Name) {
				continue
			}
			m := ruleTest.FindStringSubmatch(fn.Name.Name)
			if m == nil {
				problems = append(problems, fmt.Sprintf("%s: %s is not TestRuleNN_Name", f.at(fn), fn.Name.Name))
				continue
			}
			n, _ := strconv.Atoi(m[1])
			if n < 1 || n > len(Rules) {
				problems = append(problems, fmt.Sprintf("%s: %s: the rules are R1 to R%d", f.at(fn), fn.Name.Name, len(Rules)))
				continue
			}
			tested[n] = f.at(fn)
		}
	}
	for n := 1; n <= len(Rules); n++ {
		where, has := tested[n]
		_, excused := later[n]
		switch {
		case has && excused:
			problems = append(problems, fmt.Sprintf("R%d is listed as later work, but has a test: %s", n, where))
		case !has && !excused:
			problems = append(problems, fmt.Sprintf("R%d has no test: TestRule%02d_… is missing", n, n))
		}
	}
	return problems
}

// FileLengths checks that no Go file is longer than MaxLines, unless it is generated.
func FileLengths(files []File) (problems []string) {
	for _, f := range files {
		if f.AST == nil || ast.IsGenerated(f.AST) {
			continue
		}
		if n := bytes.Count(f.Source, []byte("\n")); n > MaxLines {
			problems = append(problems, fmt.Sprintf("%s: %d lines, at most %d", f.Path, n, MaxLines))
		}
	}
	return problems
}

// localPath matches a path that exists on one machine only. What stands before it must not be part of a
// longer path or of an address.
var localPath = regexp.MustCompile(`(?:^|[^A-Za-z0-9_.~/)}-])(/(?:root|work)/|/home/[A-Za-z<$])`)

// LocalPaths checks that no text file cites an absolute path of one machine.
func LocalPaths(files []File) (problems []string) {
	for _, f := range files {
		if bytes.IndexByte(f.Source, 0) >= 0 {
			continue
		}
		for i, line := range bytes.Split(f.Source, []byte("\n")) {
			if m := localPath.FindSubmatch(line); m != nil {
				problems = append(problems, fmt.Sprintf("%s:%d: path of one machine: %s…", f.Path, i+1, m[1]))
			}
		}
	}
	return problems
}

// neverRestarted are the calls that a signal ends with EINTR even under SA_RESTART, with which the Go runtime installs its handlers
// (signal(7)); its preemption is such a signal.
var neverRestarted = []string{"ClockNanosleep", "EpollWait", "Nanosleep", "Poll", "Ppoll", "Pselect", "Select"}

// Interrupts checks that a function which looks at the error of such a call knows EINTR. A timeout of 0 does not help.
func Interrupts(files []File) (problems []string) {
	for _, f := range files {
		if f.AST == nil {
			continue
		}
		for _, d := range f.AST.Decls {
			knows := false
			var calls []*ast.SelectorExpr
			dropped := make(map[ast.Node]bool)
			ast.Inspect(d, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.AssignStmt:
					last, ok := n.Lhs[len(n.Lhs)-1].(*ast.Ident)
					dropped[n.Rhs[len(n.Rhs)-1]] = ok && last.Name == "_"
				case *ast.CallExpr:
					if s, ok := n.Fun.(*ast.SelectorExpr); ok && isUnix(s) && slices.Contains(neverRestarted, s.Sel.Name) && !dropped[n] {
						calls = append(calls, s)
					}
				case *ast.Ident:
					knows = knows || n.Name == "EINTR"
				}
				return true
			})
			for _, c := range calls {
				if !knows {
					problems = append(problems, fmt.Sprintf("%s: unix.%s, and its function does not know EINTR", f.at(c), c.Sel.Name))
				}
			}
		}
	}
	return problems
}

func isUnix(s *ast.SelectorExpr) bool {
	x, ok := s.X.(*ast.Ident)
	return ok && x.Name == "unix"
}

var testNamed = regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]*)`")

// DocTests checks that tests which the documentation names in backquotes exist, under that name.
func DocTests(files []File) (problems []string) {
	known := make(map[string]bool)
	for _, f := range files {
		if f.AST == nil || !f.isTest() {
			continue
		}
		for _, d := range f.AST.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				known[fn.Name.Name] = true
			}
		}
	}
	for _, f := range files {
		if path.Ext(f.Path) != ".md" {
			continue
		}
		for i, line := range strings.Split(string(f.Source), "\n") {
			for _, m := range testNamed.FindAllStringSubmatch(line, -1) {
				if !known[m[1]] {
					problems = append(problems, fmt.Sprintf("%s:%d: there is no test %s", f.Path, i+1, m[1]))
				}
			}
		}
	}
	return problems
}

// raced are the folders whose tests the race stage of the Makefile runs, with -short, and in them those whose it does not.
var (
	raced    = []string{"shared/", "guestdrv/", "hostmed/", "tools/inproc/"}
	notRaced = "shared/dbbuf/model/"
)

// ShortSkips checks that no test of the race stage skips because it is to be short: the race detector would never see it.
func ShortSkips(files []File) (problems []string) {
	for _, f := range files {
		if f.AST == nil || !f.isTest() || strings.HasPrefix(f.Path, notRaced) || !slices.ContainsFunc(raced, func(r string) bool { return strings.HasPrefix(f.Path, r) }) {
			continue
		}
		ast.Inspect(f.AST, func(n ast.Node) bool {
			branch, ok := n.(*ast.IfStmt)
			if !ok || !calls(branch.Cond, "Short") {
				return true
			}
			if calls(branch.Body, "Skip") || calls(branch.Body, "Skipf") || calls(branch.Body, "SkipNow") {
				problems = append(problems, f.at(branch)+": skips with -short, with which the race stage runs")
			}
			return true
		})
	}
	return problems
}

// calls says whether there is a call of a method or function of that name in n.
func calls(n ast.Node, name string) (found bool) {
	ast.Inspect(n, func(n ast.Node) bool {
		if c, ok := n.(*ast.CallExpr); ok {
			s, ok := c.Fun.(*ast.SelectorExpr)
			found = found || ok && s.Sel.Name == name
		}
		return !found
	})
	return found
}
