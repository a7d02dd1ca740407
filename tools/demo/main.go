// Command demo is `make run`: it starts hostmed, has a sandboxed guestdrv store a real file on it and read it back,
// and then repeats the doorbell experiment of 2014. It needs no set-up, takes less than a minute
// and leaves nothing behind.
package main

import (
	"context"
	"os"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

type grammar struct {
	Bin     string        `placeholder:"DIR" help:"Where hostmed and guestdrv are. Default: they are built."`
	File    string        `env:"FILE" placeholder:"FILE" help:"The file to store. Default: a program of more than 10 MiB that is at hand."`
	Runtime time.Duration `default:"5s" placeholder:"TIME" help:"How long each measurement takes (${default})."`
}

func main() {
	p := cli.Program{Name: "demo", Description: "The whole thing in under a minute: store a file, read it back, measure the doorbells.", Grammar: &grammar{}}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

// Run shows everything.
func (g *grammar) Run(ctx context.Context, out *cli.Output) (err error) {
	d, err := newDemo(ctx, g, out)
	if err != nil {
		return err
	}
	defer d.cleanUp(&err)
	for _, step := range []func(context.Context) error{d.start, d.storeAndReadBack, d.measure} {
		if err := step(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err() // what was interrupted says so in its own words
			}
			return err
		}
	}
	return d.show()
}
