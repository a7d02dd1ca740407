package nvme

import "strconv"

// Describe prints the command on one line as an engineer reads it, "READ nsid=1 slba=0x10 nlb=8".
// The same opcode means different things on the admin queue and on others.
// Counts are printed as what they mean, not as they are stored.
func (c *Command) Describe(admin bool) string { return string(c.AppendDescription(nil, admin)) }

// AppendDescription appends what Describe returns.
func (c *Command) AppendDescription(b []byte, admin bool) []byte {
	l := line{b}
	if admin {
		l.opcode(adminOpcodeNames[c.Opcode], c.Opcode)
		c.describeAdmin(&l)
	} else {
		l.opcode(ioOpcodeNames[c.Opcode], c.Opcode)
		c.describeIO(&l)
	}
	switch c.FUSE() {
	case FuseFirst:
		l.flag("FUSED-FIRST", true)
	case FuseSecond:
		l.flag("FUSED-SECOND", true)
	}
	l.flag("SGL", c.PSDT() != PSDTPRP)
	return l.b
}

func (c *Command) describeIO(l *line) {
	l.nsid(c.NSID)
	switch c.Opcode {
	case IOFlush:
	case IORead, IOWrite, IOCompare, IOWriteUncorrectable, IOWriteZeroes, IOVerify:
		l.hex("slba", c.SLBA())
		l.dec("nlb", uint64(c.NLB().Count()))
		l.flag("FUA", c.FUA())
		l.flag("LR", c.LimitedRetry())
		l.flag("DEAC", c.Opcode == IOWriteZeroes && c.DEAC())
		if v := c.PRInfo(); v != 0 {
			l.hex("prinfo", uint64(v))
		}
	case IOCopy:
		l.hex("sdlba", c.SLBA())
		l.dec("nr", uint64(c.CopyRanges().Count()))
		l.dec("format", uint64(c.CopyFormat()))
		l.flag("FUA", c.FUA())
	case IODSM:
		l.dec("nr", uint64(c.DSMRanges().Count()))
		l.flag("IDR", c.CDW11&DSMIntegralRead != 0)
		l.flag("IDW", c.CDW11&DSMIntegralWrite != 0)
		l.flag("AD", c.CDW11&DSMDeallocate != 0)
	default:
		c.describeWords(l)
	}
}

func (c *Command) describeAdmin(l *line) {
	switch c.Opcode {
	case AdminDeleteSQ, AdminDeleteCQ:
		l.dec("qid", uint64(c.QID()))
	case AdminCreateCQ:
		c.describeQueue(l)
		l.dec("iv", uint64(c.CQVector()))
		l.flag("IEN", c.CQInterrupts())
	case AdminCreateSQ:
		c.describeQueue(l)
		l.dec("cqid", uint64(c.SQCQID()))
		l.dec("qprio", uint64(c.SQPriority()))
	case AdminGetLogPage:
		l.text("lid", c.LID().String())
		l.nsid(c.NSID)
		l.dec("bytes", c.LogBytes())
		l.hex("lpo", c.LogOffset())
		l.flag("RAE", c.LogRetainEvent())
	case AdminIdentify:
		l.text("cns", c.CNS().String())
		l.nsid(c.NSID)
		l.dec("csi", uint64(c.IdentifyCSI()))
	case AdminAbort:
		l.dec("sqid", uint64(c.AbortSQID()))
		l.hex("cid", uint64(c.AbortCID()))
	case AdminSetFeatures:
		l.text("fid", c.FID().String())
		l.nsid(c.NSID)
		l.hex("cdw11", uint64(c.CDW11))
		l.flag("SV", c.FeatureSave())
	case AdminGetFeatures:
		l.text("fid", c.FID().String())
		l.nsid(c.NSID)
		l.dec("sel", uint64(c.FeatureSelect()))
		l.hex("cdw11", uint64(c.CDW11))
	case AdminAsyncEventRequest, AdminKeepAlive:
	case AdminDoorbellBufferConfig, AdminDoorbellMemory2014:
		l.hex("shadow", c.PRP1)
		l.hex("eventidx", c.PRP2)
	default:
		l.nsid(c.NSID)
		c.describeWords(l)
	}
}

func (c *Command) describeQueue(l *line) {
	l.dec("qid", uint64(c.QID()))
	l.dec("qsize", uint64(c.QSize().Count()))
	l.hex("prp1", c.PRP1)
	l.flag("PC", c.QContiguous())
}

// describeWords is for commands whose operands have no meaning here.
func (c *Command) describeWords(l *line) {
	l.hex("cdw10", uint64(c.CDW10))
	l.hex("cdw11", uint64(c.CDW11))
	l.hex("cdw12", uint64(c.CDW12))
	l.hex("cdw13", uint64(c.CDW13))
	l.hex("cdw14", uint64(c.CDW14))
	l.hex("cdw15", uint64(c.CDW15))
}

// line is a description as it grows.
type line struct{ b []byte }

// opcode appends the name in capitals, or "OPCODE 3Fh" when there is none.
func (l *line) opcode(name string, op uint8) {
	if name == "" {
		l.b = append(l.b, "OPCODE "...)
		l.b = append(l.b, hex8(op)...)
		return
	}
	for i := range len(name) {
		ch := name[i]
		if 'a' <= ch && ch <= 'z' {
			ch -= 'a' - 'A'
		}
		l.b = append(l.b, ch)
	}
}

func (l *line) key(name string) {
	l.b = append(l.b, ' ')
	l.b = append(l.b, name...)
	l.b = append(l.b, '=')
}

func (l *line) dec(name string, v uint64) {
	l.key(name)
	l.b = strconv.AppendUint(l.b, v, 10)
}

func (l *line) hex(name string, v uint64) {
	l.key(name)
	l.b = append(l.b, "0x"...)
	l.b = strconv.AppendUint(l.b, v, 16)
}

func (l *line) text(name, v string) {
	l.key(name)
	l.b = strconv.AppendQuote(l.b, v)
}

func (l *line) flag(name string, on bool) {
	if on {
		l.b = append(l.b, ' ')
		l.b = append(l.b, name...)
	}
}

func (l *line) nsid(nsid uint32) {
	if nsid == NSIDAll {
		l.key("nsid")
		l.b = append(l.b, "all"...)
		return
	}
	l.dec("nsid", uint64(nsid))
}
