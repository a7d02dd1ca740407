#include "textflag.h"

// func prefetch(p *nvme.Command, n uint32)
TEXT ·prefetch(SB), NOSPLIT, $0-12
	MOVQ p+0(FP), AX
	MOVL n+8(FP), CX
loop:
	SUBL $1, CX
	JLT  done
	PREFETCHT0 (AX)
	ADDQ $64, AX
	JMP  loop
done:
	RET
