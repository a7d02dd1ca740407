package text

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"
)

// Line is one line at the bottom of a terminal that is rewritten in place. On anything else
// it prints nothing. Its methods may be called from any goroutine.
type Line struct {
	mu    sync.Mutex
	f     *os.File
	on    bool
	after time.Time // nothing is shown before
	drawn bool
}

// NewLine returns a live line on f that stays hidden for the first delay, so that what is done
// quickly is done quietly.
func NewLine(f *os.File, delay time.Duration) *Line {
	return &Line{f: f, on: IsTerminal(f), after: time.Now().Add(delay)}
}

// Set shows s in place of what the line showed, cut to the terminal's width.
func (l *Line) Set(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.on || time.Now().Before(l.after) {
		return
	}
	fmt.Fprintf(l.f, "\r%s\x1b[K", cut(s, Width(l.f)-1))
	l.drawn = true
}

// Clear takes the line away.
func (l *Line) Clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.drawn {
		fmt.Fprint(l.f, "\r\x1b[K")
		l.drawn = false
	}
}

func cut(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	return string([]rune(s)[:max(width, 0)])
}

// IsTerminal reports whether f is a terminal that can rewrite a line.
func IsTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" }

// Width returns the columns of the terminal f, or 80.
func Width(f *os.File) int {
	if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
		return w
	}
	return 80
}

// HasUnicode reports whether f is a terminal whose locale is a UTF-8 one.
func HasUnicode(f *os.File) bool {
	if !IsTerminal(f) {
		return false
	}
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := strings.ToUpper(os.Getenv(name)); v != "" {
			return strings.Contains(v, "UTF-8") || strings.Contains(v, "UTF8")
		}
	}
	return false
}

// Meter is the text of a progress bar: "[####....]  42%  12.3 MiB of 30.0 MiB  1.2 GiB/s  2 s left".
// done and total are in any unit; shown is what stands behind the percentage.
func Meter(done, total float64, shown string, elapsed time.Duration, width int) string {
	part := 0.0
	if total > 0 {
		part = min(max(done/total, 0), 1)
	}
	left := ""
	if part > 0 && part < 1 && elapsed > time.Second {
		left = fmt.Sprintf("  %.0f s left", elapsed.Seconds()*(1-part)/part)
	}
	tail := fmt.Sprintf(" %3.0f%%  %s%s", part*100, shown, left)
	room := min(max(width-utf8.RuneCountInString(tail)-3, 0), 30)
	full := int(part * float64(room))
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", room-full) + "]" + tail
}
