package lint

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// later lists the doorbell rules whose code is still to come, with the reason. A rule that has a test must go.
var later = map[int]string{}

func TestImportLaw(t *testing.T)       { report(t, Imports(tree(t))) }
func TestUnsafe(t *testing.T)          { report(t, Unsafe(tree(t))) }
func TestPackageNames(t *testing.T)    { report(t, PackageNames(tree(t))) }
func TestEveryRuleTested(t *testing.T) { report(t, RuleTests(tree(t), later)) }
func TestFileLengths(t *testing.T)     { report(t, FileLengths(tree(t))) }
func TestLocalPaths(t *testing.T)      { report(t, LocalPaths(tree(t))) }
func TestInterrupts(t *testing.T)      { report(t, Interrupts(tree(t))) }
func TestDocTests(t *testing.T)        { report(t, DocTests(tree(t))) }
func TestShortSkips(t *testing.T)      { report(t, ShortSkips(tree(t))) }

//go:generate go test -run ^TestRuleTable$ -update .

var update = flag.Bool("update", false, "write docs/doorbell-rules.md anew")

// TestRuleTable holds docs/doorbell-rules.md to the rules and their tests.
func TestRuleTable(t *testing.T) {
	const doc = "../../docs/doorbell-rules.md"
	was, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(string(was), "\n## ")
	if !ok {
		t.Fatalf("%s has no table", doc)
	}
	want := head + RuleTable(tree(t))
	if want == string(was) {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the tests say: run make gen", doc)
	}
	if err := os.WriteFile(doc, []byte(want), 0o666); err != nil {
		t.Fatal(err)
	}
}

func report(t *testing.T, problems []string) {
	t.Helper()
	for _, p := range problems {
		t.Error(p)
	}
}

var loaded []File

