package backend

import (
	"crypto/sha256"
	"fmt"
	"math/bits"
	"path/filepath"
	"sync"

	"github.com/hashicorp/go-hclog"
)

// Open opens the backend that spec describes. The error is one line that names the thing
// and the remedy.
func Open(spec string) (Backend, error) {
	s, err := ParseSpec(spec)
	if err != nil {
		return nil, err
	}
	return OpenSpec(s, nil)
}

// OpenSpec is Open for a parsed spec. What happens to the backend later that the operator should know goes to log; nil: nobody is told.
func OpenSpec(s Spec, log hclog.Logger) (Backend, error) {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	if s.Faults != "" {
		return openFaulty(s, log)
	}
	switch s.Kind {
	case KindNull:
		return newNull(s), nil
	case KindMem:
		return newMem(s)
	case KindFile:
		return openFile(s, true)
	case KindBlock:
		return openBlock(s, &disks, log)
	case KindNVMe:
		return openNvmeChar(s, log)
	case KindVFIO:
		return openVFIO(s, log)
	}
	return nil, fmt.Errorf("namespace kind %q does not exist", s.Kind)
}

// newInfo fills in what a spec alone says. size is in bytes, a multiple of the LBA.
func newInfo(s Spec, size uint64, id identity) Info {
	shift := uint8(bits.TrailingZeros32(s.LBA))
	return Info{
		Name:     s.String(),
		Blocks:   size >> shift,
		LBAShift: shift,
		ReadOnly: s.ReadOnly,
		NGUID:    id.nguid(),
		UUID:     id.uuid(),
	}
}

// identity is what a namespace's identifiers are made from. A guest must see the same ones
// every time, and never the same ones twice on one controller (Linux refuses such a
// namespace), so the n-th backend of one spec that is open at a time has n in it.
type identity struct {
	key string
	n   int
}

var identities = struct {
	sync.Mutex
	used map[identity]bool
}{used: map[identity]bool{}}

func takeIdentity(s Spec) identity {
	id := identity{key: s.String()}
	if s.Kind == KindFile || s.Kind == KindBlock {
		path, err := filepath.Abs(s.Path)
		if err != nil {
			path = s.Path
		}
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		id.key = string(s.Kind) + ":" + path
	}
	return takeKey(id.key)
}

func takeKey(key string) identity {
	id := identity{key: key}
	identities.Lock()
	defer identities.Unlock()
	for identities.used[id] {
		id.n++
	}
	identities.used[id] = true
	return id
}

func (id identity) release() {
	identities.Lock()
	defer identities.Unlock()
	delete(identities.used, id)
}

func (id identity) hash(what string) (out [16]byte) {
	sum := sha256.Sum256(fmt.Appendf(nil, "shadowbell %s %d %s", what, id.n, id.key))
	copy(out[:], sum[:])
	return out
}

// uuid is a version 8 UUID, whose bits are the maker's own (RFC 9562 5.8).
func (id identity) uuid() [16]byte {
	u := id.hash("uuid")
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

// nguid has a locally administered OUI in bytes 8 to 10 (NVMe Base 2.0c 4.5.1: NGUID in EUI-64
// form, the vendor's extension first).
func (id identity) nguid() [16]byte {
	g := id.hash("nguid")
	g[8] = g[8]&^0x03 | 0x02
	return g
}
