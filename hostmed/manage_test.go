package hostmed

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// managed is a subsystem with two controllers whose guests may manage namespaces, and a third whose guest may not.
func managed(dir string) Config {
	var cc []ControllerConfig
	for _, name := range []string{"a", "b", "c"} {
		cc = append(cc, ControllerConfig{Socket: filepath.Join(dir, name), Management: name != "c"})
	}
	return Config{Subsystems: []SubsystemConfig{{
		NQN: "nqn.2026-11.test:managed", Controllers: cc, Pool: PoolConfig{Dir: filepath.Join(dir, "pool"), Capacity: 64 << 20},
		Namespaces: []NamespaceConfig{{NSID: 1, Spec: "mem:size=1MiB", Controllers: []uint16{1, 2}}, {NSID: 2, Spec: "mem:size=1MiB", Controllers: []uint16{1}}},
	}}}
}

func createCmd(ask nvme.IdentifyNamespace) (nvme.Command, []byte) {
	return nvme.Command{Opcode: nvme.AdminNamespaceManagement, CDW10: nvme.NamespaceCreate}, slices.Clone(ask.Bytes()[:])
}

func create(t testing.TB, c *guestdrv.Controller, ask nvme.IdentifyNamespace) (nsid uint32) {
	t.Helper()
	cmd, data := createCmd(ask)
	return admin(t, c, cmd, data)
}

func attachCmd(nsid uint32, sel uint32, ids ...uint16) (nvme.Command, []byte) {
	l := nvme.ControllerList{Count: uint16(len(ids))}
	copy(l.ID[:], ids)
	return nvme.Command{Opcode: nvme.AdminNamespaceAttachment, NSID: nsid, CDW10: sel}, slices.Clone(l.Bytes()[:])
}

func attachTo(t testing.TB, c *guestdrv.Controller, nsid uint32, ids ...uint16) {
	t.Helper()
	cmd, data := attachCmd(nsid, nvme.NamespaceAttach, ids...)
	admin(t, c, cmd, data)
}

func deleteCmd(nsid uint32) nvme.Command {
	return nvme.Command{Opcode: nvme.AdminNamespaceManagement, CDW10: nvme.NamespaceDelete, NSID: nsid}
}

func controllers(t testing.TB, c *guestdrv.Controller, cns nvme.CNS, nsid uint32, from uint16) []uint16 {
	t.Helper()
	cmd := nvme.Command{Opcode: nvme.AdminIdentify, NSID: nsid, CDW10: uint32(cns) | uint32(from)<<16}
	var l nvme.ControllerList
	admin(t, c, cmd, l.Bytes()[:])
	return slices.Clone(l.ID[:l.Count])
}

func identifyController(t testing.TB, c *guestdrv.Controller) (id nvme.IdentifyController) {
	t.Helper()
	copy(id.Bytes()[:], identify(t, c, nvme.CNSController, 0))
	return id
}

