//go:build !amd64

package sandbox

import "golang.org/x/sys/unix"

func archAttacks() map[string]func() error {
	return map[string]func() error{"clone3": call(unix.SYS_CLONE3)}
}
