package vmlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Variables of the environment.
const (
	envDir    = "SHADOWBELL_VMLAB"        // the cache directory
	envMirror = "SHADOWBELL_VMLAB_MIRROR" // where Debian's packages are, instead of what apt is configured for
	envAccel  = "SHADOWBELL_VMLAB_ACCEL"  // kvm or tcg, instead of what was probed
)

// setupLimit is far beyond what a slow machine with a slow mirror needs.
const setupLimit = 10 * time.Minute

// Lab is a finished cache: QEMU, a kernel and an initramfs.
type Lab struct {
	dir string
	log io.Writer
}

// CacheDir returns the directory that holds everything that Setup makes.
func CacheDir() (string, error) {
	if d := os.Getenv(envDir); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		// Services have no home.
		return filepath.Join(os.TempDir(), "shadowbell-vmlab"), nil
	}
	return filepath.Join(d, "shadowbell", "vmlab"), nil
}

// Setup makes what is missing, one line for each step on log, and returns the lab. Processes that
// come while one is at it wait for it; what a broken-off one has left is removed.
func Setup(ctx context.Context, log io.Writer) (*Lab, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("vmlab needs an x86-64 machine, this is %s", runtime.GOARCH)
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	l := &Lab{dir: filepath.Join(cache, recipeKey()), log: log}
	return l, inCache(ctx, l.dir, log, l.make)
}

// inCache has build make dir in the cache, under its lock, unless it is there.
func inCache(ctx context.Context, dir string, log io.Writer, build func(context.Context) error) error {
	if now := time.Now(); os.Chtimes(dir, now, now) == nil { // it is there, and in use
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, setupLimit)
	defer cancel()
	cache := filepath.Dir(dir)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	unlock, err := lock(ctx, filepath.Join(cache, "lock"), log)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return nil // another process made it meanwhile
	}
	if err := removeOld(cache); err != nil {
		return err
	}
	return build(ctx)
}

// unusedFor is after how long the cache of another recipe goes. Until then another checkout may want it.
const unusedFor = 7 * 24 * time.Hour

// removeOld removes what broken-off set-ups have left, and old caches. The lock is held.
func removeOld(cache string) error {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !e.IsDir() {
			continue
		}
		if strings.HasSuffix(e.Name(), ".tmp") || time.Since(fi.ModTime()) > unusedFor {
			if err := os.RemoveAll(filepath.Join(cache, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// make builds the cache beside its place and renames it: it is there as a whole or not at all. The lock is held.
func (l *Lab) make(ctx context.Context) error {
	tmp := l.dir + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	b := &build{ctx: ctx, dir: tmp, root: filepath.Join(tmp, "root")}
	begin := time.Now()
	fmt.Fprintf(l.log, "vmlab: setting up in %s\n", l.dir)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"package lists", b.lists},
		{"download", b.download},
		{"unpack", b.unpack},
		{"kernel", b.kernel},
		{"modules", b.modules},
		{"initramfs", b.initramfs},
		{"newer kernel", b.newerKernel},
		{"debian", b.debian},
	} {
		b.note = ""
		at := time.Now()
		if err := step.do(); err != nil {
			return errors.Join(fmt.Errorf("vmlab set-up, %s: %w", step.name, err), os.RemoveAll(tmp))
		}
		fmt.Fprintf(l.log, "vmlab: %-13s %5.1f s  %s\n", step.name, time.Since(at).Seconds(), b.note)
	}
	if err := os.Rename(tmp, l.dir); err != nil {
		return err
	}
	fmt.Fprintf(l.log, "vmlab: ready after %.1f s\n", time.Since(begin).Seconds())
	return nil
}

// lock takes an advisory lock that ends with the process.
func lock(ctx context.Context, path string, log io.Writer) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	for said := false; ; said = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock of %s: %w", path, err)
		}
		if !said {
			fmt.Fprintln(log, "vmlab: waiting for another process that sets up")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for %s: %w", path, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Clean removes all caches.
func Clean(ctx context.Context, log io.Writer) error {
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	if _, err := os.Stat(cache); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := lock(ctx, filepath.Join(cache, "lock"), log)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "lock" {
			continue // who waits for it must find the same file
		}
		if err := os.RemoveAll(filepath.Join(cache, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
