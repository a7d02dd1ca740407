/*
 * The life of a doorbell page: controller enable, queue creation, Doorbell Buffer Config before or after it,
 * pause and resume, reset with commands in flight, and all of it again, for ever.
 *
 * Three parties: the driver; the device's session, which handles messages in order; the device's worker,
 * which owns the queue. Session and worker meet by a stop request that travels over the worker's eventfd.
 * While no page is configured a doorbell is a message with a value; with a page the value counts for nothing. Wanted:
 *   - no lost wake-up on any path;
 *   - the device stores nothing to memory that the driver has taken back (R21);
 *   - no command is consumed that was not published, or twice (R17, R22, R23);
 *   - no party waits for another for ever (else: invalid end state).
 *
 * Mutations (-D): NO_REARM_AFTER_RESET R27, NO_DRAIN R21, KEEP_PAGE R21, NO_SEED R23, STALE_QUEUE R22,
 * NO_RECONFIG R28, STOP_NOT_PROBED R10.
 */

#ifndef N
#define N 2
#endif

#define DRV 0
#define WRK 1
#define SES 2
#define PROCS 3

/* TAIL and EI are the page, HEAD stands for the completion queue: all three are the driver's memory. */
#define TAIL 0
#define EI   1
#define HEAD 2
#define KICK 3
#define CELLS 4
#define DEPTH 2

#define DEVICE_WRITE(p, x) \
	assert((p) == DRV || (x) == KICK || ((x) == HEAD && lent) || ((x) != HEAD && pagelent))

/* Whose memory it is, as the driver sees it. */
bool lent;     /* CQ memory: from enable to the ready = 0 that the driver saw */
bool pagelent; /* the page: from the configuration to the same moment */

#include "tso.pml"

mtype = { ENABLE, CREATE, CONFIGURE, DISABLE, DOORBELL };
chan msg = [1] of { mtype, byte };
bool ready;  /* CSTS.RDY */
bool ack;    /* the reply to CREATE or CONFIGURE */

/* The device's own state: written by the session while the worker is parked, except DOORBELL's value. */
bool page, live;
byte mmio, head;
bool stop = true, parked = true;

/* For the monitor and the assertions only. */
byte published, unread;
bool publishing, asleep, busy;

#define ROOM ((LOAD(DRV, HEAD) + N - 1 - published) % N)

proctype Driver() {
	byte new, e;
	bool shadow = false;

	do
	:: /* Enable: all that the device will read or write is zeroed first (R28). */
	   STORE(DRV, TAIL, 0);
	   STORE(DRV, EI, 0);
	   STORE(DRV, HEAD, 0);
	   published = 0;
	   EMPTY(DRV);
	   atomic { lent = true; msg!ENABLE, 0 };
	   ready;
#ifdef NO_RECONFIG
	   pagelent = shadow;
#else
	   shadow = false;
#endif
	   if
	   :: !shadow -> atomic { pagelent = true; msg!CONFIGURE, 0 }; atomic { ack; ack = false }; shadow = true
	   :: true
	   fi;
	   msg!CREATE, 0; atomic { ack; ack = false };

	   do
	   :: ROOM > 0 ->
	      d_step { publishing = true; new = (published + 1) % N; unread++ };
	      if
	      :: shadow ->
	         XCHG(DRV, TAIL, new);
	         e = LOAD(DRV, EI);
	         if
	         :: NEED_RING(published, new, e) -> msg!DOORBELL, new
	         :: else
	         fi
	      :: else -> EMPTY(DRV); msg!DOORBELL, new
	      fi;
	      d_step { published = new; new = 0; e = 0; publishing = false }
	   :: !shadow -> /* configured under load (R23) */
	      EMPTY(DRV);
	      atomic { pagelent = true; msg!CONFIGURE, 0 };
	      atomic { ack; ack = false };
	      shadow = true
	   :: break
	   od;

	   /* Reset, whatever is in flight. From ready = 0 on the memory is the driver's again. */
	   EMPTY(DRV);
	   msg!DISABLE, 0;
	   d_step { !ready; lent = false; pagelent = false; unread = 0 }
	od
}

