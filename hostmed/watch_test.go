package hostmed

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestFollowsMedia: a medium tells that it has grown, and then that it is gone. The guest hears of both; the next reload brings the namespace
// back.
func TestFollowsMedia(t *testing.T) {
	dir := t.TempDir()
	disk, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	conf := Config{Subsystems: []SubsystemConfig{{
		NQN: "nqn.2026-11.test:a", Controllers: []ControllerConfig{{Socket: socket}},
		Namespaces: []NamespaceConfig{{NSID: 1, Spec: "file:" + disk}, {NSID: 2, Spec: "mem:size=1MiB"}},
	}}}
	m := serve(t, conf)
	c, log := watched(t, socket)
	s := m.subsystems[0]
	n := s.Namespace(1)
	tell := s.follow(n)
	heard := func() int { return strings.Count(log(), "Namespace Attribute Changed") }

	tell(backend.EventChanged)
	m.following.Wait()
	if heard() != 0 {
		t.Error("an event, and nothing has changed")
	}
	if err := os.Truncate(disk, 2<<20); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() { tell(backend.EventChanged) })
	}
	all.Wait()
	eventually(t, "the namespace has grown", func() bool { return identifyNamespace(t, c, 1).NSZE == 2<<20/512 })
	eventually(t, "the guest hears of it", func() bool { return heard() > 0 })

	// What is no medium's any more, and what cannot be taken up, changes nothing.
	if err := os.Truncate(disk, 1000); err != nil {
		t.Fatal(err)
	}
	tell(backend.EventChanged)
	tell(backend.Event(9))
	m.following.Wait()
	if id := identifyNamespace(t, c, 1); id.NSZE != 2<<20/512 {
		t.Errorf("%d blocks after a change that cannot be", id.NSZE)
	}

	before := heard()
	tell(backend.EventGone)
	tell(backend.EventChanged)
	eventually(t, "the namespace is gone", func() bool { return slices.Equal(nsids(t, c, nvme.CNSActiveNamespaces), []uint32{2}) })
	eventually(t, "the guest hears of it", func() bool { return heard() > before })
	tell(backend.EventGone)
	m.following.Wait()
	if s.Namespace(1) != nil || s.cfg.namespace(1) != nil {
		t.Error("it is still there")
	}
	if err := os.Truncate(disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := m.Reload(conf); err != nil {
		t.Fatal(err)
	}
	if got := nsids(t, c, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 2}) {
		t.Errorf("after the reload: %v", got)
	}
	tell(backend.EventGone) // of the one that was there before
	m.following.Wait()
	if got := nsids(t, c, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 2}) {
		t.Errorf("an event of the old one: %v", got)
	}
}
