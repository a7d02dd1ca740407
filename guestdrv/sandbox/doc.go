// Package sandbox is the locked box in which a program that drives NVMe queues runs once everything it needs is open.
//
// The device is hostile to the driver: completions, Identify data and vfio-user replies all come from the other side. The checks in
// guestdrv are the first line; this package bounds what is lost when one of them is wrong and the process is taken over.
//
// # Use
//
// The box is entered in three steps:
//
//  1. Reexec, the first statement of main, starts the program again in new user, mount, network, IPC, UTS and PID namespaces; the
//     first process waits, forwards signals and hands on the exit status. The file system is still the host's, /proc too.
//  2. The program opens what it needs: the device's socket or fds, DMA memory, event fds, input and output files.
//  3. Enter takes the file system, the capabilities and all other system calls away from every thread, then checks that they are gone.
//
// Enter cannot be undone. After it there are no new file descriptors of any kind: DMA memory, queues' event fds and files must exist
// before. Memory that is mapped later from an fd that is already open needs Policy.MapFDs. A CPU profile (setitimer, timer_create) and
// anything that looks at a path (time zones, host names, terminfo) must be finished before; Enter itself loads the local time zone and
// starts the Go runtime's network poller.
//
// Policy.Uses says what else the program goes on doing: messages to a device, a reset of it, a server's clients, io_uring. docs/sandbox.md has the
// threat model for each, and all rules.
//
// # What a program that was taken over can do
//
//   - read and write the fds that were open at Enter: the device's, DMA memory, the file that is being copied, stdio;
//   - send the device any command, and over a vfio-user socket any message and its own open fds;
//   - use CPU time, a bounded amount of memory and of threads, send signals to itself, exit with any status.
//
// # What it cannot do
//
//   - open, create, stat or list any file: there is no openat, the root directory is an empty read-only tmpfs, Landlock allows no path,
//     and RLIMIT_NOFILE leaves no number for a new fd, also not for one that the peer sends over the socket, but for a server's clients;
//   - reach a network, an abstract unix socket, SysV IPC or a POSIX queue: no socket or connect, empty namespaces, Landlock;
//   - start, see or trace a process, signal another one, or gain privileges: no execve, no clone but for threads, no ptrace, kill only
//     of itself, a PID namespace of its own, no_new_privs, no capabilities;
//   - make memory executable: mmap never takes PROT_EXEC, and there is no mprotect;
//   - reach the wide kernel interfaces: io_uring but for rings that were restricted, bpf, userfaultfd, keyctl, perf_event_open, PI futexes, most of ioctl and prctl.
//
// # What this package does not do
//
// It does not stand between the device and its DMA memory, does not limit CPU time (use cgroups), and does not hide time or the CPU from side
// channels. The waiting first process is not locked; the locked one can signal, trace or see it through none of the calls it has left.
//
// # Layers, and what is missing
//
// The layers are independent so that one that the kernel refuses does not take the others with it. seccomp and no_new_privs are
// always demanded; namespaces and Landlock are used where the kernel has them, or demanded by Policy.RequireNamespaces and
// Policy.RequireLandlock. Report says for each what was verified to be in force and otherwise why not and what to do.
//
// A binary that is linked with cgo, which the race detector also is, has threads that the Go runtime cannot reach: capabilities stay,
// and Landlock needs ABI 8 (Linux 7.0). Production builds set CGO_ENABLED=0.
package sandbox
