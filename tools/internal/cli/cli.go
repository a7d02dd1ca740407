// Package cli runs a program from its command line: it parses, gives the command a context that ends with the first
// signal, prints an error as one line, and chooses the exit code.
package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
)

// Exit codes of all programs.
const (
	OK      = 0
	Failure = 1 // something went wrong on the way, or a result is not what it had to be
	Usage   = 2 // the command line, or what it names, is wrong; nothing was done
)

// Program is a program and its command line as kong reads it. The Run method of a command may take a context.Context
// and an *Output.
type Program struct {
	Name        string
	Description string
	Grammar     any  // pointer to the struct of flags
	Commands    bool // Grammar has commands: without any, the help is printed
}

// Output is where a command prints.
type Output struct{ Stdout, Stderr *os.File }

// UsageError is what the user can put right; nothing was done.
type UsageError struct{ Err error }

func (e UsageError) Error() string { return e.Err.Error() }
func (e UsageError) Unwrap() error { return e.Err }

// Usagef returns a UsageError.
func Usagef(format string, args ...any) error { return UsageError{fmt.Errorf(format, args...)} }

// Run parses args, runs the command and returns the exit code. The first SIGINT or SIGTERM ends the command's context, the
// second the process.
func (p Program) Run(args []string, out *Output) int {
	exited := -1 // kong prints the help and then calls exit
	parser, err := kong.New(p.Grammar,
		kong.Name(p.Name), kong.Description(p.Description),
		kong.Writers(out.Stdout, out.Stderr), kong.Exit(func(code int) { exited = code }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, FlagsLast: true, WrapUpperBound: 110}),
	)
	if err != nil {
		return p.fail(out, err)
	}
	if len(args) == 0 && p.Commands {
		args = []string{"--help"}
	}
	command, err := parser.Parse(args)
	if exited >= 0 {
		return exited
	}
	if err != nil {
		see := p.Name + " --help"
		if pe := (*kong.ParseError)(nil); errors.As(err, &pe) && pe.Context != nil && pe.Context.Selected() != nil {
			see = p.Name + " " + pe.Context.Selected().Name + " --help"
		}
		return p.fail(out, Usagef("%w (see %s)", err, see))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// Whoever presses Ctrl-C again means it. A second SIGTERM means nothing: timeout(1) and others send it to the process and to its
	// group, and the work of ending in order goes on.
	context.AfterFunc(ctx, func() { signal.Reset(syscall.SIGINT) })
	command.BindTo(ctx, (*context.Context)(nil))
	err = command.Run(out)
	if err == nil {
		return OK
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	return p.fail(out, err)
}

func (p Program) fail(out *Output, err error) int {
	fmt.Fprintf(out.Stderr, "%s: %s\n", p.Name, OneLine(err))
	var u UsageError
	if errors.As(err, &u) {
		return Usage
	}
	return Failure
}

// OneLine prints err without line ends.
func OneLine(err error) string {
	return strings.Join(strings.Split(strings.TrimSpace(err.Error()), "\n"), "; ")
}

// VersionCommand is `NAME version`.
type VersionCommand struct{}

// Run prints the version of the module, or the commit that the program was built from.
func (VersionCommand) Run(k *kong.Kong, out *Output) error {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
	}
	_, err := fmt.Fprintf(out.Stdout, "%s %s %s %s/%s\n", k.Model.Name, version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
