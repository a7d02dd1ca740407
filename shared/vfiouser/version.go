package vfiouser

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// The protocol version that this package speaks. QEMU refuses any other.
const (
	VersionMajor uint16 = 0
	VersionMinor uint16 = 0
)

// Version data above this size is refused: the longest in use is below 300 bytes.
const maxVersionData = 16 << 10

// Defaults of the capabilities that a peer leaves out; vfio-user 0.9.1
// "VFIO_USER_VERSION".
const (
	defaultMaxFDs     = 1
	defaultMaxDMAMaps = 65535
	defaultPgSizes    = 4096
)

// Capabilities are the limits that one side names in its VERSION message. What it
// leaves out has the protocol's default. Capabilities of the protocol that this
// package never uses (twin_socket, write_multiple, migration) are ignored in what a
// peer proposes, and not offered.
type Capabilities struct {
	MaxMsgFDs   int    // descriptors that the sender takes in one message
	MaxDataXfer uint32 // bytes that the sender takes or gives in one region access
	MaxDMAMaps  uint32 // DMA mappings at one time
	PgSizes     uint64 // page sizes for DMA mappings, or'ed together
}

// DefaultCapabilities returns what a side that has no reason to say otherwise
// offers: this package's own limits.
func DefaultCapabilities() Capabilities {
	return Capabilities{MaxMsgFDs: MaxFDs, MaxDataXfer: MaxDataXfer, MaxDMAMaps: defaultMaxDMAMaps, PgSizes: defaultPgSizes}
}

// protocolCapabilities is what a peer that names nothing has.
func protocolCapabilities() Capabilities {
	return Capabilities{MaxMsgFDs: defaultMaxFDs, MaxDataXfer: MaxDataXfer, MaxDMAMaps: defaultMaxDMAMaps, PgSizes: defaultPgSizes}
}

// normal fills zero fields with defaults and cuts the rest to this package's limits.
func (c Capabilities) normal() Capabilities {
	d := DefaultCapabilities()
	if c.MaxMsgFDs <= 0 || c.MaxMsgFDs > MaxFDs {
		c.MaxMsgFDs = d.MaxMsgFDs
	}
	if c.MaxDataXfer == 0 || c.MaxDataXfer > MaxDataXfer {
		c.MaxDataXfer = d.MaxDataXfer
	}
	if c.MaxDMAMaps == 0 || c.MaxDMAMaps > d.MaxDMAMaps {
		c.MaxDMAMaps = d.MaxDMAMaps
	}
	if c.PgSizes == 0 {
		c.PgSizes = d.PgSizes
	}
	return c
}

// Version is the payload of VERSION, request and reply; vfio-user 0.9.1
// "VFIO_USER_VERSION".
type Version struct {
	Major, Minor uint16
	HasData      bool // the version data was there
	Caps         Capabilities
}

type versionData struct {
	Capabilities *capabilitiesJSON `json:"capabilities,omitempty"`
}

type capabilitiesJSON struct {
	MaxMsgFDs   *uint64 `json:"max_msg_fds,omitempty"`
	MaxDataXfer *uint64 `json:"max_data_xfer_size,omitempty"`
	MaxDMAMaps  *uint64 `json:"max_dma_maps,omitempty"`
	PgSizes     *uint64 `json:"pgsizes,omitempty"`
}

// Append appends the payload to b; without HasData only the two numbers.
func (v *Version) Append(b []byte) []byte {
	b = le.AppendUint16(b, v.Major)
	b = le.AppendUint16(b, v.Minor)
	if !v.HasData {
		return b
	}
	fds, xfer, maps := uint64(v.Caps.MaxMsgFDs), uint64(v.Caps.MaxDataXfer), uint64(v.Caps.MaxDMAMaps)
	data, err := json.Marshal(versionData{&capabilitiesJSON{&fds, &xfer, &maps, &v.Caps.PgSizes}})
	if err != nil {
		panic(err) // four integers always marshal
	}
	return append(append(b, data...), 0)
}

// ParseVersion reads a payload. Limits that the peer does not name have the
// protocol's defaults; those above this package's are cut to it.
func ParseVersion(p []byte) (Version, error) {
	if len(p) < 4 {
		return Version{}, fmt.Errorf("%w: VERSION of %d bytes", ErrProtocol, len(p))
	}
	v := Version{Major: le.Uint16(p), Minor: le.Uint16(p[2:]), Caps: protocolCapabilities()}
	data := p[4:]
	if len(data) > maxVersionData {
		return v, fmt.Errorf("%w: VERSION with %d bytes of data", ErrProtocol, len(data))
	}
	// Terminated by NUL, says the specification; a sender that leaves it out is understood.
	if i := bytes.IndexByte(data, 0); i >= 0 {
		data = data[:i]
	}
	if len(data) == 0 {
		return v, nil
	}
	v.HasData = true
	var d versionData
	if err := json.Unmarshal(data, &d); err != nil {
		return v, fmt.Errorf("%w: VERSION data: %v", ErrProtocol, err)
	}
	if d.Capabilities == nil {
		return v, nil
	}
	if err := v.Caps.read(d.Capabilities); err != nil {
		return v, fmt.Errorf("%w: VERSION data: %v", ErrProtocol, err)
	}
	return v, nil
}

func (c *Capabilities) read(j *capabilitiesJSON) error {
	if j.MaxMsgFDs != nil {
		c.MaxMsgFDs = int(min(*j.MaxMsgFDs, MaxFDs))
	}
	if j.MaxDataXfer != nil {
		if *j.MaxDataXfer == 0 {
			return errors.New("max_data_xfer_size is 0")
		}
		c.MaxDataXfer = uint32(min(*j.MaxDataXfer, MaxDataXfer))
	}
	if j.MaxDMAMaps != nil {
		c.MaxDMAMaps = uint32(min(*j.MaxDMAMaps, 1<<32-1))
	}
	if j.PgSizes != nil {
		c.PgSizes = *j.PgSizes
	}
	return nil
}
