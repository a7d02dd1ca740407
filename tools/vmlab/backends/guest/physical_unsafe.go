package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"
)

const pageBytes = 4096

// physical returns the addresses of the pages of b, which begins at one and has been touched (Documentation/admin-guide/mm/pagemap.rst).
func physical(b []byte) (pages []uint64, err error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries := make([]byte, len(b)/pageBytes*8)
	if _, err := f.ReadAt(entries, int64(uintptr(unsafe.Pointer(&b[0]))/pageBytes*8)); err != nil {
		return nil, err
	}
	for ; len(entries) > 0; entries = entries[8:] {
		e := binary.LittleEndian.Uint64(entries)
		page := e & (1<<55 - 1) * pageBytes
		if e>>63 == 0 || page == 0 {
			return nil, fmt.Errorf("pagemap does not tell where a page is: %#x", e)
		}
		pages = append(pages, page)
	}
	return pages, nil
}
