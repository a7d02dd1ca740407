package backend

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestParseSpec(t *testing.T) {
	for in, want := range map[string]Spec{
		"null:size=1GiB":                   {Kind: KindNull, Size: 1 << 30, LBA: 512},
		"null:size=1GiB,lba=4096":          {Kind: KindNull, Size: 1 << 30, LBA: 4096},
		"mem:lba=64KiB,size=2m":            {Kind: KindMem, Size: 2 << 20, LBA: 65536},
		"mem:size=4096":                    {Kind: KindMem, Size: 4096, LBA: 512},
		"file:/a/b.img":                    {Kind: KindFile, Path: "/a/b.img", LBA: 512},
		"file:c:d=e,size=10GiB,readonly":   {Kind: KindFile, Path: "c:d=e", Size: 10 << 30, LBA: 512, ReadOnly: true},
		"file:a,,b,,,lba=4k,size=1T":       {Kind: KindFile, Path: "a,b,", LBA: 4096, Size: 1 << 40},
		"file:rel with space,readonly":     {Kind: KindFile, Path: "rel with space", LBA: 512, ReadOnly: true},
		"null:size=9223372036854775296":    {Kind: KindNull, Size: 1<<63 - 512, LBA: 512},
		"file:x,size=3TiB,lba=65536":       {Kind: KindFile, Path: "x", Size: 3 << 40, LBA: 65536},
		"null:size=1MiB,lba=4KiB":          {Kind: KindNull, Size: 1 << 20, LBA: 4096},
		"vfio:0000:01:00.0":                {Kind: KindVFIO, Path: "0000:01:00.0", LBA: 512},
		"vfio:0000:01:00.0,timeout=1500ms": {Kind: KindVFIO, Path: "0000:01:00.0", LBA: 512, Timeout: 1500 * time.Millisecond},
		"vfio:01:00.0,nsid=3,offset=1M,size=4k,queues=2,poll,readonly": {
			Kind: KindVFIO, Path: "01:00.0", LBA: 512, NSID: 3, Offset: 1 << 20, Size: 4096, Queues: 2, Poll: true, ReadOnly: true,
		},
		"nvme:/dev/ng0n1": {Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512},
		"nvme:/dev/ng0n1,size=1G,poll,offset=4k,nopin,readonly": {
			Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512, Offset: 4096, Size: 1 << 30, Poll: true, NoPin: true, ReadOnly: true},
	} {
		got, err := ParseSpec(in)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
		if again, err := ParseSpec(got.String()); err != nil || again != got {
			t.Errorf("%q printed as %q parses as %+v, %v", in, got, again, err)
		}
	}
}

func TestParseSpecSaysWhatIsWrongAndWhatWouldBeRight(t *testing.T) {
	for in, want := range map[string][]string{
		"":                              {"it must begin with"},
		"ram:size=1G":                   {"it must begin with", "ram:size=1G"},
		"mem":                           {"it must begin with"},
		"mem:":                          {"size= is missing", "mem:size=1GiB"},
		"mem:size=":                     {"not a size", "10GiB"},
		"mem:size":                      {"size needs a value"},
		"mem:size=0":                    {"size=0 is nothing"},
		"mem:size=1.5GiB":               {`"1.5GiB" is not a size`},
		"mem:size=1GB":                  {`"1GB" is not a size`, "GiB"},
		"mem:size=-1":                   {"not a size"},
		"mem:size=8388608TiB":           {"too large"},
		"mem:size=99999999999999999999": {"too large"},
		"mem:size=1000":                 {"not a multiple", "lba=512", "1024"},
		"mem:size=1G,size=2G":           {"size is given twice"},
		"vfio:01:00.0,timeout=10":       {"timeout=10 is no time", "100ms to 10m0s"},
		"vfio:01:00.0,timeout=1h":       {"timeout=1h is no time"},
		"nvme:/dev/ng0n1,timeout=10s":   {"no option of nvme"},
		"mem:size=1G,lba=1000":          {"lba=1000", "power of two from 512 to 65536"},
		"mem:size=1G,lba=256":           {"power of two"},
		"mem:size=1G,lba=128KiB":        {"power of two"},
		"mem:size=1G,readonly":          {`"readonly" is no option of mem`, "size=, lba="},
		"file:":                         {"path is missing", "file:/srv/disk.img"},
		"file:,size=1G":                 {"path is missing"},
		"file:a,size=1000,lba=4096":     {"not a multiple", "4096"},
		"file:a,b":                      {`"b" is no option of file`, "written twice"},
		"file:a,readonly=yes":           {"readonly takes no value"},
		"file:a,":                       {"is no option"},
		"file:a\nb":                     {"control character"},
	} {
		_, err := ParseSpec(in)
		if err == nil {
			t.Errorf("%q was taken", in)
			continue
		}
		oneLine(t, err, append(want, "namespace")...)
	}
}

func oneLine(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one that says %q", want)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q is more than one line", err)
	}
}

