package suite

import (
	"context"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// facts are what a controller says of itself, read once before the cases.
type facts struct {
	cap      nvme.CAP
	vs       nvme.Version
	id       nvme.IdentifyController
	active   []uint32
	queues   granted
	vectors  int
	mapped   bool // doorbells are memory that the controller polls
	isolated bool // addresses are those of an I/O address space, not of the machine

	nsid   uint32 // under test; 0: there is none
	ns     nvme.IdentifyNamespace
	lba    uint64 // bytes of a block
	blocks uint64
	noNS   string // why there is none
}

// probe reads the facts.
func (r *rig) probe(ctx context.Context) error {
	outcome, seen := r.guard(ctx, setup{disabled: true}, func(c *ctl) {
		f := &r.facts
		*f = facts{cap: nvme.CAP(c.read64(nvme.RegCAP)), vs: nvme.Version(c.read32(nvme.RegVS)), vectors: len(r.irqs)}
		c.check(f.cap.MPSMIN() == 0, "the smallest memory page is %d bytes, the suite works with 4096", 4096<<f.cap.MPSMIN())
		c.enable(setup{})
		f.id = *c.identifyController()
		f.active = c.activeAfter(0)
		f.queues = c.granted()
		if d, ok := r.dev.(interface{ Isolated() bool }); ok {
			f.isolated = d.Isolated()
		}
		f.mapped = c.bell(nvme.SQTailDoorbell(1, f.cap.DSTRD())).Mapped != nil
		r.choose(c)
	})
	if outcome == Failed {
		return fmt.Errorf("%w: %s", errFatal, seen)
	}
	if want := r.cfg.NSID; want != 0 && r.facts.nsid != want {
		return fmt.Errorf("namespace %d: %w: %s", want, ErrNamespace, r.facts.noNS)
	}
	return nil
}

// choose takes the namespace under test.
func (r *rig) choose(c *ctl) {
	f := &r.facts
	f.noNS = "no such active namespace"
	if r.cfg.NSID == 0 {
		f.noNS = "there is no active namespace"
	}
	for _, nsid := range f.active {
		if r.cfg.NSID != 0 && nsid != r.cfg.NSID {
			continue
		}
		ns := c.identifyNamespace(nsid)
		size, ok := ns.BlockSize()
		switch {
		case !ok || size > pageSize || ns.Format().MS != 0:
			f.noNS = fmt.Sprintf("namespace %d has blocks of %d bytes and %d of metadata; the suite knows 512 to 4096 without metadata", nsid, size, ns.Format().MS)
		case ns.NSZE*uint64(size) < leastSize:
			f.noNS = fmt.Sprintf("namespace %d is smaller than %d bytes", nsid, leastSize)
		case r.cfg.NSID == 0 && ns.NSATTR&nvme.NSATTRWriteProtected != 0:
			f.noNS = fmt.Sprintf("namespace %d is write protected", nsid)
		default:
			f.nsid, f.ns, f.lba, f.blocks = nsid, *ns, uint64(size), ns.NSZE
			return
		}
	}
}

// leastSize is how large the namespace under test must be in bytes.
const leastSize = 8 << 20

// need says why a case does not apply to a controller, or "".
type need func(f *facts) string

func bitNeed(what string, has func(f *facts) bool) []need {
	return []need{func(f *facts) string {
		if has(f) {
			return ""
		}
		return what
	}}
}

func oncs(bit uint16, name string) []need {
	return bitNeed("ONCS."+name+" is 0", func(f *facts) bool { return f.id.ONCS&bit != 0 })
}

func oacs(bit uint16, name string) []need {
	return bitNeed("OACS."+name+" is 0", func(f *facts) bool { return f.id.OACS&bit != 0 })
}

func lpa(bit uint8, name string) []need {
	return bitNeed("LPA."+name+" is 0", func(f *facts) bool { return f.id.LPA&bit != 0 })
}

// version is for what came with an NVMe version; a controller may say that it is older.
func version(major uint16, minor uint8) []need {
	v := nvme.MakeVersion(major, minor, 0)
	return bitNeed(fmt.Sprintf("VS is below %v", v), func(f *facts) bool { return f.vs >= v })
}

var (
	needNS     = []need{func(f *facts) string { return noReason(f.nsid != 0, f.noNS) }}
	needNSSR   = bitNeed("CAP.NSSRS is 0", func(f *facts) bool { return f.cap.NSSRS() })
	needMDTS   = bitNeed("MDTS is 0: there is no limit", func(f *facts) bool { return f.id.MDTS != 0 })
	needIOCS   = bitNeed("CAP.CSS bit 6 is 0", func(f *facts) bool { return f.cap.CSS()&nvme.CAPCSSIOCS != 0 })
	needMQES   = bitNeed("CAP.MQES is the most that a command can ask for", func(f *facts) bool { return f.cap.MQES() != 0xFFFF })
	needCQR    = bitNeed("CAP.CQR is 0", func(f *facts) bool { return f.cap.CQR() })
	needVWC    = bitNeed("VWC.Present is 0", func(f *facts) bool { return f.id.VWC&nvme.VWCPresent != 0 })
	needNoVWC  = bitNeed("VWC.Present is 1", func(f *facts) bool { return f.id.VWC&nvme.VWCPresent == 0 })
	needQueues = bitNeed("one I/O queue only", func(f *facts) bool { return min(f.queues.sqs, f.queues.cqs) >= 2 })
	needIRQ    = bitNeed("the device gives no interrupts", func(f *facts) bool { return f.vectors >= 2 })
	needIRQ3   = bitNeed("fewer than 3 interrupt vectors", func(f *facts) bool { return f.vectors >= 3 })
	needFused  = bitNeed("FUSES.Compare and Write is 0", func(f *facts) bool { return f.id.FUSES&1 != 0 })
	needSGL    = bitNeed("SGLS is 0", func(f *facts) bool { return f.id.SGLS&3 != 0 })
	needNoSGL  = bitNeed("SGLs are supported", func(f *facts) bool { return f.id.SGLS&3 == 0 })
	// needHole is for a namespace id that is valid and names nothing.
	needHole = bitNeed("every namespace id up to NN is active", func(f *facts) bool { return f.inactive() != 0 })
)

func noReason(ok bool, why string) string {
	if ok {
		return ""
	}
	return why
}

// inactive returns a valid namespace id that is not active, or 0.
func (f *facts) inactive() uint32 {
	active := map[uint32]bool{}
	for _, id := range f.active {
		active[id] = true
	}
	for id := uint32(1); id <= f.id.NN && id <= uint32(len(f.active))+1; id++ {
		if !active[id] {
			return id
		}
	}
	return 0
}