inline PARK() {
	stop = true;
	mem[KICK] = 1;
	parked
}

proctype Session() {
	byte v;
end:
	do
	:: atomic { msg?ENABLE, v -> busy = true };
	   atomic { ready = true; busy = false }
	:: atomic { msg?CREATE, v -> busy = true };
#ifndef STALE_QUEUE
	   d_step { head = 0; mmio = 0 };
	   if
	   :: page -> STORE(SES, TAIL, 0); STORE(SES, EI, 0); EMPTY(SES)
	   :: else
	   fi;
#endif
	   atomic { live = true; stop = false; ack = true; busy = false }
	:: atomic { msg?CONFIGURE, v -> busy = true };
	   if
	   :: live ->
	      PARK();
#ifndef NO_SEED
	      STORE(SES, TAIL, mmio);
	      STORE(SES, EI, mmio);
	      EMPTY(SES);
#endif
	      d_step { page = true; mmio = 0; stop = false }
	   :: else -> page = true
	   fi;
	   atomic { ack = true; busy = false }
	:: atomic { msg?DISABLE, v -> busy = true };
#ifndef NO_DRAIN
	   PARK();
#endif
#ifndef KEEP_PAGE
	   page = false;
#endif
	   atomic { live = false; v = 0; ready = false; busy = false }
	:: atomic { msg?DOORBELL, v -> busy = true };
	   if
	   :: !page -> mmio = v
	   :: else /* a kick without a value (R17) */
	   fi;
	   d_step { mem[KICK] = 1; v = 0; busy = false }
	:: atomic { live -> busy = true };
	   /* Paused and resumed for a reason of the device's own. */
	   PARK();
	   atomic { stop = false; busy = false }
	od
}

#define PROBE (page -> LOAD(WRK, TAIL) : mmio)

proctype Worker() {
	byte tail, losses;

park:
	EMPTY(WRK);
	mem[KICK] = 0; /* the request came this way, and a doorbell may have, too */
	d_step { losses = 0; parked = true };
end_parked:
	atomic { !stop; parked = false };
#ifdef NO_REARM_AFTER_RESET
	goto sleep;
#endif
poll:
	if
	:: stop -> goto park
	:: else
	fi;
	tail = PROBE;
	if
	:: head != tail ->
	   d_step {
		do
		:: head != tail -> assert(unread > 0); unread--; head = (head + 1) % N
		:: else -> break
		od;
		tail = 0
	   };
	   STORE(WRK, HEAD, head)
	:: else -> tail = 0
	fi;
	if
	:: page -> STORE(WRK, EI, (head + N - 1) % N); goto poll /* within the spin budget */
	:: true /* going to sleep */
	fi;
	mem[KICK] = 0;
	if
	:: page -> XCHG(WRK, EI, head)
	:: else
	fi;
	/* The last probe looks at all that a kick may stand for. */
	if
#ifdef STOP_NOT_PROBED
	:: PROBE == head -> losses = 0
#else
	:: stop -> goto park
	:: !stop && PROBE == head -> losses = 0
#endif
	:: else ->
	   losses++;
	   if
	   :: losses < 3 -> goto poll
	   :: else -> losses = 0; mem[KICK] = 1
	   fi
	fi;
sleep:
	asleep = true;
end_sleep:
	atomic { mem[KICK] == 1; asleep = false };
	goto poll
}

#define LOST (asleep && mem[KICK] == 0 && published != head && live && \
	!publishing && !busy && EMPTY(DRV) && len(msg) == 0)

/* Enabled only in a state that must not be. */
proctype Monitor() {
end:
	atomic { LOST; assert(!LOST) }
}

init {
	atomic {
		run Drain(DRV); run Drain(WRK); run Drain(SES);
		run Driver(); run Session(); run Worker();
		run Monitor()
	}
}
