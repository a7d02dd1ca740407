//go:build armbe || arm64be || mips || mips64 || mips64p32 || ppc || ppc64 || s390 || s390x || sparc || sparc64

package nvme

// The wire structs are little-endian memory (R20): this constant overflows so that the build stops here.
const littleEndianMachineRequired uint8 = 1 << 8
