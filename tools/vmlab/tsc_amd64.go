package vmlab

import (
	"sync"
	"time"
)

func rdtsc() uint64

// tscKHz is the rate of this machine's time stamp counter, which an emulated one runs at.
var tscKHz = sync.OnceValue(func() uint64 {
	begin, from := time.Now(), rdtsc()
	time.Sleep(100 * time.Millisecond)
	ticks, took := rdtsc()-from, time.Since(begin)
	return ticks * uint64(time.Millisecond) / uint64(took)
})
