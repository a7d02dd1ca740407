//go:build shadowbell_faults

package broken

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
)

var names = [count]string{
	SleepAnyway: "sleep-anyway", NoArm: "no-arm", CQAtTail: "cq-at-tail", WrongIndex: "wrong-index", DropKick: "drop-kick", Sentinel: "sentinel",
	StaleSlots: "stale-slots", NoProbe: "no-probe", KeepPages: "keep-pages", NoInterrupt: "no-interrupt",
	ArmDrained: "arm-drained", Overcommit: "overcommit", Register: "register",
}

var on [count]atomic.Bool

// On reports whether r is broken.
func On(r Rule) bool { return on[r].Load() }

// Break breaks the rule of that name, or mends it.
func Break(name string, broken bool) error {
	i := slices.Index(names[:], name)
	if i < 0 {
		return fmt.Errorf("%q is nothing that can be broken: there are %s", name, strings.Join(names[:], ", "))
	}
	on[i].Store(broken)
	return nil
}

// Names returns what Break takes.
func Names() []string { return slices.Clone(names[:]) }

func init() {
	for _, name := range strings.FieldsFunc(os.Getenv("SHADOWBELL_FAULTS"), func(r rune) bool { return r == ',' }) {
		if err := Break(name, true); err != nil {
			panic("SHADOWBELL_FAULTS: " + err.Error())
		}
	}
}
