package cli

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

type grammar struct {
	Work    workCommand    `cmd:"" help:"Do it."`
	Version VersionCommand `cmd:"" help:"Print the version."`
}

type workCommand struct {
	How string `default:"well" enum:"well,badly,wrongly,slowly" help:"How."`
}

func (w workCommand) Run(ctx context.Context, out *Output) error {
	switch w.How {
	case "badly":
		return errors.Join(errors.New("first line"), errors.New("second line"))
	case "wrongly":
		return Usagef("no such %s", "thing")
	case "slowly":
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Second):
			return errors.New("the signal did not end the context")
		}
	}
	_, err := out.Stdout.WriteString("done\n")
	return err
}

func TestRun(t *testing.T) {
	for _, c := range []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"work", OK, "done\n", ""},
		{"version", OK, "tool ", ""},
		{"", OK, "Usage: tool <command>", ""},
		{"work --help", OK, "Usage: tool work", ""},
		{"work --how=badly", Failure, "", "tool: first line; second line\n"},
		{"work --how=wrongly", Usage, "", "tool: no such thing\n"},
		{"work --how=slowly", Failure, "", "tool: interrupted\n"},
		{"work --how=never", Usage, "", "see tool work --help"},
		{"hop", Usage, "", "see tool --help"},
	} {
		dir := t.TempDir()
		stdout, err1 := os.Create(dir + "/out")
		stderr, err2 := os.Create(dir + "/err")
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		code := Program{Name: "tool", Description: "A tool.", Grammar: &grammar{}, Commands: true}.Run(strings.Fields(c.args), &Output{stdout, stderr})
		stdout.Close()
		stderr.Close()
		o, err1 := os.ReadFile(dir + "/out")
		e, err2 := os.ReadFile(dir + "/err")
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if code != c.code || !strings.Contains(string(o), c.stdout) || !strings.Contains(string(e), c.stderr) || (c.stderr == "") != (len(e) == 0) {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", c.args, code, o, e)
		}
		if strings.Count(string(e), "\n") > 1 {
			t.Errorf("%q: more than one line: %q", c.args, e)
		}
	}
}
