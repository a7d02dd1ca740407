//go:build !amd64

package sandbox

// archRules are the calls that only this architecture has: none.
func archRules() []Rule { return nil }