func TestSizesPrintAsTheyParse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Uint64Range(0, 1<<63-1).Draw(t, "n") >> rapid.IntRange(0, 60).Draw(t, "shift")
		if got, err := ParseSize(FormatSize(n)); err != nil || got != n {
			t.Fatalf("%d printed as %s parses as %d, %v", n, FormatSize(n), got, err)
		}
	})
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"mem:size=1GiB", "file:a,,b,size=1K,readonly", "null:size=1T,lba=4096",
		"fault:drop@read@rate=1/1000,delay=3s@flush,seed=7,over=null:size=1M", "fault:status=2/81+dnr@lba=0-0x7f@after=3@first=2,torn,over=file:a,,b,size=1M",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseSpec(in)
		if err != nil {
			return
		}
		if again, err := ParseSpec(s.String()); err != nil || again != s {
			t.Errorf("%q printed as %q parses as %+v, %v", in, s, again, err)
		}
	})
}

func TestOpenSaysWhatIsWrongAndWhatWouldBeRight(t *testing.T) {
	dir := diskDir(t)
	path := func(name string, size int) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		spec string
		want []string
	}{
		{"file:" + dir + "/none", []string{dir + "/none", "no such file", "size=10GiB"}},
		{"file:" + dir + "/none,readonly,size=1MiB", []string{"no such file", "readonly cannot create"}},
		{"file:" + dir + "/no/dir,size=1MiB", []string{"no such directory as " + dir + "/no", "mkdir"}},
		{"file:" + dir, []string{dir, "a directory", "disk image"}},
		{"file:/dev/null", []string{"a character device", "regular files"}},
		{"file:" + fifo, []string{"a pipe", "regular files"}},
		{"file:" + loop, []string{loop, "symbolic links"}},
		{"file:" + path("empty", 0), []string{"it is empty", "size=10GiB"}},
		{"file:" + path("odd", 1000), []string{"1000 bytes", "not a multiple", "lba=512", "1024"}},
		{"file:" + path("odd4k", 512) + ",lba=4096", []string{"512 bytes", "lba=4096"}},
		{"file:" + path("mib", 1<<20) + ",size=2MiB", []string{"1MiB large, not size=2MiB", "leave size= out", "truncate -s 2097152"}},
		{"file:" + path("file", 512) + "/x", []string{"file/x", "correct the path"}},
		{"file:" + dir + "/huge,size=8388607TiB", []string{"8388607TiB", "file system can hold"}},
		{"mem:size=1024TiB", []string{"larger than this machine's memory", "file:PATH"}},
		{"mem:size=1", []string{"not a multiple"}},
	} {
		b, err := Open(c.spec)
		if err == nil {
			b.Close()
		}
		oneLine(t, err, c.want...)
	}
	for _, name := range []string{"none", "huge"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s was left behind", name)
		}
	}
	oneLine(t, wrongKind(os.ModeDevice), "a block device")
	oneLine(t, wrongKind(os.ModeSocket), "a socket")
	for errno, want := range map[unix.Errno]string{
		unix.EACCES: "add readonly", unix.EROFS: "add readonly", unix.EMFILE: "ulimit -n", unix.ENOSPC: "make room",
		unix.ETXTBSY: "disk image", unix.EIO: "check the path", unix.EEXIST: "try again",
	} {
		oneLine(t, explainOpen(Spec{Path: "/p"}, &os.PathError{Err: errno}), "/p", want)
	}
	oneLine(t, explainOpen(Spec{Path: "/p", ReadOnly: true}, unix.EACCES), "may read it")
}

func TestOneWriterOrManyReaders(t *testing.T) {
	dir := diskDir(t)
	rw := fileSpec(dir, 1<<20, 512)
	ro := rw
	ro.ReadOnly, ro.Size = true, 0
	must := func(s Spec) Backend {
		t.Helper()
		b, err := OpenSpec(s, nil)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := must(rw)
	_, err := OpenSpec(rw, nil)
	oneLine(t, err, rw.Path, "in use", "readonly in both")
	_, err = OpenSpec(ro, nil)
	oneLine(t, err, rw.Path, "in use", "for writing")
	first.Close()
	a, b := must(ro), must(ro)
	_, err = OpenSpec(rw, nil)
	oneLine(t, err, "in use")
	if a.Info().UUID == b.Info().UUID || a.Info().NGUID == b.Info().NGUID {
		t.Error("two namespaces of one file have the same identifiers")
	}
	a.Close()
	b.Close()
	again := must(rw)
	if again.Info().UUID != a.Info().UUID || again.Info().NGUID != a.Info().NGUID {
		t.Error("identifiers are not stable")
	}
	if u := again.Info().UUID; u[6]>>4 != 8 || u[8]>>6 != 2 {
		t.Errorf("%x is no version 8 UUID", u)
	}
	again.Close()
}

func TestSizeCreatesAndFillsAnEmptyFile(t *testing.T) {
	for _, f := range flavours[1:4] {
		b := f.open(t, 1<<30, 512)
		var st unix.Stat_t
		if err := unix.Fstat(b.(*file).fd, &st); err != nil {
			t.Fatal(err)
		}
		if st.Size != 1<<30 || st.Blocks > 64 || st.Mode&0o777 != 0o600 {
			t.Errorf("%s: size %d, blocks %d, mode %o", f.name, st.Size, st.Blocks, st.Mode)
		}
	}
	path := filepath.Join(diskDir(t), "touched")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b := opened(t)(Open("file:" + path + ",size=1MiB"))
	if b.Info().Size() != 1<<20 {
		t.Errorf("size %d", b.Info().Size())
	}
}
