package backends

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// spectator is a guest in the host that uses all namespaces of a controller and says what it hears of them: the guest's command watch.
type spectator struct {
	h        *host
	out, pid string
}

// line is one of what it says.
type line struct {
	Message                  string          `json:"@message"`
	Event                    nvme.AsyncEvent // of the controller
	NSIDs                    []uint32        // of the Changed Namespace List
	NSID                     uint32
	Kind                     string // of change, that guestdrv made of it
	Size                     int64
	Identify                 uint16 // the status of Identify, and whether all of what it says is zero
	Zeroes                   bool
	Status                   uint16
	Text                     string
	Error                    string
	MS                       int64 // that a command took that failed
	Done                     uint64
	Timeouts, Aborts, Resets uint64
}

const spectatorWorkers = 2 // for a namespace

// spectate starts one, until the end of t at the latest, and returns when it uses so many namespaces.
func (h *host) spectate(t *testing.T, device string, namespaces int) *spectator {
	t.Helper()
	name := "/tmp/" + h.name("spectator")
	s := &spectator{h: h, out: name + ".out", pid: name + ".pid"}
	h.Run(t, fmt.Sprintf("setsid %s watch %s >%s 2>&1 </dev/null & echo $! >%s", guestCommand, device, s.out, s.pid))
	t.Cleanup(func() {
		if h.Ended() {
			return
		}
		if t.Failed() {
			if r, err := h.Exec(context.Background(), "tail -40 "+s.out); err == nil {
				t.Logf("what the guest on %s says:\n%s", device, r.Stdout)
			}
		}
		s.end(t)
	})
	h.until(t, "the guest does not use its namespaces", fmt.Sprintf(`[ "$(grep -c '"using"' %s)" = %d ]`, s.out, namespaces))
	return s
}

// end has it end, if it has not, and returns all that it has said.
func (s *spectator) end(t *testing.T) []line {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if r, err := s.h.Exec(ctx, fmt.Sprintf("kill -TERM $(cat %[1]s) 2>/dev/null; "+gone, s.pid)); err != nil || r.Exit != 0 {
		t.Errorf("the guest does not end: %v", err)
	}
	return s.lines(t)
}

func (s *spectator) lines(t *testing.T) (all []line) {
	t.Helper()
	b, err := s.h.ReadFile(context.Background(), s.out)
	if err != nil {
		t.Fatal(err)
	}
	for text := range strings.Lines(string(b)) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("the guest says %q", text)
		}
		all = append(all, l)
	}
	return all
}

// says waits for a line with a text, of a namespace.
func (s *spectator) says(t *testing.T, text string, nsid uint32) {
	t.Helper()
	s.h.until(t, fmt.Sprintf("the guest does not say %s of namespace %d", text, nsid), fmt.Sprintf(`grep -- '%s' %s | grep -q '"nsid":%d[,}]'`, text, s.out, nsid))
}

// told looks for the event of a namespace, and what followed: the event's own type, the list that names this namespace and no other, and what
// guestdrv made of it. It returns that line.
func told(t *testing.T, lines []line, nsid uint32, kind string) line {
	t.Helper()
	at := slices.IndexFunc(lines, func(l line) bool { return l.Message == "changed" && l.NSID == nsid && l.Kind == kind })
	if at < 0 {
		t.Fatalf("the guest was not told that namespace %d has %s", nsid, kind)
	}
	var event, list *line
	for i := range lines[:at] {
		switch l := &lines[i]; l.Message {
		case "controller event":
			event = l
		case "controller has changed namespaces":
			list = l
		}
	}
	want := nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)
	if event == nil || event.Event != want {
		t.Errorf("the event of namespace %d is %+v, want %v", nsid, event, want)
	}
	if list == nil || !slices.Equal(list.NSIDs, []uint32{nsid}) {
		t.Errorf("the Changed Namespace List is %+v, want namespace %d", list, nsid)
	}
	return lines[at]
}

// lost waits until the guest was told that a namespace is gone, and looks at all that it then saw: its commands have ended with errors by
// hostmed's doing, and not by deadlines of its own; Identify has zeroes, as of an NSID that is not active (NVMe Base 2.0c 5.17.2.1); a command that was in the
// queue is refused for its NSID; and the other namespaces go on.
func (s *spectator) lost(t *testing.T, nsid uint32) {
	t.Helper()
	s.says(t, `"late"`, nsid)
	s.h.until(t, "commands have not ended", fmt.Sprintf(`[ "$(grep '"failed"' %s | grep -c '"nsid":%d[,}]')" -ge %d ]`, s.out, nsid, spectatorWorkers))
	lines := s.lines(t)
	if l := told(t, lines, nsid, "vanished"); l.Identify != 0 || !l.Zeroes {
		t.Errorf("Identify of a namespace that is gone: status %#x, zeroes: %v", l.Identify, l.Zeroes)
	}
	longest, before := int64(0), map[uint32]uint64{}
	for _, l := range lines {
		switch l.Message {
		case "late":
			if st := nvme.Status(l.Status); st != nvme.StatusInvalidField && st != nvme.StatusInvalidNamespace {
				t.Errorf("a Read of a namespace that is gone ends with %s", l.Text)
			}
		case "failed":
			if longest = max(longest, l.MS); l.NSID != nsid {
				t.Errorf("namespace %d has failed too: %s", l.NSID, l.Error)
			}
			if strings.Contains(l.Error, "written") {
				t.Error(l.Error)
			}
		case "commands":
			before[l.NSID] = l.Done
		}
	}
	t.Logf("the last commands of namespace %d ended after %d ms at the most", nsid, longest)
	lines = s.end(t)
	for other, was := range before {
		i := len(lines) - 1
		for ; i >= 0 && !(lines[i].Message == "commands" && lines[i].NSID == other); i-- {
		}
		switch l := lines[i]; {
		case other == nsid:
			t.Errorf("namespace %d is still in use", nsid)
		case l.Done <= was:
			t.Errorf("namespace %d does nothing any more after %d writes", other, was)
		case l.Timeouts+l.Aborts+l.Resets != 0:
			t.Errorf("commands were late in the guest: %+v", l)
		}
	}
	if len(before) == 0 {
		t.Error("there is no other namespace")
	}
}

// grown waits until the guest was told that a namespace has so many bytes, and has used the last of them.
func (s *spectator) grown(t *testing.T, nsid uint32, size int64) {
	t.Helper()
	s.says(t, `"changed"`, nsid)
	s.says(t, `"end used"`, nsid)
	lines := s.end(t)
	if l := told(t, lines, nsid, "resized"); l.Size != size || l.Identify != 0 || l.Zeroes {
		t.Errorf("the guest sees %d bytes, want %d; Identify: status %#x", l.Size, size, l.Identify)
	}
	for _, l := range lines {
		if l.Message == "failed" {
			t.Errorf("namespace %d: %s", l.NSID, l.Error)
		}
	}
}
