package hostmed

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/spin"
)

// Limits of each controller, which every Identify and CAP says too, and what a ControllerConfig's zeroes mean.
const (
	maxQueues = 64
	maxDepth  = 4096
	mdtsBytes = 1 << 20
	minMDTS   = 8 << 10
	maxDSTRD  = 4
	maxCNTLID = 0xffef
)

// Limits of Config.Poll.
const (
	minPoll = spin.Min
	maxPoll = 100 * time.Millisecond
)

// checkPoll says what is wrong with a poll limit.
func checkPoll(d time.Duration) error {
	if d != 0 && (d < minPoll || d > maxPoll) {
		return fmt.Errorf("poll: %v is not from %v to %v: about twice what it takes to wake a sleeping worker is right", d, minPoll, maxPoll)
	}
	return nil
}

// Config is what a Mediator serves: Subsystems, or, for the simple case, Controllers that say their namespaces themselves.
type Config struct {
	Subsystems  []SubsystemConfig
	Controllers []ControllerConfig // in subsystems of their own, see ControllerConfig.Namespaces
	CPUs        []int              // one worker is pinned to each; empty: half of the cores' number of workers, not pinned
	NoSpin      bool               // workers never poll an empty queue: for measurements
	Poll        time.Duration      // how long a worker polls an empty queue at the most, 10 us to 100 ms; 0: 250 us
	State       string             // directory of what has to outlive hostmed; empty: nothing does
	NoSockets   bool               // no socket is made: ControllerConfig.Socket is but the name that Attach takes
	// UnsafeNoIOMMU lets namespaces vfio: be on devices that no IOMMU keeps from all memory of the machine. They are refused otherwise. For each the program is started
	// once more, as what stops the device if this process is killed; that never gets to main.
	UnsafeNoIOMMU bool
	Control       string // path of the control socket, empty: none. Package api serves it; here it only cannot change by Reload
	LogLevel      string // what Logger should say at least; empty: left alone
	Logger        hclog.Logger

	open         func(backend.Spec) (backend.Backend, error) // backend.OpenSpec, but for tests
	openPatience time.Duration                               // for it
}

// SubsystemConfig is one NVM subsystem. Empty names are made from the first controller's socket, so they stay the same over
// restarts.
type SubsystemConfig struct {
	NQN, Serial, Model string
	Controllers        []ControllerConfig
	Namespaces         []NamespaceConfig
	Pool               PoolConfig
}

// PoolConfig is where namespaces are made that guests ask for. Each is a sparse file in Dir, and what they are is kept there too.
type PoolConfig struct {
	Dir      string // empty: guests create none
	Capacity uint64 // bytes of all of them
}

// ControllerConfig is one virtual controller behind one socket.
type ControllerConfig struct {
	ID        uint16 // CNTLID, 1 to 65519; 0: its place in the list, from 1
	Socket    string // path of the unix socket
	Doorbells DoorbellMode
	DSTRD     uint8  // doorbells are 4 << DSTRD bytes apart, 0 to 4
	Queues    uint16 // I/O queue pairs, 1 to 64; 0: 64
	Depth     uint32 // entries of a queue, 2 to 65536; 0: 4096
	MDTS      uint64 // longest transfer in bytes, a power of two from 8 KiB to 1 MiB; 0: 1 MiB
	// Management lets the guest attach, detach, create and delete namespaces of the subsystem. It creates them in the subsystem's
	// Pool, and deletes only what was created there.
	Management bool
	Limits     Limits // of what the guest does on all its namespaces

	// Namespaces, in Config.Controllers only, are SPECs (see backend.Open); NSID 1 is the first. Controllers that name the same
	// SPEC share the namespace, and with it the subsystem.
	Namespaces []string
}

// NamespaceConfig is one namespace of a subsystem.
type NamespaceConfig struct {
	NSID        uint32   // 1 to 1024; 0: its place in the list, from 1
	Spec        string   // see backend.Open
	Shared      bool     // may be attached to several controllers; implied if it is attached to several
	Controllers []uint16 // ids of those that it is attached to; nil: all; empty: none
	Limits      Limits   // of what all controllers do on it
	UUID        string   // in place of the one made from Spec, 8-4-4-4-12 digits; empty: that one

	uuid [16]byte // UUID
}

// subsystems puts c in order: every controller in its subsystem, zeroes replaced, everything checked that can be without opening
// anything.
func (c *Config) subsystems() ([]SubsystemConfig, error) {
	if err := checkPoll(c.Poll); err != nil {
		return nil, err
	}
	list, err := grouped(c.Controllers)
	if err != nil {
		return nil, err
	}
	list = append(slices.Clone(c.Subsystems), list...)
	if len(list) == 0 {
		return nil, errors.New("no controller: name at least one socket (--socket PATH)")
	}
	for i := range list {
		if err := list[i].complete(fmt.Sprintf("subsystem[%d]", i)); err != nil {
			return nil, err
		}
	}
	return list, checkUnique(list, c.Control)
}