// tree reads all files of the repository: those that git tracks or would, where git can say.
func tree(t *testing.T) []File {
	t.Helper()
	if loaded != nil {
		return loaded
	}
	top, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	known := gitFiles(top)
	err = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // went away under us
		}
		if err != nil {
			return err
		}
		rel := filepath.ToSlash(strings.TrimPrefix(strings.TrimPrefix(p, top), string(filepath.Separator)))
		if d.IsDir() {
			if rel == ".git" || rel == "bin" {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() || known != nil && !known[rel] {
			return nil
		}
		src, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		f, err := NewFile(rel, src)
		if err != nil {
			return err
		}
		loaded = append(loaded, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(loaded) < 10 {
		t.Fatalf("only %d files below %s: not the repository", len(loaded), top)
	}
	return loaded
}

// gitFiles is nil where there is no git or no repository; then the whole tree is looked at.
func gitFiles(top string) map[string]bool {
	cmd := exec.Command("git", "-C", top, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	out, err := cmd.Output()
	if err != nil {
		return nil
	}
	known := make(map[string]bool)
	for name := range strings.SplitSeq(string(out), "\x00") {
		known[name] = true
	}
	return known
}

// TestChecksBite gives every check a tree that it must not pass, and one beside it that it must.
func TestChecksBite(t *testing.T) {
	ours := func(p string) string { return `import _ "` + Module + "/" + p + `"` }
	root := "/ro" + "ot/x" // in two parts, or this file would fail its own check
	work := "/wo" + "rk/x"
	home := "/ho" + "me/joe"
	rules := func(files []File) []string {
		all := make(map[int]string)
		for n := 2; n <= len(Rules); n++ {
			all[n] = "not in this tree"
		}
		return RuleTests(files, all)
	}
	const ruleOne = "package p\nfunc TestRule01_X(t *testing.T) {}\n"

	for _, c := range []struct {
		name  string
		check func([]File) []string
		path  string
		src   string
		want  string // "" : passes
	}{
		{"shared imports shared", Imports, "shared/a/a.go", "package a\n" + ours("shared/b"), ""},
		{"shared imports std", Imports, "shared/a/a.go", `package a; import _ "net/http"`, ""},
		{"shared imports x/sys", Imports, "shared/a/a.go", `package a; import _ "golang.org/x/sys/unix"`, ""},
		{"shared imports hostmed", Imports, "shared/a/a.go", "package a\n" + ours("hostmed"), "shared imports hostmed"},
		{"shared test imports hostmed", Imports, "shared/a/a_test.go", "package a\n" + ours("hostmed"), "shared imports hostmed"},
		{"shared imports x/sync", Imports, "shared/a/a.go", `package a; import _ "golang.org/x/sync/errgroup"`, "shared imports golang.org/x/sync"},
		{"shared imports a lookalike", Imports, "shared/a/a.go", `package a; import _ "golang.org/x/system"`, "shared imports golang.org/x/system"},
		{"shared imports rapid", Imports, "shared/a/a.go", `package a; import _ "pgregory.net/rapid"`, "shared imports pgregory.net/rapid"},
		{"shared test imports rapid", Imports, "shared/a/a_test.go", `package a; import _ "pgregory.net/rapid"`, ""},
		{"guestdrv imports hostmed", Imports, "guestdrv/a.go", "package a\n" + ours("hostmed/backend"), "guestdrv imports hostmed/backend"},
		{"hostmed imports guestdrv", Imports, "hostmed/x/a.go", "package a\n" + ours("guestdrv"), "hostmed imports guestdrv"},
		{"ebpf imports hostmed", Imports, "ebpf/trace/a.go", "package a\n" + ours("hostmed"), "ebpf imports hostmed"},
		{"hostmed imports tools", Imports, "hostmed/a.go", "package a\n" + ours("tools/bench"), "hostmed imports tools"},
		{"guestdrv test imports hostmed", Imports, "guestdrv/a_test.go", "package a\n" + ours("hostmed"), ""},
		{"hostmed imports others", Imports, "hostmed/a.go", `package a; import _ "github.com/hashicorp/go-hclog"`, ""},
		{"tools import both", Imports, "tools/demo/a.go", "package a\n" + ours("hostmed") + "\n" + ours("guestdrv"), ""},
		{"no room", Imports, "extra/a.go", "package a", "outside the rooms"},

		{"unsafe", Unsafe, "shared/a/a.go", `package a; import "unsafe"`, "unsafe in a file"},
		{"unsafe test", Unsafe, "shared/a/a_test.go", `package a; import "unsafe"`, "unsafe in a file"},
		{"unsafe, named", Unsafe, "shared/a/a_unsafe.go", `package a; import "unsafe"`, ""},
		{"unsafe test, named", Unsafe, "shared/a/a_unsafe_test.go", `package a; import "unsafe"`, ""},
		{"cgo", Unsafe, "shared/a/a_unsafe.go", `package a; import "C"`, "cgo"},

		{"short skips", ShortSkips, "shared/a/a_test.go", `package a; func TestX(t *testing.T) { if testing.Short() { t.Skip("x") } }`, "skips with -short"},
		{"short and more skips", ShortSkips, "tools/inproc/a_test.go", `package a; func TestX(t *testing.T) { if slow && testing.Short() { if x { t.Skipf("x") } } }`, "skips with -short"},
		{"short is less", ShortSkips, "shared/a/a_test.go", `package a; func TestX(t *testing.T) { if testing.Short() { n = 1 } }`, ""},
		{"skips for something else", ShortSkips, "guestdrv/a_test.go", `package a; func TestX(t *testing.T) { if !there { t.Skip("x") } }`, ""},
		{"short skips where nothing races", ShortSkips, "tools/demo/a_test.go", `package a; func TestX(t *testing.T) { if testing.Short() { t.Skip("x") } }`, ""},
		{"short skips in the models", ShortSkips, "shared/dbbuf/model/a_test.go", `package a; func TestX(t *testing.T) { if testing.Short() { t.Skip("x") } }`, ""},

		{"package util", PackageNames, "shared/a/a.go", "package util", "package util"},
		{"folder common", PackageNames, "shared/common/a.go", "package a", "package common"},
		{"package helpers_test", PackageNames, "shared/a/a_test.go", "package helpers_test", "package helpers"},
		{"package utility", PackageNames, "shared/a/a.go", "package utility", ""},

		{"rule tested", rules, "shared/a/a_test.go", ruleOne, ""},
		{"rule not tested", rules, "shared/a/a_test.go", "package p", "R1 has no test"},
		{"rule not in a test file", rules, "shared/a/a.go", ruleOne, "R1 has no test"},
		{"rule of later work tested", rules, "shared/a/a_test.go", ruleOne + "func TestRule02_X(t *testing.T) {}", "R2 is listed as later work"},
		{"rule unknown", rules, "shared/a/a_test.go", ruleOne + "func TestRule37_X(t *testing.T) {}", "R1 to R36"},
		{"rule zero", rules, "shared/a/a_test.go", ruleOne + "func TestRule00_X(t *testing.T) {}", "R1 to R36"},
		{"rule misnamed", rules, "shared/a/a_test.go", ruleOne + "func TestRule2X(t *testing.T) {}", "is not TestRuleNN_Name"},
		{"test of other rules", rules, "shared/a/a_test.go", ruleOne + "func TestRulesTable(t *testing.T) {}", ""},

		{"long file", FileLengths, "shared/a/a.go", "package a\n" + strings.Repeat("\n", MaxLines), "601 lines"},
		{"file just right", FileLengths, "shared/a/a.go", "package a\n" + strings.Repeat("\n", MaxLines-1), ""},
		{"long generated file", FileLengths, "ebpf/bpf/a.go", "// Code generated by bpf2go; DO NOT EDIT.\n\npackage a\n" + strings.Repeat("\n", MaxLines), ""},

		{"path: root", LocalPaths, "docs/a.md", "see `" + root + "`", "docs/a.md:1"},
		{"path: work", LocalPaths, "Makefile", "\n" + work, "Makefile:2"},
		{"path: home", LocalPaths, "tools/a.sh", "cd " + home, "tools/a.sh:1"},
		{"path: tail of another", LocalPaths, "docs/a.md", "tools" + work + " https://example.org" + home, ""},
		{"path: below a variable", LocalPaths, "Makefile", "$(OUT)" + work + " ${OUT}" + root, ""},
		{"poll without EINTR", Interrupts, "shared/a/a_test.go", "package a\nfunc f() error { _, err := unix.Poll(nil, 0); return err }", "a_test.go:2: unix.Poll"},
		{"poll in a return", Interrupts, "shared/a/a.go", "package a\nfunc f() (int, error) { return unix.Ppoll(nil, nil, nil) }", "a.go:2: unix.Ppoll"},
		{"poll with EINTR", Interrupts, "shared/a/a.go", "package a\nfunc f() error { _, err := unix.Poll(nil, 0); if err == unix.EINTR { return nil }; return err }", ""},
		{"EINTR in another function", Interrupts, "shared/a/a.go", "package a\nvar e = unix.EINTR\nfunc f() error { _, err := unix.Poll(nil, 0); return err }", "a.go:3: unix.Poll"},
		{"poll whose error is dropped", Interrupts, "shared/a/a.go", "package a\nfunc f() int { n, _ := unix.Poll(nil, 0); return n }", ""},
		{"a poll of ours", Interrupts, "shared/a/a.go", "package a\nfunc f() error { return q.Poll(0) }", ""},

		{"test that a document names", DocTests, "docs/a.md", "\nheld by `TestX`", "docs/a.md:2: there is no test TestX"},
		{"names of other things", DocTests, "docs/a.md", "`Testing` and `TestX(t)`, TestX", ""},

		{"path: binary", LocalPaths, "a.bin", "\x00 " + root, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := NewFile(c.path, []byte(c.src))
			if err != nil {
				t.Fatal(err)
			}
			got := c.check([]File{f})
			switch {
			case c.want == "" && len(got) > 0:
				t.Errorf("found %q, want nothing", got)
			case c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)):
				t.Errorf("found %q, want one with %q", got, c.want)
			}
		})
	}
}
