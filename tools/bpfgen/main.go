// Command bpfgen compiles ebpf/bpf's C and writes the Go that goes with it, by bpf2go and the lab's pinned clang: go generate runs it in ebpf/bpf.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := generate(ctx, ".", ".", os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bpfgen:", err)
		os.Exit(1)
	}
}

// library is what the programs are loaded with; bpf2go is of its version.
const library = "github.com/cilium/ebpf"

// generate compiles dir's trace.bpf.c and writes objects and Go into out, which is relative to dir or absolute.
func generate(ctx context.Context, dir, out string, log io.Writer) error {
	clang, err := vmlab.OpenToolchain(ctx, log)
	if err != nil {
		return err
	}
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", library)
	list.Dir = dir
	list.Stderr = log
	version, err := list.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(list.Args, " "), err)
	}
	cmd := exec.CommandContext(ctx, "go", "run", library+"/cmd/bpf2go@"+strings.TrimSpace(string(version)),
		"-cc", clang.Clang(), "-strip", clang.Strip(), "-target", "amd64,arm64", "-go-package", "bpf", "-output-dir", out, "-type", "event", "-type", "counter",
		"Trace", "trace.bpf.c", "--",
		"-mcpu=v3", "-nostdinc", "-I", clang.Include(),
		"-ffile-prefix-map="+clang.Include()+"=.", // where the cache is must not show
		"-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers")
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("bpf2go: %w", err)
	}
	return nil
}
