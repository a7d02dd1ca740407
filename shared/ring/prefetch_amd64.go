package ring

import "github.com/shadowbell/shadowbell/shared/nvme"

// prefetch has the processor fetch the n commands from p on, without waiting and without a fault if they are not there. An SQE comes
// from the other side's cache: fetched one by one, each is waited for.
//
//go:noescape
func prefetch(p *nvme.Command, n uint32)
