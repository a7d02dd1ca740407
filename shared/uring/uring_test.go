package uring

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		os.Exit(child(what))
	}
	goleak.VerifyTestMain(m)
}

func newRing(t testing.TB, cfg Config) *Ring {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// finish submits what is prepared and returns n completions by UserData.
func finish(t testing.TB, r *Ring, n int) map[uint64]CQE {
	t.Helper()
	got := map[uint64]CQE{}
	var out [16]CQE
	for seen := 0; seen < n; {
		if _, err := r.SubmitAndWait(1); err != nil {
			t.Fatal(err)
		}
		k := r.Reap(out[:])
		for _, c := range out[:k] {
			got[c.UserData] = c
		}
		seen += k
	}
	return got
}

func one(t testing.TB, r *Ring, prep func(*SQE)) CQE {
	t.Helper()
	s := r.GetSQE()
	prep(s)
	s.UserData = 7
	return finish(t, r, 1)[7]
}

var configs = map[string]Config{
	"plain":    {Entries: 8},
	"coop":     {Entries: 8, CoopTaskrun: true},
	"wide sqe": {Entries: 8, SQE128: true},
	"sqpoll":   {Entries: 8, SQPoll: true, SQIdle: 1},
}

func openTemp(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestReadWriteEveryForm(t *testing.T) {
	for name, cfg := range configs {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, cfg)
			f := openTemp(t, t.TempDir())
			fd := int(f.Fd())
			want := bytes.Repeat([]byte("shadow"), 1000)
			got := make([]byte, len(want))
			n := uint32(len(want))

			expect := func(what string, c CQE, res int) {
				t.Helper()
				if int(c.Res) != res {
					t.Fatalf("%s: result %d, want %d", what, c.Res, res)
				}
			}
			check := func(what string) {
				t.Helper()
				if !bytes.Equal(got, want) {
					t.Fatalf("%s: wrong data", what)
				}
				clear(got)
			}
			expect("write", one(t, r, func(s *SQE) { s.PrepWrite(fd, &want[0], n, 512) }), len(want))
			expect("read", one(t, r, func(s *SQE) { s.PrepRead(fd, &got[0], n, 512) }), len(want))
			check("read")

			vec := []unix.Iovec{iovec(want[:100]), iovec(want[100:])}
			expect("writev", one(t, r, func(s *SQE) { s.PrepWritev(fd, vec, 1<<20) }), len(want))
			into := []unix.Iovec{iovec(got[:4000]), iovec(got[4000:])}
			expect("readv", one(t, r, func(s *SQE) { s.PrepReadv(fd, into, 1<<20) }), len(want))
			check("readv")

			if err := r.RegisterFiles([]int{-1, fd}); err != nil {
				t.Fatal(err)
			}
			if err := r.RegisterBuffers([][]byte{want, got}); err != nil {
				t.Fatal(err)
			}
			expect("write fixed", one(t, r, func(s *SQE) {
				s.PrepWriteFixed(1, &want[6], n-6, 0, 0)
				s.Flags |= SQEFixedFile
			}), len(want)-6)
			expect("read fixed", one(t, r, func(s *SQE) {
				s.PrepReadFixed(1, &got[6], n-6, 0, 1)
				s.Flags |= SQEFixedFile
			}), len(want)-6)
			copy(got, want[:6])
			check("fixed")
			expect("empty file slot", one(t, r, func(s *SQE) {
				s.PrepRead(0, &got[0], n, 0)
				s.Flags |= SQEFixedFile
			}), -int(unix.EBADF))
			if err := r.UpdateFiles(0, []int{fd, -1}); err != nil {
				t.Fatal(err)
			}
			expect("updated file slot", one(t, r, func(s *SQE) {
				s.PrepFsync(0, FsyncDatasync)
				s.Flags |= SQEFixedFile
			}), 0)
			expect("fallocate", one(t, r, func(s *SQE) { s.PrepFallocate(fd, 0, 0, 4<<20) }), 0)
			if st, _ := f.Stat(); st.Size() != 4<<20 {
				t.Errorf("size %d after fallocate", st.Size())
			}
			if err := errors.Join(r.UnregisterBuffers(), r.UnregisterFiles()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSparseBuffersComeAndGo(t *testing.T) {
	r := newRing(t, Config{})
	if err := r.RegisterSparseBuffers(4); err != nil {
		t.Fatal(err)
	}
	f := openTemp(t, t.TempDir())
	fd := int(f.Fd())
	f.Write(make([]byte, 4096))
	mem, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	read := func() int32 {
		return one(t, r, func(s *SQE) { s.PrepReadFixed(fd, &mem[4096], 4096, 0, 2) }).Res
	}
	if got := read(); got != -int32(unix.EFAULT) {
		t.Errorf("empty place: %d, want EFAULT", got)
	}
	if err := r.UpdateBuffers(2, [][]byte{mem}); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != 4096 {
		t.Errorf("registered: %d", got)
	}
	if err := r.UpdateBuffers(2, [][]byte{nil}); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != -int32(unix.EFAULT) {
		t.Errorf("emptied place: %d, want EFAULT", got)
	}
	if err := r.UpdateBuffers(9, [][]byte{mem}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("place that is not there: %v", err)
	}
}

func TestFullRingWrapAndOverflow(t *testing.T) {
	r := newRing(t, Config{Entries: 4, CQEntries: 4})
	sq, cq := r.Entries()
	if sq != 4 || cq != 4 {
		t.Fatalf("sizes %d, %d", sq, cq)
	}
	next := uint64(0)
	fill := func() (n int) {
		for s := r.GetSQE(); s != nil; s = r.GetSQE() {
			s.PrepNop()
			s.UserData = next
			next++
			n++
		}
		return n
	}
	want := uint64(0)
	var out [3]CQE
	for range 50 { // 3 rounds without reaping: more completions than the ring holds
		for range 3 {
			if n := fill(); n != 4 || r.Space() != 0 || r.Pending() != 4 {
				t.Fatalf("got %d entries, space %d, pending %d", n, r.Space(), r.Pending())
			}
			if n, err := r.Submit(); n != 4 || err != nil {
				t.Fatalf("submitted %d: %v", n, err)
			}
		}
		for want < next {
			n := r.Reap(out[:])
			if n == 0 {
				t.Fatalf("completion %d of %d is lost", want, next)
			}
			for _, c := range out[:n] {
				if c.UserData != want || c.Res != 0 {
					t.Fatalf("got %+v, want number %d", c, want)
				}
				want++
			}
		}
	}
	if n := r.Reap(out[:]); n != 0 || r.Ready() != 0 {
		t.Errorf("%d completions too many", n)
	}
}

func TestWrongEntryCompletesWithItsErrorAndStopsNothing(t *testing.T) {
	r := newRing(t, Config{Entries: 8})
	for i := range 4 {
		s := r.GetSQE()
		s.PrepNop()
		if i == 1 {
			s.Opcode = 250
		}
		s.UserData = uint64(i)
	}
	got := finish(t, r, 4)
	for i, c := range got {
		if want := map[bool]unix.Errno{true: unix.EINVAL}[i == 1]; c.Errno() != want {
			t.Errorf("entry %d: %v, want %v", i, c.Errno(), want)
		}
	}
	if r.Supports(250) || !r.Supports(OpReadv) || !r.Supports(OpFallocate) {
		t.Error("probe is wrong")
	}
}

func TestWideCompletionsAndCommands(t *testing.T) {
	r := newRing(t, Config{Entries: 4, SQE128: true, CQE32: true})
	f := openTemp(t, t.TempDir())
	var out [4]WideCQE
	for round := range 10 {
		for i := range 4 {
			s := r.GetSQE()
			if i%2 == 0 {
				s.PrepNop()
			} else {
				s.PrepCommand(int(f.Fd()), 0xc0484e80)
				if s.Off != 0xc0484e80 || s.Addr3 != 0 {
					t.Fatalf("command number is not where it belongs: %+v", s)
				}
				arg := r.Command(s)
				if len(arg) != 80 {
					t.Fatalf("room for %d bytes", len(arg))
				}
				for j := range arg {
					if arg[j] != 0 {
						t.Fatalf("byte %d of the argument left over from before", j)
					}
					arg[j] = 0xee
				}
			}
			s.UserData = uint64(round*4 + i)
		}
		if _, err := r.SubmitAndWait(4); err != nil {
			t.Fatal(err)
		}
		if n := r.ReapWide(out[:]); n != 4 {
			t.Fatalf("reaped %d", n)
		}
		for _, c := range out {
			want := unix.Errno(0)
			if c.UserData%2 == 1 {
				want = unix.EOPNOTSUPP // a regular file has no commands
			}
			if c.UserData/4 != uint64(round) || c.Errno() != want {
				t.Errorf("round %d: %+v", round, c)
			}
		}
	}
}

func TestEventFDSignalsAndCancel(t *testing.T) {
	for _, cfg := range []Config{{}, {CoopTaskrun: true}} {
		r := newRing(t, cfg)
		evfd, err := r.EventFD()
		if err != nil {
			t.Fatal(err)
		}
		pipe := make([]int, 2)
		if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		readable := func(ms int) bool {
			for {
				p := []unix.PollFd{{Fd: int32(evfd), Events: unix.POLLIN}}
				n, err := unix.Poll(p, ms)
				if err == unix.EINTR {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				return n == 1
			}
		}
		var eight [8]byte
		var out [4]CQE
		got := make([]byte, 5)

		s := r.GetSQE()
		s.PrepRead(pipe[0], &got[0], 5, ^uint64(0))
		s.UserData = 1
		if _, err := r.Submit(); err != nil {
			t.Fatal(err)
		}
		if readable(0) || r.Reap(out[:]) != 0 {
			t.Fatal("an empty pipe was read")
		}
		unix.Write(pipe[1], []byte("hello"))
		if !readable(30_000) {
			t.Fatal("no signal")
		}
		unix.Read(evfd, eight[:])
		if n := r.Reap(out[:]); n != 1 || out[0].Res != 5 || string(got) != "hello" {
			t.Fatalf("reaped %d: %+v %q", n, out[0], got)
		}

		s = r.GetSQE()
		s.PrepRead(pipe[0], &got[0], 5, ^uint64(0))
		s.UserData = 2
		if _, err := r.Submit(); err != nil {
			t.Fatal(err)
		}
		s = r.GetSQE()
		s.PrepCancel(2)
		s.UserData = 3
		done := finish(t, r, 2)
		if c := done[2]; c.Errno() != unix.ECANCELED && c.Errno() != unix.EINTR {
			t.Errorf("cancelled read: %v", c.Errno())
		}
		if c := done[3]; c.Errno() != 0 && c.Errno() != unix.EALREADY {
			t.Errorf("cancel: %v", c.Errno())
		}
		if err := r.UnregisterEventFD(); err != nil {
			t.Error(err)
		}
	}
}

func TestSingleIssuerMayBeEnabledLater(t *testing.T) {
	r := newRing(t, Config{Entries: 8, Disabled: true, DeferTaskrun: true})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := r.Enable(); err != nil {
		t.Fatal(err)
	}
	if err := r.Enable(); !errors.Is(err, unix.EBADFD) {
		t.Errorf("second Enable: %v", err)
	}
	f := openTemp(t, t.TempDir())
	p := []byte("deferred")
	for _, async := range []uint8{0, SQEAsync} {
		c := one(t, r, func(s *SQE) {
			s.PrepWrite(int(f.Fd()), &p[0], uint32(len(p)), 0)
			s.Flags = async
		})
		if int(c.Res) != len(p) {
			t.Errorf("wrote %d", c.Res)
		}
	}
}

func TestNoDescriptorOrMappingStays(t *testing.T) {
	count := func() (fds, maps int) {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		m, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return len(d), strings.Count(string(m), "io_uring")
	}
	fds, maps := count()
	for range 5 {
		r, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.EventFD(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if f, m := count(); f > fds || m > maps {
		t.Errorf("descriptors %d -> %d, mappings %d -> %d", fds, f, maps, m)
	}
}

func TestNothingIsAllocatedPerOperation(t *testing.T) {
	r := newRing(t, Config{Entries: 64})
	f := openTemp(t, t.TempDir())
	f.Write(make([]byte, 4096))
	fd := int(f.Fd())
	buf := make([]byte, 4096)
	vec := []unix.Iovec{iovec(buf)}
	out := make([]CQE, 64)
	if n := testing.AllocsPerRun(200, func() {
		for i := range 32 {
			s := r.GetSQE()
			if i%2 == 0 {
				s.PrepRead(fd, &buf[0], 4096, 0)
			} else {
				s.PrepReadv(fd, vec, 0)
			}
			s.UserData = uint64(i)
		}
		if _, err := r.Submit(); err != nil {
			t.Fatal(err)
		}
		for n := 0; n < 32; n += r.Reap(out) {
		}
	}); n != 0 {
		t.Errorf("%v allocations per batch", n)
	}
}

func TestRefusalsNameTheRemedy(t *testing.T) {
	for _, c := range []struct {
		errno    unix.Errno
		disabled string
		cfg      Config
		want     string
	}{
		{unix.ENOSYS, "", Config{}, "5.10"},
		{unix.EPERM, "2", Config{}, "kernel.io_uring_disabled=0"},
		{unix.EPERM, "1", Config{}, "kernel.io_uring_group"},
		{unix.EPERM, "0", Config{}, "seccomp"},
		{unix.EPERM, "", Config{SQPoll: true}, "5.11"},
		{unix.ENOMEM, "", Config{}, "RLIMIT_MEMLOCK"},
		{unix.EMFILE, "", Config{}, "RLIMIT_NOFILE"},
		{unix.EINVAL, "", Config{SQE128: true}, "5.19"},
		{unix.EINVAL, "", Config{}, "configuration"},
	} {
		err := explainSetup(c.errno, c.disabled, &c.cfg)
		if s := err.Error(); !strings.Contains(s, c.want) || strings.Contains(s, "\n") {
			t.Errorf("%v, disabled %q: %q does not say %q on one line", c.errno, c.disabled, s, c.want)
		}
		if !errors.Is(err, c.errno) {
			t.Errorf("%v is not %v", err, c.errno)
		}
	}
	if _, err := New(Config{CQEntries: 1, Entries: 8}); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "1 completion entries") {
		t.Errorf("fewer completions than entries: %v", err)
	}
}

func TestOlderKernelsGetFewerHints(t *testing.T) {
	all := Config{CoopTaskrun: true, SingleIssuer: true, DeferTaskrun: true}
	for _, c := range []struct {
		name  string
		knows uint32 // setup flags
		cfg   Config
		want  uint32
	}{
		{"5.10", 1<<7 - 1, all, setupClamp},
		{"5.18", 1<<8 - 1, all, setupClamp | setupSubmitAll},
		{"5.19", 1<<12 - 1, all, setupClamp | setupSubmitAll | setupCoopTaskrun | setupTaskrunFlag},
		{"6.0", 1<<13 - 1, all, setupClamp | setupSubmitAll | setupCoopTaskrun | setupTaskrunFlag | setupSingleIssuer},
		{"6.1", 1<<14 - 1, all, setupClamp | setupSubmitAll | setupCoopTaskrun | setupTaskrunFlag | setupSingleIssuer | setupDeferTaskrun},
		{"6.1, plain", 1<<14 - 1, Config{}, setupClamp | setupSubmitAll},
		{"6.1, polled", 1<<14 - 1, Config{SQPoll: true, CoopTaskrun: true}, setupClamp | setupSubmitAll | setupSQPoll},
		{"5.10, wide", 1<<7 - 1, Config{SQE128: true, CoopTaskrun: true}, 0},
	} {
		p, fd, err := c.cfg.setup(func(_ uint32, p *params) (int, unix.Errno) {
			if p.flags&^c.knows != 0 {
				return -1, unix.EINVAL
			}
			return 99, 0
		})
		if c.want == 0 {
			if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "SQE128 (5.19)") {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil || fd != 99 || p.flags != c.want {
			t.Errorf("%s: %v, descriptor %d, flags %#x, want %#x", c.name, err, fd, p.flags, c.want)
		}
	}
}

func BenchmarkNop(b *testing.B) {
	for _, qd := range []int{1, 32} {
		b.Run(fmt.Sprintf("qd%d", qd), func(b *testing.B) {
			r := newRing(b, Config{Entries: 64, CoopTaskrun: true})
			out := make([]CQE, 64)
			b.ReportAllocs()
			for n := 0; n < b.N; n += qd {
				for range qd {
					r.GetSQE().PrepNop()
				}
				r.Submit()
				for k := 0; k < qd; k += r.Reap(out) {
				}
			}
		})
	}
}
