/*
 * The completion side: two handshakes over one word, the CQ-head shadow doorbell.
 *
 *   head  Publish in the driver, Arm in the device, only while the device is out of CQ space (R8);
 *   quiet a bit above the head (bit 31 in the page, 128 here) that the driver sets while it polls.
 *         The device stores a CQE, then loads the word, and interrupts iff the bit is clear; a driver
 *         that goes to sleep clears the bit, then looks at the CQ once more (R1 and R2, mirrored).
 *
 * One completion queue of N entries runs for ever; the device may run out of work at any point. Wanted:
 *   - the driver never sleeps, with no interrupt set or under way, on a CQ that holds a completion;
 *   - the device never sleeps, with no kick set or under way, on a full CQ that got room;
 *   - every completion is reaped (else: invalid end state), and none is overwritten before (R9).
 *
 * Mutations (-D): NO_QUIET_BARRIER, NO_CQE_BARRIER, NO_RECHECK, CLEAR_IRQ_LATE (the handshake of the bit),
 * NO_DRIVER_BARRIER R1, NO_ARM_BARRIER R2, IGNORE_ARM R3, ARM_AT_TAIL R8, CLEAR_KICK_LATE R10 (the head's).
 */

#ifndef N
#define N 3
#endif

#define DRV 0
#define DEV 1
#define PROCS 2

#define CQHD  0 /* shadow CQ head, driver writes: head, plus QUIET */
#define CQEI  1 /* its event index, device writes */
#define IRQ   2 /* the driver's eventfd: sticky */
#define KICK  3 /* the device's eventfd: sticky */
#define PHASE 4 /* N entries; an entry holds its phase bit */
#define CELLS (PHASE + N)

#define QUIET 128
#define INDEX(v) ((v) & 127)

#include "tso.pml"

/* For the monitor and the assertions only. */
byte head;       /* the driver's next entry */
byte tail;       /* the device's next entry */
byte unread;     /* posted and not yet reaped */
bool posting;    /* the device is between a CQE and its interrupt decision */
bool publishing; /* the driver is between a head store and its ring */
bool drvasleep, devasleep;

proctype Driver() {
	byte old, e;
	bit phase = 1;

	do
	:: LOAD(DRV, PHASE + head) == phase ->
	   publishing = true;
	   old = head;
	   do
	   :: LOAD(DRV, PHASE + head) == phase -> atomic {
		unread--;
		head = (head + 1) % N;
		if
		:: head == 0 -> phase = 1 - phase
		:: else
		fi
	      }
	   :: head != old -> break
	   od;
	   /* Publish the head: the driver is awake, so quiet. */
#ifdef NO_DRIVER_BARRIER
	   STORE(DRV, CQHD, head + QUIET);
#else
	   XCHG(DRV, CQHD, head + QUIET);
#endif
	   e = LOAD(DRV, CQEI);
	   if
	   :: NEED_RING(old, head, e) -> STORE(DRV, KICK, 1)
	   :: else
	   fi;
	   d_step { old = 0; e = 0; publishing = false }

	:: LOAD(DRV, PHASE + head) != phase ->
	   /* Nothing there and the spin budget is used up: clear the bit, then look again. */
#ifdef NO_QUIET_BARRIER
	   STORE(DRV, CQHD, head);
#else
	   XCHG(DRV, CQHD, head);
#endif
	   if
#ifdef NO_RECHECK
	   :: true ->
#else
	   :: LOAD(DRV, PHASE + head) != phase ->
#endif
#ifdef CLEAR_IRQ_LATE
	      mem[IRQ] = 0;
#endif
	      drvasleep = true;
end_sleep:
	      atomic { mem[IRQ] == 1; mem[IRQ] = 0; drvasleep = false }
#ifndef NO_RECHECK
	   :: else
#endif
	   fi;
	   STORE(DRV, CQHD, head + QUIET) /* awake again; late is only an interrupt too many */
	od
}

#define FULL(hd) ((tail + 1) % N == (hd))

proctype Device() {
	byte hd, losses = 0;
	bit phase = 1;

	do
	:: hd = INDEX(LOAD(DEV, CQHD));
	   /* Post a batch of at least one. */
	   do
	   :: !FULL(hd) -> atomic {
		posting = true;
		assert(unread < N - 1);
		unread++;
		STORE(DEV, PHASE + tail, phase);
		tail = (tail + 1) % N;
		if
		:: tail == 0 -> phase = 1 - phase
		:: else
		fi
	      }
	   :: break
	   od;
	   /* One interrupt decision for the batch. */
	   if
	   :: posting ->
#ifndef NO_CQE_BARRIER
	      EMPTY(DEV);
#endif
	      if
	      :: (LOAD(DEV, CQHD) & QUIET) == 0 -> STORE(DEV, IRQ, 1)
	      :: else
	      fi;
	      posting = false
	   :: else
	   fi;
	   if
	   :: FULL(hd) ->
	      /* Blocked on CQ space: arm at the head as last seen, then look again. */
	      hd = INDEX(LOAD(DEV, CQHD));
	      if
	      :: FULL(hd) ->
#ifndef CLEAR_KICK_LATE
	         mem[KICK] = 0;
#endif
#if defined(ARM_AT_TAIL)
	         XCHG(DEV, CQEI, tail);
#elif defined(NO_ARM_BARRIER)
	         STORE(DEV, CQEI, hd);
#else
	         XCHG(DEV, CQEI, hd);
#endif
	         if
	         :: INDEX(LOAD(DEV, CQHD)) == hd -> losses = 0
#ifdef IGNORE_ARM
	         :: else
#else
	         :: else ->
	            losses++;
	            if
	            :: losses < 3 -> goto again
	            :: else -> losses = 0; mem[KICK] = 1
	            fi
#endif
	         fi;
#ifdef CLEAR_KICK_LATE
	         mem[KICK] = 0;
#endif
	         devasleep = true;
end_blocked:
	         atomic { mem[KICK] == 1; devasleep = false }
	      :: else
	      fi
	   :: else
	   fi;
again:	   hd = 0
	:: break /* no more work */
	od;
	INDEX(mem[CQHD]) == tail /* blocks for ever if a wake-up was lost */
}

#define DRV_LOST (drvasleep && mem[IRQ] == 0 && head != tail && !posting && EMPTY(DEV))
#define DEV_LOST (devasleep && mem[KICK] == 0 && !FULL(INDEX(mem[CQHD])) && !publishing && EMPTY(DRV))

/* Enabled only in a state that must not be. */
proctype Monitor() {
end:
	if
	:: atomic { DRV_LOST; assert(!DRV_LOST) }
	:: atomic { DEV_LOST; assert(!DEV_LOST) }
	fi
}

init {
	atomic {
		run Drain(DRV); run Drain(DEV);
		run Driver(); run Device();
		run Monitor()
	}
}
