/*
 * x86-TSO memory for the models beside this file: every process stores into its own FIFO buffer,
 * which drains into memory at any later time, and loads the newest store of its own to that cell,
 * else memory. A locked instruction (Go: atomic.Store, atomic.Swap) waits until its own buffer is empty.
 *
 * The including file defines CELLS, PROCS and, if it wants one, DEVICE_WRITE(p, x), an assertion on
 * each store as it reaches memory.
 */

#ifndef DEVICE_WRITE
#define DEVICE_WRITE(p, x) skip
#endif

#ifndef DEPTH
#define DEPTH 3 /* stores that a buffer holds, 2 or 3; a process that finds it full waits */
#endif

typedef Buffer {
	byte n;
	byte cell[DEPTH];
	byte val[DEPTH]
};

byte mem[CELLS];
Buffer sb[PROCS];

#define EMPTY(p)   (sb[p].n == 0)
#define HIT(p, i, x) (sb[p].n > i && sb[p].cell[i] == (x))

/* LOAD is an expression: store forwarding, youngest first. */
#define LOAD2(p, x) (HIT(p, 1, x) -> sb[p].val[1] : (HIT(p, 0, x) -> sb[p].val[0] : mem[x]))
#if DEPTH == 3
#define LOAD(p, x) (HIT(p, 2, x) -> sb[p].val[2] : LOAD2(p, x))
#else
#define LOAD(p, x) LOAD2(p, x)
#endif

/* A plain store. */
inline STORE(p, x, v) {
	d_step {
		sb[p].n < DEPTH;
		sb[p].cell[sb[p].n] = x;
		sb[p].val[sb[p].n] = v;
		sb[p].n++
	}
}

/* A locked store: nothing of this process is in flight when it is done. */
inline XCHG(p, x, v) {
	atomic {
		EMPTY(p);
		DEVICE_WRITE(p, x);
		mem[x] = v
	}
}

/* One buffer draining, an entry at a time. Cleared entries keep equal states equal. */
proctype Drain(byte p) {
end:
	do
	:: atomic {
		!EMPTY(p);
		DEVICE_WRITE(p, sb[p].cell[0]);
		mem[sb[p].cell[0]] = sb[p].val[0];
		sb[p].n--;
		sb[p].cell[0] = sb[p].cell[1]; sb[p].val[0] = sb[p].val[1];
#if DEPTH == 3
		sb[p].cell[1] = sb[p].cell[2]; sb[p].val[1] = sb[p].val[2];
#endif
		sb[p].cell[DEPTH - 1] = 0;     sb[p].val[DEPTH - 1] = 0
	   }
	od
}

/* The ring test of Publish, as the code has it: true iff ei is in [old, new) cyclically. */
#define NEED_RING(old, new, ei) ((((new) - (ei) - 1) & 65535) < (((new) - (old)) & 65535))
