package pcifn

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	first  = "0000:00:03.0" // bound to nvme; two namespaces, one of them with two paths
	second = "0000:01:00.0" // bound to vfio-pci, alone in group 8
)

// fake is a host of ordinary files, in which drivers come and go as the kernel's would.
type fake struct {
	host
	t       *testing.T
	claimed map[string]bool
	refuse  map[string]bool // drivers that take nothing
	wrote   []string
}

func newFake(t *testing.T) *fake {
	dir := t.TempDir()
	f := &fake{t: t, claimed: map[string]bool{}, refuse: map[string]bool{}}
	f.host = host{
		sys: filepath.Join(dir, "sys"), proc: filepath.Join(dir, "proc"), dev: filepath.Join(dir, "dev"),
		write: f.writes, claim: f.claims,
	}
	f.put("proc/self/mountinfo", "21 1 0:20 / /proc rw - proc proc rw\n")
	f.put("proc/swaps", "Filename Type Size Used Priority\n")
	for _, d := range []string{"nvme", "vfio-pci"} {
		f.mkdir("sys/bus/pci/drivers/" + d)
	}
	f.function(first, "0x010802", "nvme")
	f.group("7", "DMA-FQ", first)
	ctrl := "sys/bus/pci/devices/" + first + "/nvme/nvme0/"
	f.put(ctrl+"model", "A Disk    \n")
	f.put(ctrl+"serial", "s1\n")
	f.put(ctrl+"ng0n1/dev", "240:0\n") // no block device
	f.disk(ctrl+"nvme0n1", "nvme0n1", "259:0")
	f.put(ctrl+"nvme0n1/nsid", "1\n")
	f.disk("sys/devices/virtual/nvme0n2", "nvme0n2", "259:5")
	f.put(ctrl+"nvme0c0n2/nsid", "7\n")
	f.put("sys/class/block/nvme0n1/nvme0n1p1/partition", "1\n")
	f.put("sys/class/block/nvme0n1/nvme0n1p1/dev", "259:1\n")
	f.put("sys/class/block/nvme0n1p1/dev", "259:1\n")
	f.function(second, "0x010802", "vfio-pci")
	f.group("8", "DMA-FQ", second)
	f.function("0000:00:02.0", "0x020000", "e1000")
	return f
}

func (f *fake) path(name string) string { return filepath.Join(filepath.Dir(f.sys), name) }

func (f *fake) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fake) mkdir(name string) { f.must(os.MkdirAll(f.path(name), 0o755)) }

func (f *fake) put(name, content string) {
	f.mkdir(filepath.Dir(name))
	f.must(os.WriteFile(f.path(name), []byte(content), 0o600))
}

func (f *fake) function(address, class, driver string) {
	dir := "sys/bus/pci/devices/" + address
	f.put(dir+"/class", class+"\n")
	f.put(dir+"/vendor", "0x1b36\n")
	f.put(dir+"/device", "0x0010\n")
	f.put(dir+"/resource0", "")
	f.drive(address, driver)
}

// group puts functions into an IOMMU group.
func (f *fake) group(number, kind string, members ...string) {
	dir := "sys/kernel/iommu_groups/" + number
	f.put(dir+"/type", kind+"\n")
	for _, m := range members {
		f.mkdir(dir + "/devices/" + m)
		f.must(os.Symlink(f.path(dir), filepath.Join(f.host.function(m), "iommu_group")))
	}
}

// disk makes a block device of 1 MiB.
func (f *fake) disk(dir, name, id string) {
	f.put(dir+"/size", "2048\n")
	f.put(dir+"/dev", id+"\n")
	f.mkdir("sys/class/block")
	f.must(os.Symlink(f.path(dir), f.path("sys/class/block/"+name)))
}

// drive gives a function to a driver.
func (f *fake) drive(address, driver string) {
	link := filepath.Join(f.host.function(address), "driver")
	_ = os.Remove(link)
	if driver != "" {
		f.mkdir("sys/bus/pci/drivers/" + driver)
		f.must(os.Symlink(f.path("sys/bus/pci/drivers/"+driver), link))
	}
}

func (f *fake) writes(path, text string) error {
	name, _ := filepath.Rel(f.sys, path)
	text = strings.TrimSpace(text)
	f.wrote = append(f.wrote, filepath.Base(name)+"="+text)
	switch {
	case strings.HasSuffix(name, "/driver_override"):
		return os.WriteFile(path, []byte(text), 0o600)
	case strings.HasSuffix(name, "/driver/unbind"):
		f.drive(text, "")
	case name == "bus/pci/drivers_probe":
		b, _ := os.ReadFile(filepath.Join(f.host.function(text), "driver_override"))
		driver := string(b)
		if driver == "" {
			driver = "nvme"
		}
		if f.driver(text) == "" && !f.refuse[driver] {
			f.drive(text, driver)
		}
	default:
		return os.ErrNotExist
	}
	return nil
}