// grouped makes subsystems of controllers: those that name one SPEC share it, and so are in one. A SPEC that one controller names
// twice is two namespaces.
func grouped(controllers []ControllerConfig) ([]SubsystemConfig, error) {
	type medium struct {
		spec string
		nth  int
	}
	in := make([]int, len(controllers)) // subsystem by controller
	media := make([]map[medium]uint32, len(controllers))
	for i, c := range controllers {
		in[i] = i
		if len(c.Namespaces) == 0 {
			return nil, fmt.Errorf("controller %s has no namespace: name at least one (--namespace SPEC)", c.Socket)
		}
		media[i] = map[medium]uint32{}
		times := map[string]int{}
		for n, spec := range c.Namespaces {
			media[i][medium{spec, times[spec]}] = uint32(n + 1)
			times[spec]++
		}
		for j := range i {
			for m := range media[i] {
				if _, ok := media[j][m]; ok {
					old := in[i]
					for k := range in[:i+1] {
						if in[k] == old {
							in[k] = in[j]
						}
					}
				}
			}
		}
	}
	var list []SubsystemConfig
	for first := range controllers {
		var s SubsystemConfig
		nsids := map[medium]uint32{}
		at := map[uint32]*NamespaceConfig{}
		for i, c := range controllers {
			if in[i] != in[first] || slices.Contains(in[:first], in[first]) {
				continue
			}
			id := uint16(len(s.Controllers) + 1)
			for m, nsid := range media[i] {
				was, seen := nsids[m]
				if seen && was != nsid || !seen && at[nsid] != nil {
					return nil, fmt.Errorf("controllers share a namespace under different ids (%s): give each the same --namespace list, or use a configuration file", m.spec)
				}
				nsids[m] = nsid
				if at[nsid] == nil {
					at[nsid] = &NamespaceConfig{NSID: nsid, Spec: m.spec}
				}
				at[nsid].Controllers = append(at[nsid].Controllers, id)
			}
			c.ID, c.Namespaces = id, nil
			s.Controllers = append(s.Controllers, c)
		}
		if len(s.Controllers) == 0 {
			continue
		}
		for nsid := uint32(1); len(s.Namespaces) < len(at); nsid++ {
			if n := at[nsid]; n != nil {
				s.Namespaces = append(s.Namespaces, *n)
			}
		}
		list = append(list, s)
	}
	return list, nil
}

