// Command agent runs in the guests of the lab: it takes requests from a virtio-serial port, runs commands, and reads
// and writes files.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab/internal/wire"
)

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "vmlab agent:", err)
		os.Exit(1)
	}
}

func serve() error {
	port, err := wire.OpenPort(wire.Port, 30*time.Second)
	if err != nil {
		return err
	}
	a := &agent{port: port}
	// A restart may have cut a line short: end it.
	if _, err := port.WriteString("\n"); err != nil {
		return err
	}
	a.reply(wire.Reply{})
	lines := bufio.NewScanner(port)
	lines.Buffer(make([]byte, 64<<10), wire.MaxLine)
	for lines.Scan() {
		var q wire.Request
		if json.Unmarshal(lines.Bytes(), &q) != nil || q.ID == 0 {
			continue
		}
		go func() { a.reply(answer(q)) }()
	}
	return errors.Join(errors.New("the port has ended"), lines.Err())
}

type agent struct {
	mu   sync.Mutex // one line at a time
	port *os.File
}

func (a *agent) reply(r wire.Reply) {
	b, err := json.Marshal(r)
	if err != nil {
		b = fmt.Appendf(nil, `{"id":%d,"error":%q}`, r.ID, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err := a.port.Write(append(b, '\n')); err != nil {
		fmt.Fprintln(os.Stderr, "vmlab agent:", err)
		os.Exit(1) // init starts a new one
	}
}

func answer(q wire.Request) wire.Reply {
	r := wire.Reply{ID: q.ID}
	var err error
	switch q.Op {
	case "run":
		run(q, &r)
	case "poweroff": // whatever init there is; there is no answer
		syscall.Sync()
		err = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	case "read":
		r.Data, err = os.ReadFile(q.Path)
	case "write":
		if err = os.MkdirAll(filepath.Dir(q.Path), 0o755); err == nil {
			err = os.WriteFile(q.Path, q.Data, os.FileMode(q.Mode))
		}
	default:
		err = fmt.Errorf("unknown request %q", q.Op)
	}
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

// run gives the command a session of its own, which is killed at the limit.
func run(q wire.Request, r *wire.Reply) {
	cmd := exec.Command("/bin/sh", "-c", q.Command)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(q.Data), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second // what it leaves in the background may hold its output open
	if err := cmd.Start(); err != nil {
		r.Exit, r.Error = -1, err.Error()
		return
	}
	kill := time.AfterFunc(q.Limit, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err := cmd.Wait()
	inTime := kill.Stop()
	r.Exit, r.Stdout, r.Stderr = cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.Bytes()
	switch {
	case !inTime:
		r.Error = fmt.Sprintf("killed after %v", q.Limit)
	case r.Exit < 0:
		r.Error = err.Error()
	}
}
