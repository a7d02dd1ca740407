package uring

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRestrictedRingDoesOneThing is the ring of a sandbox: reads of one file, and nothing else.
func TestRestrictedRingDoesOneThing(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte("shadowbell"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := newRing(t, Config{Entries: 8, Disabled: true, SingleIssuer: true})
	if err := r.RegisterFiles([]int{int(f.Fd())}); err != nil {
		t.Fatal(err)
	}
	if err := r.Restrict(Restrictions{Ops: []uint8{OpRead, OpPollAdd}, RegisteredFilesOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := r.Restrict(Restrictions{}); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "before") {
		t.Errorf("restricted twice: %v", err)
	}
	if err := r.Enable(); err != nil {
		t.Fatal(err)
	}
	if err := r.Restricted(); err != nil {
		t.Error(err)
	}
	if err := newRing(t, Config{Entries: 4}).Restricted(); err == nil {
		t.Error("a plain ring counts as restricted")
	}
	buf := make([]byte, 10)
	for name, c := range map[string]struct {
		prep func(*SQE)
		want unix.Errno
	}{
		"allowed":      {func(s *SQE) { s.PrepRead(0, &buf[0], 10, 0); s.Flags = SQEFixedFile }, 0},
		"no file":      {func(s *SQE) { s.PrepRead(int(f.Fd()), &buf[0], 10, 0) }, unix.EACCES},
		"operation":    {func(s *SQE) { s.PrepNop(); s.Flags = SQEFixedFile }, unix.EACCES},
		"flag":         {func(s *SQE) { s.PrepRead(0, &buf[0], 10, 0); s.Flags = SQEFixedFile | SQEAsync }, unix.EACCES},
		"unregistered": {func(s *SQE) { s.PrepRead(3, &buf[0], 10, 0); s.Flags = SQEFixedFile }, unix.EBADF},
	} {
		if got := one(t, r, c.prep); got.Errno() != c.want {
			t.Errorf("%s: %v, want %v", name, got.Errno(), c.want)
		}
	}
	if string(buf) != "shadowbell" {
		t.Errorf("read %q", buf)
	}
	if err := r.RegisterFiles([]int{0}); !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EBUSY) {
		t.Errorf("registering with a restricted ring: %v", err)
	}
	if _, err := r.RegisterPersonality(); !errors.Is(err, unix.EACCES) {
		t.Errorf("a personality of a restricted ring: %v", err)
	}
}

func TestRestrictionsComeBeforeEnable(t *testing.T) {
	r := newRing(t, Config{Entries: 4})
	if err := r.Restrict(Restrictions{Ops: []uint8{OpNop}}); !errors.Is(err, unix.EBADFD) || !strings.Contains(err.Error(), "Disabled") {
		t.Errorf("restricting a ring that runs: %v", err)
	}
}

func TestPersonalityCompletes(t *testing.T) {
	r := newRing(t, Config{Entries: 4})
	id, err := r.RegisterPersonality()
	if err != nil || id == 0 {
		t.Fatalf("personality %d: %v", id, err)
	}
	if c := one(t, r, func(s *SQE) { s.PrepNop(); s.Personality = id }); c.Errno() != 0 {
		t.Errorf("with a registered personality: %v", c.Errno())
	}
	if c := one(t, r, func(s *SQE) { s.PrepNop(); s.Personality = id + 1 }); c.Errno() != unix.EINVAL {
		t.Errorf("with one that is none: %v", c.Errno())
	}
}

// TestPollWakesTheRing is how a ring waits for an eventfd beside its own work, and how that wait ends in time.
func TestPollWakesTheRing(t *testing.T) {
	for name, cfg := range map[string]Config{"plain": {Entries: 4}, "deferred": {Entries: 4, DeferTaskrun: true}} {
		t.Run(name, func(t *testing.T) {
			done := make(chan struct{})
			go func() { // a ring with one issuer belongs to one thread
				defer close(done)
				pollWakes(t, cfg)
			}()
			<-done
		})
	}
}

func pollWakes(t *testing.T, cfg Config) {
	runtime.LockOSThread() // and with the goroutine its thread ends
	r, err := New(cfg)
	if err != nil {
		t.Error(err)
		return
	}
	defer r.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(fd)
	s := r.GetSQE()
	s.PrepPoll(fd, unix.POLLIN)
	s.UserData = 5
	var out [4]CQE
	if n, err := r.SubmitAndWaitFor(1, time.Millisecond); err != nil {
		t.Errorf("nothing to wait for: %d, %v", n, err)
	}
	if n := r.Reap(out[:]); n != 0 {
		t.Errorf("%d completions of an eventfd that nobody has written", n)
	}
	if n, err := r.SubmitAndWaitFor(1, time.Millisecond); err != nil || n != 0 {
		t.Errorf("nothing to submit: %d, %v", n, err)
	}
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Error(err)
	}
	n := 0
	for end := time.Now().Add(time.Minute); n == 0 && time.Now().Before(end); n = r.Reap(out[:]) {
		if _, err := r.SubmitAndWaitFor(1, time.Minute); err != nil { // less if there is a signal
			t.Error(err)
			return
		}
	}
	if n != 1 || out[0].UserData != 5 || out[0].Res&unix.POLLIN == 0 {
		t.Errorf("%d completions, the first %+v", n, out[0])
	}
	// Level: what is readable when the poll is added completes it, by a call that does not wait.
	s = r.GetSQE()
	s.PrepPoll(fd, unix.POLLIN)
	s.UserData = 6
	if n, err := r.SubmitAndFetch(); n != 1 || err != nil {
		t.Errorf("SubmitAndFetch: %d, %v", n, err)
	}
	if r.Held() {
		t.Error("completions are held back after SubmitAndFetch")
	}
	if n := r.Reap(out[:]); n != 1 || out[0].UserData != 6 {
		t.Errorf("%d completions, the first %+v", n, out[0])
	}
}
