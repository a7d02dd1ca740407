package lint

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
)

//go:generate go test -run ^TestSandboxTables$ -update .

// TestSandboxTables holds the end of docs/sandbox.md to the rules.
func TestSandboxTables(t *testing.T) {
	const doc = "../../docs/sandbox.md"
	const mark = "<!-- What follows is written by make gen, from guestdrv/sandbox. -->\n"
	was, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(string(was), mark)
	if !ok {
		t.Fatalf("%s has no line %q", doc, mark)
	}
	want := head + mark + sandboxTables()
	switch {
	case want == string(was):
	case !*update:
		t.Fatalf("%s is not what guestdrv/sandbox says: run make gen", doc)
	default:
		if err := os.WriteFile(doc, []byte(want), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

func sandboxTables() string {
	cell := strings.NewReplacer("|", `\|`, "\n", " ").Replace
	var b strings.Builder
	b.WriteString("\n## The rules\n\nA call is let through if it is in one of the tables that are in force, with arguments as they say; all 64 bits of each are compared.\n")
	for _, table := range sandbox.Tables() {
		fmt.Fprintf(&b, "\n### %s\n\n%s.\n\n| Call | Arguments | Why |\n|---|---|---|\n", table.Name, cell(table.What))
		for _, r := range table.Rules {
			limit := r.Limit
			if r.Errno != 0 {
				limit = "refused with " + unix.ErrnoName(r.Errno)
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.Name, cell(limit), cell(r.Why))
		}
	}
	b.WriteString("\n### Limits\n\n| Limit | Value | Why |\n|---|---|---|\n")
	for _, l := range sandbox.Bounds() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", l.Name, cell(l.Limit), cell(l.Why))
	}
	return b.String()
}
