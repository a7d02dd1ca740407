package gmem

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// flatten copies what the elements of vec hold.
func flatten(vec []unix.Iovec) []byte {
	b := []byte{}
	for _, v := range vec {
		b = append(b, unsafe.Slice(v.Base, v.Len)...)
	}
	return b
}
