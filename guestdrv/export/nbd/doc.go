// Package nbd serves disks by the NBD protocol, over unix sockets: fixed newstyle, structured replies and extended headers, several exports,
// block status (base:allocation), and all commands that a disk has something to do for.
//
// How a request goes:
//
//	handshake  the client chooses an export                                 handshake.go, options.go
//	transmit   the connection's reader takes a slot, reads and checks a
//	           header, and the payload into a buffer of the disk's memory   conn.go, request.go
//	execute    one of the connection's workers asks the disk, or the
//	           reader itself if the client has one request at a time;
//	           what is larger than a buffer goes in pieces                  execute.go, big.go
//	reply      whoever has a reply puts it in the line; the first of them
//	           writes for all, many replies with one system call            reply.go
//
// A client is not trusted. What it can take is bounded: connections by Config.Connections, requests of a connection by its slots, memory of
// a connection by connMemory, all of it before anything is read for it; a handshake has a deadline. A client that does not read its
// replies, or does not send what it promised, holds up itself alone.
//
// Nothing is allocated for a request in steady state.
//
// What this package does not do: TLS, since a unix socket has a mode; NBD_CMD_CACHE, since there is no cache here to fill; holes in replies to
// reads, since to ask the device for them costs more than to read them.
package nbd
