package nvme

import "encoding/binary"

// QuietBit, in a CQ-head doorbell value of the shadow page or of a mapped doorbell page, says "I am polling this
// CQ, send no interrupt". It has a meaning only after FeatureQuiet was set to FeatureQuietOn.
const QuietBit = 1 << 31

// FeatureQuietOn is CDW11 bit 0 of FeatureQuiet.
const FeatureQuietOn = 1 << 0

// ShadowbellCaps is what a shadowbell controller says of itself at the start of
// IdentifyController.VendorSpecific: magic "SBEL", version, capability bits, 8 bytes in all.
type ShadowbellCaps struct {
	Version uint16
	Caps    uint16
}

// Values of ShadowbellCaps.
const (
	ShadowbellVersion = 1
	ShadowbellQuiet   = 1 << 0 // FeatureQuiet works
)

const (
	shadowbellMagic    = "SBEL"
	shadowbellCapsSize = 8
)

// SetShadowbell stores s in the vendor-specific bytes.
func (c *IdentifyController) SetShadowbell(s ShadowbellCaps) {
	b := c.VendorSpecific[:shadowbellCapsSize]
	copy(b, shadowbellMagic)
	binary.LittleEndian.PutUint16(b[4:], s.Version)
	binary.LittleEndian.PutUint16(b[6:], s.Caps)
}

// Shadowbell returns what SetShadowbell stored; ok is false for a controller of another make, or of
// version 0.
func (c *IdentifyController) Shadowbell() (s ShadowbellCaps, ok bool) {
	b := c.VendorSpecific[:shadowbellCapsSize]
	if string(b[:4]) != shadowbellMagic {
		return ShadowbellCaps{}, false
	}
	s = ShadowbellCaps{Version: binary.LittleEndian.Uint16(b[4:]), Caps: binary.LittleEndian.Uint16(b[6:])}
	return s, s.Version != 0
}