// TestNamespaceManagement is the life of a namespace that a guest makes, and that outlives hostmed.
func TestNamespaceManagement(t *testing.T) {
	dir := t.TempDir()
	cfg := managed(dir)
	cfg.Logger = testrig.Log(t)
	stop := start(t, cfg)
	a, logA := watched(t, filepath.Join(dir, "a"))
	b, logB := watched(t, filepath.Join(dir, "b"))

	if id := identifyController(t, a); id.OACS&nvme.OACSNamespaces == 0 || id.TNVMCAP.Lo != 64<<20 || id.UNVMCAP.Lo != 64<<20 || id.NN < 16 {
		t.Errorf("OACS %#x TNVMCAP %d UNVMCAP %d NN %d", id.OACS, id.TNVMCAP.Lo, id.UNVMCAP.Lo, id.NN)
	}
	var common nvme.IdentifyNamespace
	copy(common.Bytes()[:], identify(t, a, nvme.CNSNamespace, nvme.NSIDAll))
	if common.NLBAF.Count() != 2 || common.LBAF[0].LBADS != 9 || common.LBAF[1].LBADS != 12 || common.NSZE != 0 {
		t.Errorf("what all namespaces have in common: %d formats, %v", common.NLBAF.Count(), common.LBAF[:2])
	}
	nsid := create(t, a, nvme.IdentifyNamespace{NSZE: 1000, NCAP: 1000, FLBAS: 1, NMIC: nvme.NMICShared})
	if nsid != 3 {
		t.Errorf("NSID %d, the lowest free one is 3", nsid)
	}
	if got := nsids(t, a, nvme.CNSAllocatedNamespaces); !slices.Equal(got, []uint32{1, 2, 3}) {
		t.Errorf("allocated %v", got)
	}
	if got := nsids(t, a, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 2}) {
		t.Errorf("active %v", got)
	}
	if id := identifyNamespace(t, a, nsid); id.NSZE != 0 {
		t.Error("it is not attached, and Identify Namespace shows it")
	}
	var id nvme.IdentifyNamespace
	copy(id.Bytes()[:], identify(t, a, nvme.CNSAllocatedNamespace, nsid))
	if id.NSZE != 1000 || id.NVMCAP.Lo != 1000*4096 || id.FLBAS != 1 || id.NMIC != nvme.NMICShared {
		t.Errorf("NSZE %d NVMCAP %d FLBAS %d NMIC %d", id.NSZE, id.NVMCAP.Lo, id.FLBAS, id.NMIC)
	}
	if id := identifyController(t, b); id.UNVMCAP.Lo != 64<<20-1000*4096 {
		t.Errorf("UNVMCAP %d", id.UNVMCAP.Lo)
	}
	attachTo(t, a, nsid, 1, 2)
	for name, log := range map[string]func() string{"first": logA, "second": logB} {
		eventually(t, "the "+name+" guest hears of it", func() bool { return strings.Contains(log(), "Namespace Attribute Changed") })
	}
	for _, c := range []*guestdrv.Controller{a, b} {
		if got := nsids(t, c, nvme.CNSActiveNamespaces); !slices.Contains(got, nsid) {
			t.Errorf("active %v", got)
		}
	}
	if got := controllers(t, a, nvme.CNSNamespaceControllers, nsid, 0); !slices.Equal(got, []uint16{1, 2}) {
		t.Errorf("controllers of it %v", got)
	}
	if got := controllers(t, a, nvme.CNSControllers, 0, 2); !slices.Equal(got, []uint16{2, 3}) {
		t.Errorf("controllers from 2: %v", got)
	}
	for _, c := range []*guestdrv.Controller{a, b} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	a = open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	ns, err := a.Namespace(nsid)
	if err != nil {
		t.Fatal(err)
	}
	want := random(t, 4096)
	if _, err := ns.WriteAt(want, 999*4096); err != nil {
		t.Fatal(err)
	}
	uuid := id.NGUID
	if err := a.Close(); err != nil {
		t.Error(err)
	}

	// The next hostmed finds it, attached as it was, and its data.
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Logger = testrig.Log(t)
	start(t, cfg)
	a, b = open(t, filepath.Join(dir, "a"), guestdrv.Options{}), open(t, filepath.Join(dir, "b"), guestdrv.Options{})
	if ns, err = b.Namespace(nsid); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if _, err := ns.ReadAt(got, 999*4096); err != nil || string(got) != string(want) {
		t.Errorf("other data after the restart, %v", err)
	}
	if id := identifyNamespace(t, a, nsid); id.NGUID != uuid || id.NSZE != 1000 {
		t.Errorf("another namespace after the restart: %+v", id.NGUID)
	}

	cmd, data := attachCmd(nsid, nvme.NamespaceDetach, 1)
	admin(t, a, cmd, data)
	if got := nsids(t, a, nvme.CNSActiveNamespaces); slices.Contains(got, nsid) {
		t.Errorf("active %v", got)
	}
	if _, err := ns.ReadAt(got, 0); err != nil {
		t.Errorf("the other controller has it still: %v", err)
	}
	admin(t, a, deleteCmd(nsid), nil)
	// By the controller, or, once it has heard of the event, by the driver.
	if _, err := ns.ReadAt(got, 0); nvme.StatusOf(err).Code() != nvme.StatusInvalidField && !errors.Is(err, guestdrv.ErrNoNamespace) {
		t.Errorf("read of a namespace that is deleted: %v", err)
	}
	if got := nsids(t, a, nvme.CNSAllocatedNamespaces); !slices.Equal(got, []uint32{1, 2}) {
		t.Errorf("allocated %v", got)
	}
	if files, err := filepath.Glob(dir + "/pool/*.img"); err != nil || len(files) != 0 {
		t.Errorf("files are left: %v, %v", files, err)
	}
	for range 3 {
		create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8})
	}
	admin(t, a, deleteCmd(nvme.NSIDAll), nil)
	if got := nsids(t, a, nvme.CNSAllocatedNamespaces); !slices.Equal(got, []uint32{1, 2}) {
		t.Errorf("allocated after all were deleted: %v", got)
	}
}

