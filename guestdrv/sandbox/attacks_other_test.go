//go:build !amd64

package sandbox

import "golang.org/x/sys/unix"

func archAttacks() []attack {
	return []attack{{"clone3", "flags that a filter cannot see", call(unix.SYS_CLONE3)}}
}
