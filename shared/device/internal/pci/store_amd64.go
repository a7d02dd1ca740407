package pci

import "sync/atomic"

// Registers are written by plain stores. An atomic one is an XCHG here, which reads the register, too. Stores stay in order on x86-64, so what was
// written to memory is there before the doorbell is; that the calls are not inlined keeps the compiler from moving them.

//go:noinline
func store32(w *atomic.Uint32, v uint32) { *plain32(w) = v }

//go:noinline
func store64(w *atomic.Uint64, v uint64) { *plain64(w) = v }
