package hostmed

import (
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// slowMedia are those whose name has a channel: they are opened when that is closed, or fail with what it gives.
type slowMedia struct {
	mu    sync.Mutex
	wait  map[string]chan error
	opens int
}

func (s *slowMedia) open(spec backend.Spec) (backend.Backend, error) {
	s.mu.Lock()
	wait := s.wait[filepath.Base(spec.Path)]
	if wait != nil {
		s.opens++
	}
	s.mu.Unlock()
	if wait != nil {
		if err := <-wait; err != nil {
			return nil, err
		}
	}
	return backend.OpenSpec(spec, nil)
}

// A medium that does not open in time keeps neither the sockets nor the other namespaces from their guests. The log says what it waits for. When it is open its namespace
// comes; one that fails does not.
func TestSlowMedium(t *testing.T) {
	dir := t.TempDir()
	media := &slowMedia{wait: map[string]chan error{"dead": make(chan error), "never": make(chan error)}}
	socket := filepath.Join(dir, "s")
	spec := func(name string) string { return "file:" + filepath.Join(dir, name) + ",size=1MiB" }
	c := Config{open: media.open, openPatience: 100 * time.Millisecond, Subsystems: []SubsystemConfig{{
		Controllers: []ControllerConfig{{Socket: socket}},
		Namespaces:  []NamespaceConfig{{Spec: spec("dead")}, {Spec: spec("well")}, {Spec: spec("never")}},
	}}}
	log := &testrig.Buffer{}
	c.Logger = hclog.New(&hclog.LoggerOptions{Output: log, Level: hclog.Info})
	m := serve(t, c)
	for _, want := range []string{"file:" + filepath.Join(dir, "dead"), "the medium is not open yet after 100ms: it waits for the file system"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	changes := make(chan guestdrv.Change, 16)
	ctrl := open(t, socket, guestdrv.Options{OnChange: func(c guestdrv.Change) { changes <- c }})
	readsAll := func(nsid uint32) error {
		ns, err := ctrl.Namespace(nsid)
		if err == nil {
			_, err = ns.ReadAt(make([]byte, 4096), 0)
		}
		return err
	}
	if err := readsAll(2); err != nil {
		t.Fatal(err)
	}
	if err := readsAll(1); err == nil {
		t.Error("there is a namespace of a medium that is not open")
	}
	// A reload says so, and does not begin anew.
	if err := m.Reload(c); !errors.Is(err, backend.ErrSlow) || !strings.Contains(err.Error(), "dead") {
		t.Errorf("reload: %v", err)
	}
	close(media.wait["dead"])
	for <-changes; readsAll(1) != nil; <-changes {
	}
	media.wait["never"] <- errors.New("no such device")
	eventually(t, "the log says why", func() bool { return strings.Contains(log.String(), "no such device") })
	media.mu.Lock()
	opens := media.opens
	delete(media.wait, "never")
	media.mu.Unlock()
	if opens != 2 {
		t.Errorf("%d opens of 2 media", opens)
	}
	if err := m.Reload(c); err != nil {
		t.Fatal(err)
	}
	for readsAll(3) != nil {
		<-changes
	}
}

// A medium that opens when nobody wants it any more is closed: after a reload without it, or when hostmed has ended, for which nobody waits either.
func TestSlowMediumUnwanted(t *testing.T) {
	for _, end := range []bool{false, true} {
		dir := t.TempDir()
		media := &slowMedia{wait: map[string]chan error{"dead": make(chan error)}}
		file, closed := filepath.Join(dir, "dead"), make(chan struct{})
		open := func(spec backend.Spec) (backend.Backend, error) {
			b, err := media.open(spec)
			if spec.Path == file && err == nil {
				b = watchedEnd{b, closed}
			}
			return b, err
		}
		c := Config{open: open, openPatience: 100 * time.Millisecond, Subsystems: []SubsystemConfig{{
			Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "s")}},
			Namespaces:  []NamespaceConfig{{Spec: "mem:size=1MiB"}, {Spec: "file:" + file + ",size=1MiB"}},
		}}}
		m := serve(t, c)
		if end {
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
		} else {
			c.Subsystems[0].Namespaces = c.Subsystems[0].Namespaces[:1]
			if err := m.Reload(c); err != nil {
				t.Fatal(err)
			}
		}
		close(media.wait["dead"])
		select {
		case <-closed:
		case <-time.After(patience):
			t.Fatal("the medium is not closed")
		}
	}
}

// watchedEnd is a medium whose end is told.
type watchedEnd struct {
	backend.Backend
	closed chan struct{}
}

func (b watchedEnd) Close() error {
	close(b.closed)
	return b.Backend.Close()
}