// complete replaces zeroes and checks what s says. path is for fieldError.
func (s *SubsystemConfig) complete(path string) error {
	if len(s.Controllers) == 0 {
		return wrongField(path, "the subsystem has no controller: give it one, with a socket")
	}
	s.Controllers, s.Namespaces = slices.Clone(s.Controllers), slices.Clone(s.Namespaces)
	serial, nqn := identity(s.Controllers[0].Socket)
	set := func(field *string, def string) {
		if *field == "" {
			*field = def
		}
	}
	set(&s.NQN, nqn)
	set(&s.Serial, serial)
	set(&s.Model, "shadowbell NVMe")
	switch {
	case len(s.NQN) > 223 || !strings.HasPrefix(s.NQN, "nqn.") || !printable(s.NQN):
		return wrongField(path+".nqn", "nqn: %q is none: it begins with nqn., as in nqn.2026-11.org.example:disks, and has at most 223 characters", s.NQN)
	case len(s.Serial) > 20 || !printable(s.Serial):
		return wrongField(path+".serial", "serial: %q: at most 20 printable ASCII characters", s.Serial)
	case len(s.Model) > 40 || !printable(s.Model):
		return wrongField(path+".model", "model: %q: at most 40 printable ASCII characters", s.Model)
	}
	if (s.Pool.Dir == "") != (s.Pool.Capacity == 0) {
		return wrongField(path+".pool", "a pool has a directory and a capacity, as in pool = { dir = \"/srv/pool\", capacity = \"1TiB\" }")
	}
	if s.Pool.Dir != "" && !slices.ContainsFunc(s.Controllers, func(c ControllerConfig) bool { return c.Management }) {
		return wrongField(path+".pool", "no guest may create namespaces in the pool: give a controller management = true")
	}
	for i := range s.Controllers {
		c, path := &s.Controllers[i], fmt.Sprintf("%s.controller[%d]", path, i)
		if err := c.complete(i, path); err != nil {
			return err
		}
		if slices.ContainsFunc(s.Controllers[:i], func(o ControllerConfig) bool { return o.ID == c.ID }) {
			return wrongField(path+".id", "controller %s: id %d is another controller's of its subsystem: choose another", c.Socket, c.ID)
		}
	}
	for i := range s.Namespaces {
		if err := s.completeNamespace(i, fmt.Sprintf("%s.namespace[%d]", path, i)); err != nil {
			return err
		}
	}
	return nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

func (c *ControllerConfig) complete(i int, path string) error {
	if c.ID == 0 {
		c.ID = uint16(i + 1)
	}
	if c.Queues == 0 {
		c.Queues = maxQueues
	}
	if c.Depth == 0 {
		c.Depth = maxDepth
	}
	if c.MDTS == 0 {
		c.MDTS = mdtsBytes
	}
	say := func(field, format string, a ...any) error {
		return wrongField(path+"."+field, "controller %s: %w", c.Socket, fmt.Errorf(format, a...))
	}
	switch {
	case len(c.Namespaces) > 0:
		return say("namespaces", "its namespaces are the subsystem's: put them there")
	case c.ID > maxCNTLID:
		return say("id", "id %d: controller ids are 1 to %d", c.ID, maxCNTLID)
	case c.DSTRD > maxDSTRD:
		return say("dstrd", "dstrd %d: the doorbell stride is 0 to %d", c.DSTRD, maxDSTRD)
	case c.Queues > maxQueues:
		return say("queues", "queues %d: a controller has 1 to %d", c.Queues, maxQueues)
	case c.Depth < 2 || c.Depth > 1<<16:
		return say("depth", "depth %d: a queue has 2 to 65536 entries", c.Depth)
	case c.MDTS < minMDTS || c.MDTS > mdtsBytes || bits.OnesCount64(c.MDTS) != 1:
		return say("mdts", "mdts %d: a power of two from 8KiB to 1MiB", c.MDTS)
	}
	if err := checkLimits(c.Limits, path+".limits"); err != nil {
		return err
	}
	if err := checkMode(c.Doorbells, runtime.GOARCH); err != nil {
		return say("doorbells", "%w", err)
	}
	return nil
}

func (s *SubsystemConfig) completeNamespace(i int, path string) error {
	n := &s.Namespaces[i]
	if n.NSID == 0 {
		n.NSID = uint32(i + 1)
	}
	if n.NSID > subsys.MaxNSID {
		return wrongField(path+".nsid", "namespace %s: nsid %d: namespace ids are 1 to %d", n.Spec, n.NSID, subsys.MaxNSID)
	}
	for _, o := range s.Namespaces[:i] {
		if o.NSID == n.NSID {
			return wrongField(path+".nsid", "nsid %d is given to two namespaces, %s and %s: choose another for one", n.NSID, o.Spec, n.Spec)
		}
	}
	if _, err := backend.ParseSpec(n.Spec); err != nil {
		return wrongField(path+".spec", "%w", err)
	}
	if err := checkLimits(n.Limits, path+".limits"); err != nil {
		return err
	}
	if n.UUID != "" {
		var ok bool
		if n.uuid, ok = nvme.ParseUUID(n.UUID); !ok {
			return wrongField(path+".uuid", "namespace %d: uuid %q: it is 8-4-4-4-12 hexadecimal digits and not zero (uuidgen makes one)", n.NSID, n.UUID)
		}
	}
	var ids []uint16
	for _, c := range s.Controllers {
		ids = append(ids, c.ID)
	}
	if n.Controllers == nil {
		n.Controllers = ids
	}
	for j, id := range n.Controllers {
		if !slices.Contains(ids, id) {
			return wrongField(path+".controllers", "namespace %d is attached to controller %d, which does not exist: the controllers are %v", n.NSID, id, ids)
		}
		if slices.Contains(n.Controllers[:j], id) {
			return wrongField(path+".controllers", "namespace %d is attached to controller %d twice: name it once", n.NSID, id)
		}
	}
	n.Shared = n.Shared || len(n.Controllers) > 1
	return nil
}

// checkUnique finds what only one subsystem may have: socket and NQN.
func checkUnique(list []SubsystemConfig, control string) error {
	sockets, nqns := map[string]bool{}, map[string]bool{}
	for i, s := range list {
		path := fmt.Sprintf("subsystem[%d]", i)
		if nqns[s.NQN] {
			return wrongField(path+".nqn", "NQN %s is given to two subsystems: choose another for one", s.NQN)
		}
		nqns[s.NQN] = true
		for j, c := range s.Controllers {
			if sockets[c.Socket] {
				return wrongField(fmt.Sprintf("%s.controller[%d].socket", path, j), "socket %s is given to two controllers: choose another path for one", c.Socket)
			}
			sockets[c.Socket] = true
			if c.Socket == control && control != "" {
				return wrongField("control", "control: %s is the socket of a controller too: choose another path for one", control)
			}
		}
	}
	return nil
}

// identity is what makes the subsystem of a socket distinct: stable over restarts, since a guest's
// configuration may name it.
func identity(socket string) (serial, nqn string) {
	sum := sha256.Sum256([]byte(socket))
	return fmt.Sprintf("SB%016X", sum[:8]), fmt.Sprintf("nqn.2026-11.io.shadowbell:%x", sum[:16])
}

// checkMode refuses mapped doorbells where a guest's uncached stores and this process's cached loads need
// not agree (R7).
func checkMode(mode DoorbellMode, arch string) error {
	if mode == Mmap && arch != "amd64" {
		return fmt.Errorf("doorbells=mmap needs x86-64, this is %s: a guest maps the page as device memory and hostmed as normal memory; use shadow or trap", arch)
	}
	return nil
}
