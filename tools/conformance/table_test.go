package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/tools/conformance/suite"
)

// TestQEMUTable holds docs/conformance.md to what TestInAGuest finds: it prints the table that is to stand there.
func TestQEMUTable(t *testing.T) {
	const begin, end = "<!-- qemu: made from tools/conformance/qemu_test.go -->\n", "<!-- end -->"
	doc, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(doc), begin)
	have, _, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("docs/conformance.md has no %q", begin)
	}
	cases, err := suite.Cases("")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("| case | the specification | QEMU |\n|---|---|---|\n")
	known := 0
	for _, c := range cases {
		if what, ok := qemuFails[c.ID]; ok {
			known++
			fmt.Fprintf(&b, "| `%s` | %s (%s) | %s |\n", c.ID, c.Text, c.Ref, what)
		}
	}
	if known != len(qemuFails) {
		t.Errorf("qemuFails names %d cases, %d of them exist", len(qemuFails), known)
	}
	if have != b.String() {
		t.Errorf("the table of docs/conformance.md is to be:\n%s", b.String())
	}
}
