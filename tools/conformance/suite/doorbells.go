package suite

import (
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// dbPages are shadow doorbells and event indices. NVMe Base 2.0c 5.8.
type dbPages struct {
	c          *ctl
	shadow, ei buf
}

// newPages returns a pair of zeroed pages that the controller does not know of.
func (c *ctl) newPages() *dbPages { return &dbPages{c: c, shadow: c.page(), ei: c.page()} }

// slot returns the words of a doorbell.
func (p *dbPages) slot(qid uint16, completions bool) (word, ei *atomic.Uint32) {
	dstrd := p.c.facts.cap.DSTRD()
	tail, head, err := dbbuf.Slots(p.shadow.mem, qid, dstrd)
	p.c.must(err)
	tailEI, headEI, err := dbbuf.Slots(p.ei.mem, qid, dstrd)
	p.c.must(err)
	if completions {
		return head, headEI
	}
	return tail, tailEI
}

// command returns the Doorbell Buffer Config, or its forerunner, that names the pages.
func (p *dbPages) command(opcode uint8) (cmd nvme.Command) {
	cmd.SetDoorbellBuffers(opcode, p.shadow.iova, p.ei.iova)
	return cmd
}

// sharePages configures the pages. Queues that are made from here on use them.
func (c *ctl) sharePages(opcode uint8) *dbPages {
	p := c.newPages()
	c.ok(p.command(opcode))
	c.pages = p
	return p
}
