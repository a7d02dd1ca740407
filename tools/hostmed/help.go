package main

import (
	"strings"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// serveHelp is in paragraphs as kong wraps them: lines that begin with a space are left as they are.
var serveHelp = `SPEC is one of

  ` + strings.ReplaceAll(backend.SpecHelp, "\n", "\n  ") + `

MODE is one of

  shadow  Clients share a page of doorbells (Doorbell Buffer Config) and are told when to ring; the fastest.
  trap    Each doorbell is a message. For comparison, and for debugging.
  mmap    The doorbell page of BAR0 is mapped into the client and polled. For clients that know nothing of
          shadow doorbells, such as SPDK's driver; x86-64 only, and never quite asleep.

LIMITS are KEY=N with commas between them. KEY is iops, read_iops or write_iops, commands a second, or bandwidth, read_bandwidth or
write_bandwidth, bytes a second (N may be 100MiB). KEY_burst is how much may be done at once after a pause: a tenth of a second's worth if
it is not given. Commands beyond a limit wait. FILE has limits of namespaces too, and SIGHUP changes them.

A device for vfio: is refused if the machine has no IOMMU for it, which would keep it from memory that is not its guests'. With
--unsafe-no-iommu it is taken: its firmware, and a mistake of hostmed's, can then read and change all memory of the machine.

Controllers that present one SPEC share it: they are one NVM subsystem, and each sees what the others write. FILE says
more than flags can: several subsystems, namespaces of some controllers only, identifiers; docs/hostmed.toml in the
source is an example with every key. SIGHUP reads it again while clients work: controllers and namespaces come and go, guests are
told. What cannot change is refused, and all stays as it was. SIGHUP also looks for files that have grown.
SIGUSR1 writes the counters of every controller and namespace to the log.

The control socket speaks HTTP with JSON: GET /v1/controllers, /v1/inspect and /v1/stats, and POST .../queues/QID/kick; nvmetrace doctor uses
it (docs/control.md). Root and the user that hostmed runs as may connect. They can read the guests' rings and doorbells, and write nothing.

Examples

  A disk in a file, made if it is missing, and one in memory, for the client vfio-user:/run/vm1.sock:
    hostmed serve --socket /run/vm1.sock --namespace file:/srv/vm1.img,size=10GiB --namespace mem:size=1GiB

  Two controllers on the same disk, polled on core 3; SPDK looks for a socket of the name cntrl in a directory:
    hostmed serve --socket /run/a/cntrl --socket /run/b/cntrl --namespace file:/srv/db.img --doorbells mmap --cpus 3

  A disk with at most 2000 commands and 100 MiB a second:
    hostmed serve --socket /run/vm1.sock --namespace file:/srv/vm1.img --limit iops=2000,bandwidth=100MiB

  What its queues are doing:
    hostmed serve --socket /run/vm1.sock --namespace mem:size=1GiB --control /run/hostmed.sock &
    curl -s --unix-socket /run/hostmed.sock http://hostmed/v1/inspect

  What the doorbells cost by themselves:
    hostmed serve --socket /tmp/null.sock --namespace null:size=1TiB,lba=4096

  What a configuration file says, checked before:
    hostmed check /etc/hostmed.toml && hostmed serve --config /etc/hostmed.toml

SIGTERM and SIGINT finish what is under way, flush, remove the sockets and exit 0. A wrong command line, or
one that names what is missing, taken or forbidden, is one line on stderr and exit 2.`
