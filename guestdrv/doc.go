// Package guestdrv is an NVMe driver that runs in an ordinary process: it talks to a controller through shared memory and, in steady
// state, makes no system call and rings no doorbell for a request.
//
// # Opening
//
// [Open] connects to a device, enables the controller and creates its queues. From then on it opens nothing: the process can enter
// a sandbox (package sandbox) and go on. The device is named: vfio-user:PATH for a server such as hostmed, pci:0000:00:03.0 for a function
// of this machine that guestdrv bind has taken from the kernel's driver (package device/devices has all forms). [OpenDevice] takes a
// device that the caller has made, for instance one that wraps another for tests.
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
// Offsets and lengths of a Namespace are bytes, and whole blocks ([Namespace.BlockSize]); those of a QueuePair are blocks. To
// programs that know nothing of this, package export gives a namespace as a block device of the kernel (ublk), or by NBD.
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
// # Errors
//
// A command that the controller refused is a [*StatusError], with SCT, SC and DNR. What else can happen is one of the variables
// [ErrTimeout], [ErrReset] and so on: errors.Is finds them, and their documentation says which are for good. [Controller.Err] says whether
// the controller has failed.
//
// # Waiting
//
// What waits takes a context, or ends by itself: a command by [Options.Timeout], a reset by [Options.ResetTimeout], a register access within some
// seconds. When a context ends the call returns, but the command may still be executed: its memory stays the controller's until it has
// ended, also if that is a Buffer that was freed meanwhile.
//
// # Counters
//
// [Controller.Stats] tells commands apart by kind, with a latency histogram for each, and counts doorbell writes, wake-ups, timeouts, aborts
// and resets. [Stats.Sub] is for intervals, [Stats.Metrics] for Prometheus and the like. Counting costs some nanoseconds for a command
// and cannot be turned off.
//
// # Namespaces that change
//
// Namespaces come, go and change their size while the controller is open. [Controller.Namespaces] says what there is now, [Namespace.Size] follows,
// and [Options.OnChange] is told.
//
// What this package does not do: it does not connect again to a device that is gone, or use metadata, SGLs of more than one descriptor, or
// several paths.
package guestdrv