func (f *fake) claims(path string) (func(), error) {
	name := filepath.Base(path)
	if f.claimed[name] {
		return nil, unix.EBUSY
	}
	f.claimed[name] = true
	return func() { delete(f.claimed, name) }, nil
}

func TestListShowsControllersAndDisks(t *testing.T) {
	f := newFake(t)
	list, err := f.list()
	f.must(err)
	if len(list) != 2 || list[0].Address != first || list[1].Address != second {
		t.Fatalf("%+v", list)
	}
	a := list[0]
	if a.Vendor != 0x1b36 || a.Device != 0x10 || a.Driver != "nvme" || a.Model != "A Disk" || a.Serial != "s1" || a.Group != "7" || a.GroupType != "DMA-FQ" {
		t.Errorf("%+v", a)
	}
	want := []Disk{{Name: "nvme0n1", NSID: 1, Bytes: 1 << 20}, {Name: "nvme0n2", NSID: 7, Bytes: 1 << 20}}
	if !slices.EqualFunc(a.Disks, want, func(a, b Disk) bool {
		return a.Name == b.Name && a.NSID == b.NSID && a.Bytes == b.Bytes && len(a.Uses) == 0
	}) {
		t.Errorf("disks %+v", a.Disks)
	}
	if !a.Translated() || a.VFIO() || !list[1].VFIO() || len(list[1].Disks) != 0 {
		t.Errorf("%+v", list)
	}
	if _, err := f.lookup("00:02.0"); err == nil || !strings.Contains(err.Error(), "not an NVMe controller: PCI class 020000") {
		t.Errorf("a network card: %v", err)
	}
	if _, err := f.lookup("00:09.0"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "guestdrv list") {
		t.Errorf("nothing: %v", err)
	}
}

func TestBindAndBack(t *testing.T) {
	for _, driver := range []string{VFIO, None} {
		f := newFake(t)
		f.must(f.bind("00:03.0", driver))
		if got := f.driver(first); got != map[string]string{VFIO: VFIO, None: ""}[driver] {
			t.Errorf("driver %q after bind to %s", got, driver)
		}
		if len(f.claimed) != 0 {
			t.Errorf("still claimed: %v", f.claimed)
		}
		f.must(f.bind(first, driver)) // nothing to do
		f.must(f.unbind(first))
		if got := f.driver(first); got != "nvme" {
			t.Errorf("driver %q after unbind", got)
		}
		f.wrote = nil
		f.must(f.unbind(first))
		if len(f.wrote) != 0 {
			t.Errorf("unbind of what the kernel has wrote %v", f.wrote)
		}
	}
}

func TestWhatIsInUseIsNotTaken(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(f *fake)
		says string
	}{
		"mounted": {func(f *fake) {
			f.put("proc/self/mountinfo", `30 1 259:1 / /srv/my\040disk rw - ext4 /dev/nvme0n1p1 rw`+"\n")
		}, "nvme0n1p1 is mounted at /srv/my disk"},
		"mounted by btrfs": {func(f *fake) {
			f.put("dev/nvme0n2", "")
			f.must(os.Symlink("nvme0n2", f.path("dev/data")))
			f.put("proc/self/mountinfo", "30 1 0:44 /sub /data rw shared:1 - btrfs /dev/data rw\n")
		}, "nvme0n2 is mounted at /data"},
		"swap": {func(f *fake) {
			f.put("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 8 0 -2\n")
		}, "nvme0n1p1 is swap"},
		"held by dm": {func(f *fake) { f.mkdir("sys/class/block/nvme0n1/nvme0n1p1/holders/dm-0") }, "nvme0n1p1 is held by dm-0"},
		"held by md": {func(f *fake) { f.mkdir("sys/class/block/nvme0n2/holders/md0") }, "nvme0n2 is held by md0"},
		"loop":       {func(f *fake) { f.put("sys/block/loop3/loop/backing_file", "/dev/nvme0n2\n") }, "nvme0n2 is held by loop3"},
		"unseen":     {func(f *fake) { f.claimed["nvme0n2"] = true }, "nvme0n2 is held by something"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			tc.edit(f)
			claimed := len(f.claimed)
			err := f.bind(first, VFIO)
			if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want %q", err, tc.says)
			}
			if len(f.wrote) != 0 || f.driver(first) != "nvme" || len(f.claimed) != claimed {
				t.Errorf("refused, and yet: wrote %v, claimed %v", f.wrote, f.claimed)
			}
		})
	}
}

