package ctrl

import (
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	logBurst  = 20
	logPeriod = time.Second
)

// limiter is a log that a guest cannot flood: at most logBurst lines in a logPeriod, and how
// many were left out.
type limiter struct {
	log     hclog.Logger
	since   time.Time
	lines   int
	dropped int
}

func (l *limiter) allow() bool {
	if now := time.Now(); now.Sub(l.since) >= logPeriod {
		if l.dropped > 0 {
			l.log.Warn("log lines left out", "lines", l.dropped)
		}
		l.since, l.lines, l.dropped = now, 0, 0
	}
	if l.lines == logBurst {
		l.dropped++
		return false
	}
	l.lines++
	return true
}

func (l *limiter) debug(msg string, args ...any) {
	if l.log.IsDebug() && l.allow() {
		l.log.Debug(msg, args...)
	}
}

func (l *limiter) warn(msg string, args ...any) {
	if l.log.IsWarn() && l.allow() {
		l.log.Warn(msg, args...)
	}
}

func (l *limiter) info(msg string, args ...any) {
	if l.log.IsInfo() && l.allow() {
		l.log.Info(msg, args...)
	}
}

// failed logs a failed admin command. Drivers probe for what they can use, so that is no warning, unless
// the device's own side failed.
func (l *limiter) failed(cmd *nvme.Command, r *result) {
	level, wanted := hclog.Debug, l.log.IsDebug()
	if r.status.Code() == nvme.StatusInternalError {
		level, wanted = hclog.Warn, l.log.IsWarn()
	}
	if !wanted || !l.allow() {
		return
	}
	args := []any{"command", cmd.Describe(true), "status", r.status.String(), "cause", r.cause}
	if r.err != nil {
		args = append(args, "error", r.err)
	}
	l.log.Log(level, "admin command failed", args...)
}
