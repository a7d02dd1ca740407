package backend

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Faults of a medium, made on purpose so that tests of drivers can meet them: fault:RULES,over=SPEC. This file has the rules, faultqueue.go
// what they do.

// faultKind begins a spec with faults, and faultOver the spec of what they are over.
const (
	faultKind = "fault"
	faultOver = "over="
)

const (
	// maxTurn is the most that reorder turns round, and turnWait how long it waits for so many.
	maxTurn  = 1024
	turnWait = 10 * time.Millisecond
)

// faultAction is what happens to a request.
type faultAction uint8

const (
	faultNone    faultAction = iota
	faultStatus              // it ends with a status, and nothing is done
	faultDelay               // it is done, and ends later
	faultDrop                // it never ends, until its queue does; nothing is done
	faultHold                // it never ends, until its queue does or it is aborted; nothing is done
	faultTorn                // the first half of a write is done, and it ends with Write Fault
	faultReorder             // it is done, and ends after others that came later
	faultStuck               // it is done later, and until then the medium does not let go of it: nothing ends it sooner
)

// faultRule is one RULE.
type faultRule struct {
	action faultAction
	status nvme.Status
	delay  time.Duration
	turn   int // reorder: how many are turned round

	op          Op
	anyOp       bool
	opcode      int  // of the guest's command; -1: any
	lba         bool // only blocks from first to last
	first, last uint64
	after, most uint64 // of those that match: so many pass first; no more than so many are hit
	num, denom  uint64 // num of denom of the rest, by chance; denom 0: all

	matched atomic.Uint64
}

// faultRules are those of one medium. They are used by all its queues at once.
type faultRules struct {
	rules []*faultRule
	seed  uint64
}

var errNoRule = errors.New("it has no rule: name at least one, as in fault:drop@read@first=1,over=mem:size=1GiB")

// splitFaults divides a spec that begins with fault: into its rules and the spec that they are over. ok is false if it begins with something else.
func splitFaults(s string) (rules, over string, ok bool, err error) {
	rest, ok := strings.CutPrefix(s, faultKind+":")
	if !ok {
		return "", s, false, nil
	}
	rules, over, found := strings.Cut(rest, ","+faultOver)
	switch {
	case strings.HasPrefix(rest, faultOver):
		err = errNoRule
	case !found:
		err = errors.New("it does not say over what: end it with over=SPEC, as in fault:drop@read@first=1,over=mem:size=1GiB")
	case strings.HasPrefix(over, faultKind+":"):
		err = errors.New("over= takes no other fault: put all rules into one")
	default:
		_, err = parseFaults(rules)
	}
	return rules, over, true, err
}

// parseFaults parses RULE[,RULE...][,seed=N].
func parseFaults(s string) (*faultRules, error) {
	f := &faultRules{}
	for _, text := range strings.Split(s, ",") {
		if n, ok := strings.CutPrefix(text, "seed="); ok {
			seed, err := strconv.ParseUint(n, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%q is no seed: it is a number", text)
			}
			f.seed = seed
			continue
		}
		r, err := parseFault(text)
		if err != nil {
			return nil, fmt.Errorf("rule %q: %w", text, err)
		}
		f.rules = append(f.rules, r)
	}
	if len(f.rules) == 0 {
		return nil, errNoRule
	}
	return f, nil
}

func parseFault(s string) (*faultRule, error) {
	words := strings.Split(s, "@")
	r := &faultRule{anyOp: true, opcode: -1, most: math.MaxUint64}
	key, value, _ := strings.Cut(words[0], "=")
	hasValue := key != words[0]
	switch {
	case key == "status" && hasValue:
		name, dnr := strings.CutSuffix(value, "+dnr")
		st, ok := nvme.ParseStatus(name)
		if !ok || st.OK() {
			return nil, fmt.Errorf("%q is no status of an error: use its name in the specification with dashes, or SCT/SC, as in status=write-fault or status=2/80, and +dnr for Do Not Retry", value)
		}
		if dnr {
			st = st.WithDNR()
		}
		r.action, r.status = faultStatus, st
	case (key == "delay" || key == "stuck") && hasValue:
		d, err := time.ParseDuration(value)
		if err != nil || d <= 0 {
			return nil, fmt.Errorf("%q is no time, as 50ms or 3s is", value)
		}
		if r.action, r.delay = faultDelay, d; key == "stuck" {
			r.action = faultStuck
		}
	case key == "reorder" && hasValue:
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || n < 2 || n > maxTurn {
			return nil, fmt.Errorf("%q is not how many to turn round: from 2 to %d, as in reorder=4", value, maxTurn)
		}
		r.action, r.turn = faultReorder, int(n)
	case key == "drop" && !hasValue:
		r.action = faultDrop
	case key == "hold" && !hasValue:
		r.action = faultHold
	case key == "torn" && !hasValue:
		r.action, r.op, r.anyOp = faultTorn, OpWrite, false
	default:
		return nil, fmt.Errorf("%q is nothing that can happen: a rule begins with status=STATUS, delay=TIME, stuck=TIME, reorder=N, drop, hold or torn", words[0])
	}
	seen := map[string]bool{}
	for _, w := range words[1:] {
		if err := r.condition(w, seen); err != nil {
			return nil, err
		}
	}
	if r.action == faultTorn && r.op != OpWrite {
		return nil, errors.New("only writes can be torn")
	}
	return r, nil
}