func TestDriverThatRefusesGivesTheFunctionBack(t *testing.T) {
	f := newFake(t)
	f.refuse[VFIO] = true
	if err := f.bind(first, VFIO); err == nil || !strings.Contains(err.Error(), "vfio-pci did not take it") {
		t.Errorf("got %v", err)
	}
	if got := f.driver(first); got != "nvme" {
		t.Errorf("driver %q, want the old one again", got)
	}
	// Not even asked: the function keeps its driver all the while.
	f.wrote = nil
	f.host.write = func(path, text string) error {
		if err := f.writes(path, text); strings.TrimSpace(text) == "" {
			return err
		}
		return unix.EACCES
	}
	if err := f.bind(first, None); !errors.Is(err, unix.EACCES) {
		t.Errorf("got %v", err)
	}
	if f.driver(first) != "nvme" || slices.Contains(f.wrote, "unbind="+first) {
		t.Errorf("wrote %v", f.wrote)
	}
}

func TestBindSaysWhatIsMissing(t *testing.T) {
	f := newFake(t)
	if err := f.bind(first, "nvidia"); err == nil {
		t.Error("any driver will do")
	}
	f.must(os.RemoveAll(f.path("sys/bus/pci/drivers/vfio-pci")))
	if err := f.bind(first, VFIO); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "modprobe vfio-pci") {
		t.Errorf("without the module: %v", err)
	}
	f.mkdir("sys/bus/pci/drivers/vfio-pci")
	f.must(os.Remove(filepath.Join(f.host.function(first), "iommu_group")))
	if err := f.bind(first, VFIO); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "--driver none") || !strings.Contains(err.Error(), "enable_unsafe_noiommu_mode") {
		t.Errorf("without an IOMMU: %v", err)
	}
	f.put("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
	f.must(f.bind(first, VFIO))
}

func TestAFunctionThatAProcessDrivesIsNotGivenBack(t *testing.T) {
	f := newFake(t)
	f.must(f.bind(first, None))
	// A way by sysfs locks the file that it maps.
	fd, err := unix.Open(filepath.Join(f.host.function(first), "resource0"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	f.must(err)
	f.must(unix.Flock(fd, unix.LOCK_EX))
	if err := f.unbind(first); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "a process drives it") {
		t.Errorf("got %v", err)
	}
	f.must(unix.Close(fd))
	f.must(f.unbind(first))
}

func TestOthersOfTheGroup(t *testing.T) {
	f := newFake(t)
	f.group("9", "DMA", "0000:00:02.0")
	f.function("0000:00:04.0", "0x010802", "vfio-pci")
	f.function("0000:00:01.0", "0x060400", "pcieport")
	dir := f.path("sys/kernel/iommu_groups/9")
	f.must(os.Symlink(dir, filepath.Join(f.host.function("0000:00:04.0"), "iommu_group")))
	f.mkdir("sys/kernel/iommu_groups/9/devices/0000:00:04.0")
	f.mkdir("sys/kernel/iommu_groups/9/devices/0000:00:01.0")
	got, err := f.lookup("00:04.0")
	f.must(err)
	if len(got.Others) != 1 || got.Others[0] != (Member{"0000:00:02.0", "e1000"}) {
		t.Errorf("others %+v", got.Others)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/a`: "/a", `/a\040b`: "/a b", `\134`: `\`, `/a\04`: `/a\04`, `\999`: `\999`, `\`: `\`} {
		if got := unescape(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestBlockUses: of each device that is asked about its own uses, and not those of others.
func TestBlockUses(t *testing.T) {
	f := newFake(t)
	f.put("proc/self/mountinfo", "30 1 259:1 / /srv rw - ext4 /dev/nvme0n1p1 rw\n")
	f.mkdir("sys/class/block/nvme0n2/holders/md0")
	f.put("sys/block/loop3/loop/backing_file", "/dev/nvme0n1p1\n")
	for _, x := range []struct{ names, want []string }{
		{[]string{"nvme0n1"}, nil},
		{[]string{"nvme0n1", "nvme0n1p1"}, []string{"nvme0n1p1 is mounted at /srv", "nvme0n1p1 is held by loop3"}},
		{[]string{"nvme0n2"}, []string{"nvme0n2 is held by md0"}},
		{nil, nil},
	} {
		if got, err := f.blockUses(x.names); err != nil || !slices.Equal(got, x.want) {
			t.Errorf("%v: %q, %v; want %q", x.names, got, err, x.want)
		}
	}
	f.must(os.Remove(f.path("proc/self/mountinfo")))
	if _, err := f.blockUses([]string{"nvme0n1"}); err == nil {
		t.Error("no error without the list of mounts")
	}
}
