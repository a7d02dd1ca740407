package vmlab

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
)

// slim returns a program of 64 bits that does without some of its libraries: it neither loads nor asks for them, and what it would call of them is
// nowhere. A dynamic linker needs ten times as long under emulation, and much of what it links for fio is for disks on networks, which no guest has.
//
// A symbol that is looked for only in these libraries becomes a weak one, which may be missing; its version goes, and so do the libraries'
// entries among those that are needed (System V ABI, "Dynamic Section"; Linux Standard Base Core, "Symbol Versioning").
func slim(program []byte, without []string) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, err
	}
	if f.Class != elf.ELFCLASS64 || f.ByteOrder != binary.LittleEndian {
		return nil, errors.New("not a program for x86-64")
	}
	out := bytes.Clone(program)
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	kept := slices.DeleteFunc(slices.Clone(libraries), func(l string) bool { return slices.Contains(without, l) })
	if len(kept) == len(libraries) {
		return out, nil
	}
	s := slimming{f: f, out: out, without: without}
	return out, errors.Join(s.symbols(kept), s.versions(), s.needed())
}

// slimFile is slim for a file, and writes another.
func slimFile(from, to string, without []string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if b, err = slim(b, without); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return os.WriteFile(to, b, 0o755)
}

type slimming struct {
	f       *elf.File
	out     []byte // the file
	without []string
}

var le = binary.LittleEndian

// section returns a section's part of the file.
func (s *slimming) section(name string) ([]byte, error) {
	x := s.f.Section(name)
	if x == nil || x.Offset > uint64(len(s.out)) || x.FileSize > uint64(len(s.out))-x.Offset {
		return nil, fmt.Errorf("no section %s", name)
	}
	return s.out[x.Offset:][:x.FileSize], nil
}

// symbols makes weak what is looked for and has no version of a library that is kept. Where it is found after all, that is no difference.
func (s *slimming) symbols(kept []string) error {
	list, err := s.f.DynamicSymbols()
	if err != nil {
		return err
	}
	table, err := s.section(".dynsym")
	if err != nil {
		return err
	}
	versions, err := s.section(".gnu.version")
	if err != nil {
		return err
	}
	if n := len(list) + 1; len(table) < n*elf.Sym64Size || len(versions) < n*2 {
		return errors.New("the table of symbols is too short")
	}
	const (
		infoAt = 4 // in a symbol
		global = 1 // the version of what has none
	)
	for i, x := range list {
		if x.Section != elf.SHN_UNDEF || slices.Contains(kept, x.Library) {
			continue
		}
		i++ // the table's first entry is not in the list
		table[i*elf.Sym64Size+infoAt] = elf.ST_INFO(elf.STB_WEAK, elf.ST_TYPE(x.Info))
		le.PutUint16(versions[i*2:], global)
	}
	return nil
}

// versions unlinks the libraries' entries from the list of versions that are needed.
func (s *slimming) versions() error {
	list, err := s.section(".gnu.version_r")
	if err != nil {
		return err
	}
	names, err := s.section(".dynstr")
	if err != nil {
		return err
	}
	const fileAt, nextAt, size = 4, 12, 16 // in an entry
	for at, before := 0, -1; ; {
		if at+size > len(list) {
			return errors.New("the list of versions is too short")
		}
		next := int(le.Uint32(list[at+nextAt:]))
		switch name := text(names, uint64(le.Uint32(list[at+fileAt:]))); {
		case !slices.Contains(s.without, name):
			before = at
		case before < 0:
			return fmt.Errorf("%s is the first library whose versions are needed", name)
		case next == 0:
			le.PutUint32(list[before+nextAt:], 0)
		default:
			le.PutUint32(list[before+nextAt:], uint32(at+next-before))
		}
		if next == 0 {
			return nil
		}
		at += next
	}
}

// needed removes the libraries from the dynamic section.
func (s *slimming) needed() error {
	list, err := s.section(".dynamic")
	if err != nil {
		return err
	}
	names, err := s.section(".dynstr")
	if err != nil {
		return err
	}
	const size = 16
	to := 0
	for at := 0; at+size <= len(list); at += size {
		if elf.DynTag(le.Uint64(list[at:])) == elf.DT_NEEDED && slices.Contains(s.without, text(names, le.Uint64(list[at+8:]))) {
			continue
		}
		to += copy(list[to:], list[at:at+size])
	}
	clear(list[to:])
	return nil
}

// text is the string at an offset of a table.
func text(table []byte, at uint64) string {
	if at >= uint64(len(table)) {
		return ""
	}
	s, _, _ := bytes.Cut(table[at:], []byte{0})
	return string(s)
}
