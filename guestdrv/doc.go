// Package guestdrv is an NVMe driver that runs in an ordinary process: it talks to a controller through shared memory and, in steady
// state, makes no system call and rings no doorbell for a request.
//
// # Opening
//
// [Open] connects to a device, enables the controller and creates its queues. From then on it opens nothing: the process can enter
// a sandbox (package sandbox) and go on.
//
// # Two ways to do I/O
//
// [Namespace] is a block device for any number of goroutines: ReadAt, WriteAt, Flush, Discard, WriteZeroes. It divides transfers into
// commands, keeps several under way, and waits by polling for as long as that pays, then by sleeping.
//
// [QueuePair] is the hot path: one goroutine submits commands in slices, publishes them with one doorbell and reaps results in slices. Nothing is
// allocated and no data is copied.
//
// Data in a [Buffer], memory that the controller can reach, is never copied. Other memory is, through the same pool.
//
// # Doorbells
//
// Where the controller offers Doorbell Buffer Config, tails and heads are stored in a shared page and the register is written only when the
// controller asks for it in the page of event indices ([DoorbellsAuto]). Otherwise they are written to the registers, which may be mapped
// and polled. The admin queue always uses the registers.
//
// # A device that cannot be trusted
//
// Every wait has an end, and everything that comes from the device is checked before it is used. Memory of commands that have not ended is not
// used for anything else until the controller is disabled.
//
// A command that is late is aborted. If that does not end it, or the controller reports a fatal error, the controller is reset and set up
// again as it was, while callers wait: commands that were outstanding fail with [ErrReset] or are sent once more, as [Options.OnReset] says.
//
// A completion that nobody asked for, a lost connection, or a controller that does not come back fails the controller: each call then
// returns that first error at once, and there is nothing to do but Close.
//
// # Namespaces that change
//
// Namespaces come, go and change their size while the controller is open. [Controller.Namespaces] says what there is now, [Namespace.Size] follows,
// and [Options.OnChange] is told.
//
// What this package does not do: it does not connect again to a device that is gone, or use metadata, SGLs of more than one descriptor, or
// several paths.
package guestdrv
