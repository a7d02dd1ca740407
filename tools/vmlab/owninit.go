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
func (i *Initramfs) write(ctx context.Context, l *Lab, w io.Writer) error {
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
		b, err := l.module(module)
		if err != nil {
			return err
		}
		if err := a.content(name, cpio.TypeReg|0o644, b); err != nil {
			return err
		}
	}
	return a.w.Close()
}

// module takes a kernel module, unpacked, from the lab's initramfs.
func (l *Lab) module(name string) ([]byte, error) {
	f, err := os.Open(filepath.Join(l.dir, "initramfs"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := cpio.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("kernel module %s: the lab has not got it: add it to guestModules", name)
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
