package nvme

import "strconv"

// ZeroBased16 is a 16-bit count stored as one less than it means: 0 is 1,
// 0xFFFF is 65536 (R32).
type ZeroBased16 uint16

// Count returns what z means, 1 to 65536.
func (z ZeroBased16) Count() uint32 { return uint32(z) + 1 }

// String prints the count, not the stored value.
func (z ZeroBased16) String() string { return strconv.FormatUint(uint64(z.Count()), 10) }

// ToZeroBased16 returns count as it is stored; ok is false unless count is 1 to 65536.
func ToZeroBased16(count uint32) (z ZeroBased16, ok bool) {
	if count-1 > 0xFFFF {
		return 0, false
	}
	return ZeroBased16(count - 1), true
}

// ZeroBased8 is an 8-bit count stored as one less than it means: 0 is 1, 0xFF is 256 (R32).
type ZeroBased8 uint8

// Count returns what z means, 1 to 256.
func (z ZeroBased8) Count() uint32 { return uint32(z) + 1 }

// String prints the count, not the stored value.
func (z ZeroBased8) String() string { return strconv.FormatUint(uint64(z.Count()), 10) }

// ToZeroBased8 returns count as it is stored; ok is false unless count is 1 to 256.
func ToZeroBased8(count uint32) (z ZeroBased8, ok bool) {
	if count-1 > 0xFF {
		return 0, false
	}
	return ZeroBased8(count - 1), true
}