func TestNamespaceManagementErrors(t *testing.T) {
	dir := t.TempDir()
	serve(t, managed(dir))
	a, c := open(t, filepath.Join(dir, "a"), guestdrv.Options{}), open(t, filepath.Join(dir, "c"), guestdrv.Options{})
	private := create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8})
	shared := create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8, NMIC: nvme.NMICShared})
	attachTo(t, a, private, 1)
	attachTo(t, a, shared, 2)

	type command struct {
		cmd  nvme.Command
		data []byte
	}
	with := func(cmd nvme.Command, data []byte) command { return command{cmd, data} }
	made := func(ask nvme.IdentifyNamespace) command { return with(createCmd(ask)) }
	list := func(nsid, sel uint32, ids ...uint16) command { return with(attachCmd(nsid, sel, ids...)) }
	on, off := uint32(nvme.NamespaceAttach), uint32(nvme.NamespaceDetach)
	tooLong := list(shared, on, 1)
	tooLong.data[0], tooLong.data[1] = 0x00, 0x08
	otherSet := made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 8})
	otherSet.cmd.CDW11 = uint32(nvme.CSIZoned) << 24
	for name, x := range map[string]struct {
		command
		want nvme.Status
	}{
		"create, no size":                {made(nvme.IdentifyNamespace{}), nvme.StatusInvalidField},
		"create, more cap than size":     {made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 9}), nvme.StatusInvalidField},
		"create, thin":                   {made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 7}), nvme.StatusThinProvisioningNotSupported},
		"create, no such format":         {made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 8, FLBAS: 2}), nvme.StatusInvalidFormat},
		"create, protected":              {made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 8, DPS: 1}), nvme.StatusInvalidField},
		"create, NMIC":                   {made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 8, NMIC: 2}), nvme.StatusInvalidField},
		"create, in a set":               {made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 8, NVMSETID: 1}), nvme.StatusInvalidField},
		"create, too large":              {made(nvme.IdentifyNamespace{NSZE: 1 << 20, NCAP: 1 << 20}), nvme.StatusNamespaceInsufficientCapacity},
		"create, far too large":          {made(nvme.IdentifyNamespace{NSZE: 1<<64 - 1, NCAP: 1<<64 - 1, FLBAS: 1}), nvme.StatusNamespaceInsufficientCapacity},
		"create, zoned":                  {otherSet, nvme.StatusCommandSetNotSupported},
		"management, no such SEL":        {with(nvme.Command{Opcode: nvme.AdminNamespaceManagement, CDW10: 2}, nil), nvme.StatusInvalidField},
		"delete, none":                   {with(deleteCmd(99), nil), nvme.StatusInvalidNamespace},
		"delete, 0":                      {with(deleteCmd(0), nil), nvme.StatusInvalidNamespace},
		"delete, the operator's":         {with(deleteCmd(1), nil), nvme.StatusOperationDenied},
		"attach, none":                   {list(99, on, 1), nvme.StatusInvalidNamespace},
		"attach, all":                    {list(nvme.NSIDAll, on, 1), nvme.StatusInvalidNamespace},
		"attach, no such SEL":            {list(shared, 2, 1), nvme.StatusInvalidField},
		"attach, to nobody":              {list(shared, on), nvme.StatusControllerListInvalid},
		"attach, to too many":            {tooLong, nvme.StatusControllerListInvalid},
		"attach, no controller":          {list(shared, on, 1, 9), nvme.StatusControllerListInvalid},
		"attach, out of order":           {list(shared, on, 3, 1), nvme.StatusControllerListInvalid},
		"attach, twice in the list":      {list(shared, on, 1, 1), nvme.StatusControllerListInvalid},
		"attach, attached":               {list(shared, on, 1, 2), nvme.StatusNamespaceAlreadyAttached},
		"attach, private":                {list(private, on, 2), nvme.StatusNamespacePrivate},
		"attach, the operator's private": {list(2, on, 2), nvme.StatusNamespacePrivate},
		"detach, not attached":           {list(shared, off, 1), nvme.StatusNamespaceNotAttached},
		"detach, one of two":             {list(shared, off, 1, 2), nvme.StatusNamespaceNotAttached},
		"identify, no id":                {with(nvme.Command{Opcode: nvme.AdminIdentify, CDW10: uint32(nvme.CNSAllocatedNamespace)}, make([]byte, 4096)), nvme.StatusInvalidNamespace},
		"identify, controllers of none":  {with(nvme.Command{Opcode: nvme.AdminIdentify, NSID: 99, CDW10: uint32(nvme.CNSNamespaceControllers)}, make([]byte, 4096)), nvme.StatusInvalidNamespace},
		"identify, other set":            {with(nvme.Command{Opcode: nvme.AdminIdentify, NSID: 1, CDW10: uint32(nvme.CNSCSIAllocatedNamespace), CDW11: 2 << 24}, make([]byte, 4096)), nvme.StatusInvalidField},
	} {
		if _, err := tryAdmin(a, x.cmd, x.data); nvme.StatusOf(err).Code() != x.want {
			t.Errorf("%s: %v, want %v", name, err, x.want)
		}
	}
	// None of them did anything.
	if got := controllers(t, a, nvme.CNSNamespaceControllers, shared, 0); !slices.Equal(got, []uint16{2}) {
		t.Errorf("controllers %v", got)
	}
	// Where the operator does not allow it there is no such command.
	if id := identifyController(t, c); id.OACS&nvme.OACSNamespaces != 0 || id.TNVMCAP.Lo != 0 {
		t.Errorf("OACS %#x TNVMCAP %d", id.OACS, id.TNVMCAP.Lo)
	}
	for _, x := range []command{made(nvme.IdentifyNamespace{NSZE: 8, NCAP: 8}), list(shared, on, 1)} {
		if _, err := tryAdmin(c, x.cmd, x.data); nvme.StatusOf(err).Code() != nvme.StatusInvalidOpcode {
			t.Errorf("not allowed: %v", err)
		}
	}
}

