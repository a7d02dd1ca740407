// Package wire is what the lab and the agent in its guests say to each other: one JSON object a line, both ways. A line that is cut
// short, as by a guest that restarts, spoils nothing behind it.
package wire

import "time"

// Port is the name of the virtio-serial port.
const Port = "shadowbell.vmlab"

// MaxLine is the longest line that either side takes; files and output are in it as base64.
const MaxLine = 128 << 20

// Request asks the agent for one thing. Requests run side by side.
type Request struct {
	ID      uint64        `json:"id"`
	Op      string        `json:"op"` // "run", "read", "write", "poweroff"
	Command string        `json:"command,omitempty"`
	Path    string        `json:"path,omitempty"`
	Mode    uint32        `json:"mode,omitempty"`
	Data    []byte        `json:"data,omitempty"` // for run: standard input
	Limit   time.Duration `json:"limit,omitempty"`
}

// Reply answers the request with its ID. ID 0 is the agent's greeting.
type Reply struct {
	ID     uint64 `json:"id"`
	Exit   int    `json:"exit,omitempty"` // of run; -1: killed
	Stdout []byte `json:"stdout,omitempty"`
	Stderr []byte `json:"stderr,omitempty"`
	Data   []byte `json:"data,omitempty"`
	Error  string `json:"error,omitempty"`
}
