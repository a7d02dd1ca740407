// Package faults is tests: what a stock guest and its disk do when things go wrong. Controllers are reset and drivers unbound under load,
// guests restart without a shutdown or are killed, and so is hostmed; disks lose their power. docs/durability.md says what is shown
// of acknowledged writes.
package faults
