//go:build !race

#include "textflag.h"

// func storeReverse(dst, src *Entry, n int, phase uint64)
//
// x86-64 keeps stores in program order (Intel SDM 3A 9.2.2, AMD APM 2 7.1) and an aligned
// 8-byte store is atomic, so a plain store of Hi after Lo is the release that R5
// asks for. sync/atomic has only the sequentially consistent store: an XCHG that
// waits for the cache line, once for each entry.
TEXT ·storeReverse(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	MOVQ phase+24(FP), DX
	SHLQ $4, CX
loop:
	SUBQ $16, CX
	JLT  done
	MOVQ (SI)(CX*1), AX
	MOVQ 8(SI)(CX*1), BX
	ORQ  DX, BX
	MOVQ AX, (DI)(CX*1)
	MOVQ BX, 8(DI)(CX*1)
	JMP  loop
done:
	RET
