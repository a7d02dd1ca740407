package main

import (
	"encoding/json"
	"os"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// benchOutput is how a bench says what it has measured.
type benchOutput struct {
	JSON bool   `name:"json" help:"Print one JSON object, every round in it, instead of the table."`
	Out  string `placeholder:"FILE" help:"Write the JSON object to FILE too."`
}

// print writes report where the flags say, and table unless that is JSON.
func (o *benchOutput) print(out *cli.Output, report any, table string) error {
	b, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if o.Out != "" {
		if err := os.WriteFile(o.Out, b, 0o644); err != nil {
			return err
		}
	}
	if o.JSON {
		_, err := out.Stdout.Write(b)
		return err
	}
	_, err = out.Stdout.Write([]byte(table))
	return err
}
