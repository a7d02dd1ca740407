package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// RunFiles has writers put files into dir as careful programs do: written under another name, fsync, rename, fsync of the directory. acks
// gets a line for each. It ends when ctx does or when anything fails.
func RunFiles(ctx context.Context, dir string, run uint64, writers int, acks io.Writer) error {
	a := &acknowledger{w: acks}
	errs := make(chan error, writers)
	for w := range writers {
		go func() { errs <- writeFiles(ctx, dir, run, w, a) }()
	}
	var first error
	for range writers {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

func writeFiles(ctx context.Context, dir string, run uint64, w int, a *acknowledger) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	for n := 0; ctx.Err() == nil; n++ {
		path := filepath.Join(dir, fileName(w, n))
		if err := writeFile(path+".new", fileContent(run, w, n)); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
		if err := unix.Fsync(int(d.Fd())); err != nil {
			return fmt.Errorf("fsync of %s: %w", dir, err)
		}
		if err := a.acknowledge(fileKind, w, n); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path string, p []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	return errors.Join(err, f.Sync(), f.Close())
}

func fileName(w, n int) string { return fmt.Sprintf("%d-%06d", w, n) }

// fileContent has some odd number of bytes.
func fileContent(run uint64, w, n int) []byte {
	return content(100+(n*7919+w*104729)%20000, run, "file", w, n)
}

// CheckFiles looks in dir for everything that RunFiles acknowledged. Report.Records counts files.
func CheckFiles(dir string, run uint64, acks Acks) (Report, error) {
	var r Report
	for w, last := range acks.Files {
		for n := 0; n <= last; n++ {
			r.Records++
			p, err := os.ReadFile(filepath.Join(dir, fileName(w, n)))
			switch {
			case errors.Is(err, os.ErrNotExist):
				r.lose("file %s, acknowledged up to %d, is missing", fileName(w, n), last)
			case err != nil:
				return r, err
			case !bytes.Equal(p, fileContent(run, w, n)):
				r.lose("file %s, acknowledged up to %d: %d bytes that were not written", fileName(w, n), last, len(p))
			}
		}
		if _, err := os.Stat(filepath.Join(dir, fileName(w, last+1))); err == nil {
			r.Beyond++
		}
	}
	return r, nil
}