func TestNamespaceIDsRunOut(t *testing.T) {
	dir := t.TempDir()
	serve(t, managed(dir))
	a := open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	for {
		cmd, data := createCmd(nvme.IdentifyNamespace{NSZE: 1, NCAP: 1})
		nsid, err := tryAdmin(a, cmd, data)
		if err == nil {
			continue
		}
		if nvme.StatusOf(err).Code() != nvme.StatusNamespaceIDUnavailable {
			t.Errorf("after namespace %d: %v", nsid, err)
		}
		break
	}
	if got := nsids(t, a, nvme.CNSAllocatedNamespaces); len(got) != 128 || got[127] != 128 {
		t.Errorf("%d are allocated", len(got))
	}
	admin(t, a, deleteCmd(77), nil)
	if nsid := create(t, a, nvme.IdentifyNamespace{NSZE: 1, NCAP: 1}); nsid != 77 {
		t.Errorf("NSID %d, want the one that is free", nsid)
	}
}

// TestPoolThatCannotBeRead: a file that is missing costs that namespace alone, and its id stays taken.
func TestPoolThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	cfg := managed(dir)
	cfg.Logger = testrig.Log(t)
	stop := start(t, cfg)
	a := open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	first, second := create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8}), create(t, a, nvme.IdentifyNamespace{NSZE: 16, NCAP: 16})
	attachTo(t, a, second, 1)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(dir + "/pool/*.img")
	if err != nil || len(files) != 2 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.Size() == 8*512 {
			if err := os.Rename(f, f+".lost"); err != nil {
				t.Fatal(err)
			}
		}
	}
	cfg.Logger = testrig.Log(t)
	stop = start(t, cfg)
	a = open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	if got := nsids(t, a, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 2, second}) {
		t.Errorf("active %v", got)
	}
	if nsid := create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8}); nsid == first {
		t.Error("the id of the namespace that is missing was given away")
	}
	admin(t, a, deleteCmd(first), nil)
	if nsid := create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8}); nsid != first {
		t.Errorf("NSID %d, want %d, which is free now", nsid, first)
	}
	a.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Subsystems[0].Namespaces = append(cfg.Subsystems[0].Namespaces, NamespaceConfig{NSID: second, Spec: "mem:size=1MiB", Controllers: []uint16{1}})
	if m, err := New(cfg); err == nil {
		m.Close()
		t.Error("the configuration has the id of a namespace that a guest has created, and it starts")
	} else if !strings.Contains(err.Error(), "choose another nsid") {
		t.Error(err)
	}
}

// TestReloadAndCreatedNamespaces: what a guest has made and attached stays, whatever a reload does; its ids are taken.
func TestReloadAndCreatedNamespaces(t *testing.T) {
	dir := t.TempDir()
	m := serve(t, managed(dir))
	a := open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	nsid := create(t, a, nvme.IdentifyNamespace{NSZE: 8, NCAP: 8})
	attachTo(t, a, nsid, 1)
	cmd, data := attachCmd(2, nvme.NamespaceDetach, 1)
	admin(t, a, cmd, data)
	cfg := managed(dir)
	cfg.Subsystems[0].Namespaces = cfg.Subsystems[0].Namespaces[1:] // namespace 1 goes
	if err := m.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if got := nsids(t, a, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{nsid}) {
		t.Errorf("active %v, want what the guest has made and left attached, %d", got, nsid)
	}
	cfg.Subsystems[0].Namespaces = append(cfg.Subsystems[0].Namespaces, NamespaceConfig{NSID: nsid, Spec: "mem:size=1MiB", Controllers: []uint16{1}})
	if err := m.Reload(cfg); err == nil || !strings.Contains(err.Error(), "a guest has created") {
		t.Errorf("a namespace under the id of one that a guest has created: %v", err)
	}
	cfg = managed(dir)
	cfg.Subsystems[0].Pool.Capacity *= 2
	if err := m.Reload(cfg); err == nil || !strings.Contains(err.Error(), "pool") {
		t.Errorf("another capacity: %v", err)
	}
}
