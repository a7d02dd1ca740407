//go:build shadowbell_faults

package hostmed

import "github.com/shadowbell/shadowbell/hostmed/internal/broken"

// Break breaks a doorbell rule in all mediators of this process, or mends it again. It is there in builds for tests only; package broken has the names.
func Break(rule string, on bool) error { return broken.Break(rule, on) }

// Breakable returns the names that Break takes.
func Breakable() []string { return broken.Names() }
