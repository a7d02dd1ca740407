package vmlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// Initramfs is a first file system with what a test puts into it and nothing else, besides the console that the kernel makes itself: what a microVM
// boots.
type Initramfs struct {
	// Programs of this module's tools, by their path in the guest: "init": "guestdrv".
	Programs map[string]string
	// Modules of the kernel, unpacked, by their path in the guest: "lib/modules/ublk_drv.ko": "ublk_drv".
	Modules map[string]string
}

// write writes the archive.
func (i *Initramfs) write(ctx context.Context, l *Lab, k Kernel, w io.Writer) error {
	a := newArchive(w)
	for name, program := range i.Programs {
		b, err := buildProgram(ctx, program)
		if err != nil {
			return err
		}
		if err := a.content(name, cpio.TypeReg|0o755, b); err != nil {
			return err
		}
	}
	for name, module := range i.Modules {
		b, err := l.module(k, module)
		if err != nil {
			return err
		}
		if err := a.content(name, cpio.TypeReg|0o644, b); err != nil {
			return err
		}
	}
	return a.w.Close()
}

// module takes a module of a kernel, unpacked, from where the lab has them.
func (l *Lab) module(k Kernel, name string) ([]byte, error) {
	f, err := os.Open(l.modules(k))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := cpio.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("kernel module %s: the lab has not got it: add it to guestModules or ubuntuModules", name)
		}
		if err != nil {
			return nil, err
		}
		if path.Base(h.Name) == name+".ko" && strings.Contains(h.Name, "/modules/") {
			return io.ReadAll(r)
		}
	}
}

// File returns a file of the lab's packages, such as usr/bin/busybox, which is static.
func (l *Lab) File(name string) ([]byte, error) { return os.ReadFile(filepath.Join(l.root(), name)) }
