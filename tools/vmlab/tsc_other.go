//go:build !amd64

package vmlab

// tscKHz is not needed: Setup refuses other machines.
func tscKHz() uint64 { return 0 }
