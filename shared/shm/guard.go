package shm

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// FaultError is an access to memory that its owner has taken away (SIGBUS) or
// that is not mapped.
type FaultError struct {
	Addr uintptr // host virtual address; 0 if the runtime did not say
}

func (e *FaultError) Error() string {
	return fmt.Sprintf("shared memory fault at %#x: the peer shrank or unmapped its memory", e.Addr)
}

// Guard runs fn and turns a fault on shared memory in it into a *FaultError (R36).
// Any other panic goes on. Guards nest.
//
// The guard holds for fn's own goroutine only, and what fn holds when it faults
// (locks, slots) is fn's to give back.
func Guard(fn func()) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if p := recover(); p != nil {
			err = asFault(p)
		}
	}()
	fn()
	return nil
}

// asFault returns p as a *FaultError, or panics with it again. The runtime marks a fault with
// an address; a nil dereference or an index out of range has none.
func asFault(p any) error {
	if e, ok := p.(interface {
		runtime.Error
		Addr() uintptr
	}); ok {
		return &FaultError{Addr: e.Addr()}
	}
	panic(p)
}
