/*
 * The submission side of a shadow doorbell: Publish in the driver, Poll and Arm in the device.
 *
 * One queue of N entries runs for ever, so every wrap and every overlap of the two sides is covered;
 * the driver may stop at any point. Wanted:
 *   - no lost wake-up: the device never sleeps, with no kick set or under way, on a tail that moved;
 *   - the driver gets every command that it published back (else: invalid end state);
 *   - the device never reads an entry before the driver's store to it (R4, R6).
 *
 * Mutations (-D): NO_DRIVER_BARRIER R1, NO_ARM_BARRIER R2, IGNORE_ARM R3, CLEAR_KICK_LATE R10,
 * SLEEP_ON_MARKER R12, TAIL_BEFORE_ENTRY R6.
 */

#ifndef N
#define N 3
#endif

#define DRV 0
#define DEV 1
#define PROCS 2

#define TAIL  0 /* shadow doorbell, driver writes */
#define EI    1 /* event index, device writes */
#define HEAD  2 /* SQ head as the driver learns it from completions, device writes */
#define KICK  3 /* the device's eventfd: sticky */
#define ENTRY 4 /* N entries; an entry holds the parity of the lap that wrote it */
#define CELLS (ENTRY + N)

#include "tso.pml"

/* For the monitor only. */
byte consumed;   /* the device's head */
bool publishing; /* the driver is between its tail store and its ring */
bool asleep;     /* the device is blocked on its eventfd */

#define ROOM(old) ((LOAD(DRV, HEAD) + N - 1 - (old)) % N)

proctype Driver() {
	byte old = 0, new, room, e;
	bit lap = 1, nextlap;

	do
	:: atomic { ROOM(old) > 0; room = ROOM(old); new = old; nextlap = lap };
	   publishing = true;
#ifdef TAIL_BEFORE_ENTRY
	   STORE(DRV, TAIL, (old + 1) % N);
	   room = 1;
#endif
	   do
	   :: room > 0 ->
	      STORE(DRV, ENTRY + new, nextlap);
	      atomic {
		room--;
		new = (new + 1) % N;
		if
		:: new == 0 -> nextlap = 1 - nextlap
		:: else
		fi
	      }
	   :: new != old -> break
	   od;
	   /* Publish: tail, then event index, each visible in that order. */
#ifdef NO_DRIVER_BARRIER
	   STORE(DRV, TAIL, new);
#else
	   XCHG(DRV, TAIL, new);
#endif
	   e = LOAD(DRV, EI);
	   if
	   :: NEED_RING(old, new, e) -> STORE(DRV, KICK, 1)
	   :: else
	   fi;
	   d_step { old = new; lap = nextlap; new = 0; nextlap = 0; room = 0; e = 0; publishing = false }
	:: break
	od;
	LOAD(DRV, HEAD) == old /* blocks for ever if a wake-up was lost */
}

proctype Device() {
	byte tail, losses = 0;
	bit lap = 1;
	byte from;

	do
	:: tail = LOAD(DEV, TAIL);
	   from = consumed;
	   do
	   :: consumed != tail -> atomic {
		assert(LOAD(DEV, ENTRY + consumed) == lap);
		consumed = (consumed + 1) % N;
		if
		:: consumed == 0 -> lap = 1 - lap
		:: else
		fi
	      }
	   :: else -> break
	   od;
	   if
	   :: consumed != from -> STORE(DEV, HEAD, consumed)
	   :: else
	   fi;
	   d_step { tail = 0; from = 0 };

	   if
	   :: /* within the spin budget */
	      STORE(DEV, EI, (consumed + N - 1) % N)
	   :: /* polled, but not yet time to refresh */
	      skip
	   :: /* going to sleep */
#ifndef CLEAR_KICK_LATE
	      mem[KICK] = 0;
#endif
	      /* Arm: event index, then tail. */
#if defined(SLEEP_ON_MARKER)
	      skip;
#elif defined(NO_ARM_BARRIER)
	      STORE(DEV, EI, consumed);
#else
	      XCHG(DEV, EI, consumed);
#endif
	      tail = LOAD(DEV, TAIL);
	      if
	      :: tail == consumed -> losses = 0
#ifdef IGNORE_ARM
	      :: else -> losses = 0
#else
	      :: else ->
	         losses++;
	         if
	         :: losses < 3 -> tail = 0; goto again
	         :: else -> losses = 0; mem[KICK] = 1
	         fi
#endif
	      fi;
#ifdef CLEAR_KICK_LATE
	      mem[KICK] = 0;
#endif
	      d_step { tail = 0; asleep = true };
end_sleep:
	      atomic { mem[KICK] == 1; asleep = false }
	   fi;
again:	   skip
	od
}

#define LOST (asleep && mem[KICK] == 0 && mem[TAIL] != consumed && !publishing && EMPTY(DRV))

/* Enabled only in a state that must not be. */
proctype Monitor() {
end:
	atomic { LOST; assert(!LOST) }
}

init {
	atomic {
		run Drain(DRV); run Drain(DEV);
		run Driver(); run Device();
		run Monitor()
	}
}
