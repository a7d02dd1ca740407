package backends

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// mediator is hostmed in the host.
type mediator struct {
	h       *host
	config  string // the path of its configuration
	log     string // that of its log
	pid     string // where its process ID is
	sockets []string
}

// mediate runs hostmed with a configuration file until the end of t. In the text, SOCKET0, SOCKET1, ... stand for paths of sockets.
func (h *host) mediate(t *testing.T, config string) *mediator {
	t.Helper()
	name := "/tmp/" + h.name("hostmed")
	m := &mediator{h: h, config: name + ".toml", log: name + ".log", pid: name + ".pid"}
	for i := 0; strings.Contains(config, fmt.Sprintf("SOCKET%d", i)); i++ {
		m.sockets = append(m.sockets, fmt.Sprintf("%s.%d.sock", name, i))
	}
	m.configure(t, config)
	m.start(t)
	t.Cleanup(func() {
		if h.Ended() {
			return
		}
		if t.Failed() {
			if r, err := h.Exec(context.Background(), "tail -60 "+m.log); err == nil {
				t.Logf("end of hostmed's log:\n%s", r.Stdout)
			}
		}
		m.stop(t)
	})
	return m
}

// serve is mediate with a subsystem of one controller for each of controllers, whose namespaces are the specs in it, one a line.
func (h *host) serve(t *testing.T, controllers ...string) *mediator {
	t.Helper()
	return h.mediate(t, subsystems(controllers...))
}

// subsystems is the configuration of serve.
func subsystems(controllers ...string) (config string) {
	for i, specs := range controllers {
		config += fmt.Sprintf("[[subsystem]]\n[[subsystem.controller]]\nsocket = \"SOCKET%d\"\n", i)
		for spec := range strings.Lines(specs) {
			config += fmt.Sprintf("[[subsystem.namespace]]\nspec = %q\n", strings.TrimSpace(spec))
		}
	}
	return config
}

// device is how guestdrv names controller i.
func (m *mediator) device(i int) string { return "vfio-user:" + m.sockets[i] }

// configure writes the configuration anew.
func (m *mediator) configure(t *testing.T, config string) {
	t.Helper()
	for i, s := range m.sockets {
		config = strings.ReplaceAll(config, fmt.Sprintf("SOCKET%d", i), s)
	}
	if err := m.h.WriteFile(t.Context(), m.config, []byte("log = \"info\"\n"+config), 0o600); err != nil {
		t.Fatal(err)
	}
}

// start starts hostmed, which must not run, and waits until it listens.
func (m *mediator) start(t *testing.T) {
	t.Helper()
	m.h.Run(t, fmt.Sprintf(`rm -f %s
setsid hostmed serve --config %s >>%s 2>&1 </dev/null &
echo $! > %s
until [ $(ls %s 2>/dev/null | wc -l) = %d ]; do
	kill -0 $! 2>/dev/null || { tail -5 %s >&2; exit 1; }
	sleep 0.05
done`, strings.Join(m.sockets, " "), m.config, m.log, m.pid, strings.Join(m.sockets, " "), len(m.sockets), m.log))
}

// gone waits for the end of the process.
const gone = "for n in $(seq 800); do kill -0 $(cat %[1]s) 2>/dev/null || exit 0; sleep 0.05; done; exit 1"

// kill ends hostmed with SIGKILL.
func (m *mediator) kill(t *testing.T) {
	t.Helper()
	m.h.Run(t, fmt.Sprintf("kill -9 $(cat %[1]s); "+gone, m.pid))
}

// stop ends it in order, if it runs.
func (m *mediator) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if r, err := m.h.Exec(ctx, fmt.Sprintf("kill -TERM $(cat %[1]s) 2>/dev/null || exit 0; "+gone, m.pid)); err != nil || r.Exit != 0 {
		t.Errorf("hostmed does not end: %v", err)
	}
}

// saysAfter does something and waits until one more line of the log matches a basic regular expression, and returns it.
func (m *mediator) saysAfter(t *testing.T, expression string, do func()) string {
	t.Helper()
	count := fmt.Sprintf("grep -c -- '%s' %s", expression, m.log)
	before := strings.TrimSpace(m.h.Try(t, count).Stdout)
	do()
	m.h.until(t, "hostmed does not say "+expression, fmt.Sprintf("[ $(%s) -gt %s ]", count, before))
	return m.h.Run(t, fmt.Sprintf("grep -- '%s' %s | tail -1", expression, m.log))
}

var numberInLog = regexp.MustCompile(`(\w+)=(\d+)\b`)

// numbers are those of a line of the log, by name.
func numbers(t *testing.T, line string) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	for _, m := range numberInLog.FindAllStringSubmatch(line, -1) {
		n, err := strconv.ParseUint(m[2], 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		all[m[1]] = n
	}
	return all
}

// counters are those of the only namespace.
func (m *mediator) counters(t *testing.T) map[string]uint64 {
	t.Helper()
	return numbers(t, m.saysAfter(t, "counters: .*nsid=", func() { m.h.Run(t, "kill -USR1 $(cat "+m.pid+")") }))
}

// running says whether the process is there.
func (m *mediator) running(t *testing.T) bool {
	t.Helper()
	return m.h.Try(t, "kill -0 $(cat "+m.pid+")").Exit == 0
}

// says waits until a line of the log matches a basic regular expression, and returns the last that does.
func (m *mediator) says(t *testing.T, expression string) string {
	t.Helper()
	m.h.until(t, "hostmed does not say "+expression, fmt.Sprintf("grep -q -- '%s' %s", expression, m.log))
	return m.h.Run(t, fmt.Sprintf("grep -- '%s' %s | tail -1", expression, m.log))
}
