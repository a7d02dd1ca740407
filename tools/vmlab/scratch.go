package vmlab

import (
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// scratch is a directory for the life of a machine. It is locked, so that what a killed process leaves can be told from what is in use.
type scratch struct {
	path string
	lock *os.File
}

const scratchPrefix = "shadowbell-vmlab-"

// staleAfter leaves alone what is so young that its lock may not be there yet.
const staleAfter = 10 * time.Minute

var sweepOnce sync.Once

func newScratch() (*scratch, error) {
	sweepOnce.Do(func() { sweep(os.TempDir(), staleAfter) })
	path, err := os.MkdirTemp("", scratchPrefix)
	if err != nil {
		return nil, err
	}
	s := &scratch{path: path}
	if s.lock, err = os.Open(path); err == nil {
		err = unix.Flock(int(s.lock.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	}
	if err != nil {
		_ = s.remove()
		return nil, err
	}
	return s, nil
}

func (s *scratch) file(name string) string { return filepath.Join(s.path, name) }

func (s *scratch) remove() error {
	if s.lock != nil {
		s.lock.Close()
	}
	return os.RemoveAll(s.path)
}

// sweep removes what processes that were killed have left in dir, as far as it may.
func sweep(dir string, after time.Duration) {
	left, _ := filepath.Glob(filepath.Join(dir, scratchPrefix+"*"))
	for _, p := range left {
		fi, err := os.Stat(p)
		if err != nil || !fi.IsDir() || time.Since(fi.ModTime()) < after {
			continue
		}
		f, err := os.Open(p)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(p)
		}
		f.Close()
	}
}
