package backend

// prefetch has the processor fetch the 512 bytes from p on, without waiting and without a fault if they
// are not there. Starting on the next request's bytes while this one's are copied takes a third off a
// random 4 KiB copy; the hardware's own prefetcher only notices once the copy has begun.
//
//go:noescape
func prefetch(p *byte)