var faultOps = map[string]Op{"read": OpRead, "write": OpWrite, "flush": OpFlush, "zeroes": OpWriteZeroes, "discard": OpDiscard}

// condition takes one that a rule has.
func (r *faultRule) condition(s string, seen map[string]bool) (err error) {
	key, value, hasValue := strings.Cut(s, "=")
	kind := key
	op, isOp := faultOps[key]
	if isOp {
		kind = "operation"
	}
	if seen[kind] {
		return fmt.Errorf("@%s: a rule has one %s: write two rules", s, kind)
	}
	seen[kind] = true
	bad := func(like string) error { return fmt.Errorf("@%s: it is not as in @%s", s, like) }
	switch {
	case isOp && !hasValue:
		r.op, r.anyOp = op, false
	case key == "opcode" && hasValue:
		n, err := strconv.ParseUint(value, 0, 8)
		if err != nil {
			return bad("opcode=0x05")
		}
		r.opcode = int(n)
	case key == "lba" && hasValue:
		from, to, isRange := strings.Cut(value, "-")
		if !isRange {
			to = from
		}
		var err2 error
		r.first, err = strconv.ParseUint(from, 0, 64)
		r.last, err2 = strconv.ParseUint(to, 0, 64)
		if r.lba = true; err != nil || err2 != nil || r.first > r.last {
			return bad("lba=0-2047")
		}
	case key == "rate" && hasValue:
		num, denom, _ := strings.Cut(value, "/")
		var err2 error
		r.num, err = strconv.ParseUint(num, 10, 32)
		r.denom, err2 = strconv.ParseUint(denom, 10, 32)
		if err != nil || err2 != nil || r.num == 0 || r.num > r.denom {
			return bad("rate=1/1000")
		}
	case key == "after" && hasValue:
		if r.after, err = strconv.ParseUint(value, 10, 63); err != nil {
			return bad("after=1000")
		}
	case key == "first" && hasValue:
		if r.most, err = strconv.ParseUint(value, 10, 63); err != nil || r.most == 0 {
			return bad("first=3")
		}
	default:
		return fmt.Errorf("@%s is no condition: there are @read, @write, @flush, @zeroes, @discard, @opcode=N, @lba=A-B, @rate=N/M, @after=N and @first=N", s)
	}
	return nil
}

// tear says whether writes may be done in part.
func (f *faultRules) tear() bool {
	return slices.ContainsFunc(f.rules, func(r *faultRule) bool { return r.action == faultTorn })
}

// find returns the rule that r meets, or nil. It is the first in whose turn r comes.
func (f *faultRules) find(r *Request, shift uint8) *faultRule {
	for i, rule := range f.rules {
		if rule.hits(r, shift, f.seed+uint64(i)) {
			return rule
		}
	}
	return nil
}

func (r *faultRule) hits(req *Request, shift uint8, seed uint64) bool {
	if !r.anyOp && req.Op != r.op {
		return false
	}
	if r.opcode >= 0 && (req.Cmd == nil || int(req.Cmd.Opcode) != r.opcode) {
		return false
	}
	if r.lba && !r.inRange(req, shift) {
		return false
	}
	n := r.matched.Add(1) - 1
	if n < r.after || n-r.after >= r.most {
		return false
	}
	return r.denom == 0 || mix(seed<<32^n)%r.denom < r.num
}

// inRange says whether one of the blocks that req is about is from first to last.
func (r *faultRule) inRange(req *Request, shift uint8) bool {
	has := func(first, n uint64) bool { return n > 0 && first <= r.last && first+n-1 >= r.first }
	if req.Op != OpCommand {
		return has(req.Off>>shift, req.Len>>shift)
	}
	switch op := req.Cmd.Opcode; {
	case op == nvme.IODSM:
		for list := segBytes(&req.Vec[0]); len(list) >= nvme.DSMRangeSize; list = list[nvme.DSMRangeSize:] {
			if has(binary.LittleEndian.Uint64(list[8:]), uint64(binary.LittleEndian.Uint32(list[4:]))) {
				return true
			}
		}
		return false
	case op == nvme.IOCopy: // what it reads, and below what it writes
		for list := segBytes(&req.Vec[0]); len(list) >= nvme.CopyRangeSize; list = list[nvme.CopyRangeSize:] {
			if has(binary.LittleEndian.Uint64(list[8:]), uint64(binary.LittleEndian.Uint16(list[16:]))+1) {
				return true
			}
		}
	case op >= 0x80:
		return false // it has no blocks
	}
	return has(req.Off>>shift, req.Len>>shift)
}

// mix is the finalizer of splitmix64: the same numbers give the same chances.
func mix(x uint64) uint64 {
	x += 0x9E3779B97F4A7C15
	x = (x ^ x>>30) * 0xBF58476D1CE4E5B9
	x = (x ^ x>>27) * 0x94D049BB133111EB
	return x ^ x>>31
}
