package vmlab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Kernel is what a guest runs whose kernel is loaded directly.
type Kernel int

const (
	// Debian is the stock kernel of Debian stable.
	Debian Kernel = iota
	// Ubuntu is a newer one, with what Debian's leaves out: iommufd and VFIO's device files, VFIO without an IOMMU, and a ublk that resizes. Its
	// modules are few: see ubuntuModules.
	Ubuntu
)

const (
	// ubuntuMirror has the packages of a release as they were on its day. They never change, so they can be told by their sums.
	ubuntuMirror  = "http://archive.ubuntu.com/ubuntu"
	ubuntuRelease = "7.0.0-14-generic"

	ubuntuImagePackage  = "pool/main/l/linux/linux-image-unsigned-7.0.0-14-generic_7.0.0-14.14_amd64.deb"
	ubuntuModulePackage = "pool/main/l/linux/linux-modules-7.0.0-14-generic_7.0.0-14.14_amd64.deb"
)

// piece is one file of a package. Neither package is compressed: a file is a range of its bytes, and so 18 MB are fetched instead of 186.
type piece struct {
	file     string
	at, size int64
	sum      string // SHA-256
}

// The pieces are of packages whose SHA-256, ffb47903… and 5bbbd6bd…, stand in the list of resolute that Ubuntu's archive key has signed, which is
// in Debian's package ubuntu-keyring. For another kernel check those as apt does, then `ar tO` and `tar tvR` say where things are.
var (
	ubuntuImage = []piece{
		{"boot/vmlinuz-7.0.0-14-generic", 22208, 17273344, "a0f66f5c4028cdd82c4b1f160767fad0f1350607f3a6e0a741abe2c4d37ba340"},
	}
	// ubuntuModules by their place. ext4, virtio and loop are built in; NVMe is not.
	ubuntuModules = []piece{
		{"kernel/crypto/hkdf.ko.zst", 13717696, 3501, "cb6d2316b1b7d1459a58d011f3d1facac953a2b0048428c7527e6c498bc530a7"},
		{"kernel/drivers/block/ublk_drv.ko.zst", 16780992, 35554, "25af7753c30a1d28bb7ad2799bcb401b646e93512bbd60835cf1e417929b09ed"},
		{"kernel/drivers/iommu/iommufd/iommufd.ko.zst", 53043904, 67514, "9cf754d7548f51eca6dcf7554d28d74ed5bcd41a15d72b5dfa909fba2c20e183"},
		{"kernel/drivers/nvme/common/nvme-auth.ko.zst", 106621120, 11205, "f19c9675898f9fb8eead6a69b86b2877fe4d69d4129d930ee96e21b0781bf05f"},
		{"kernel/drivers/nvme/common/nvme-keyring.ko.zst", 106632896, 6502, "be626dd52c8f2139097d1fa5a71b434cd87d97b62be814fbfd6a3afc5326c832"},
		{"kernel/drivers/nvme/host/nvme-core.ko.zst", 106640576, 117153, "33df12f18f815549075cb8c237d32e155baa35a3c692910785ec5a3b05073916"},
		{"kernel/drivers/nvme/host/nvme.ko.zst", 106898112, 43112, "23a37870679c62dc73b340a046d6c3aabb0053a8c942a865fff49de3b1be74ed"},
		{"kernel/drivers/vfio/pci/vfio-pci-core.ko.zst", 126394560, 51417, "dca0d030c5bad7056d362f163a6ed854518486c3bca4f5f006afee0652e5491d"},
		{"kernel/drivers/vfio/pci/vfio-pci.ko.zst", 126446784, 11323, "149da8ab7a51b1c34483289bd579f96a790354374c6c3afbec4deef76f2b39a2"},
		{"kernel/drivers/vfio/vfio.ko.zst", 126490816, 35220, "475fd980bda9dc653c8ad3171526549e66e8478fdea236904d356b1d0f242f8d"},
		{"kernel/drivers/vfio/vfio_iommu_type1.ko.zst", 126526656, 29772, "1df214005236f8838404e8b798bd2fb0a748adc1f6f5e1b6c57ea7d792ae86dc"},
		{"kernel/virt/lib/irqbypass.ko.zst", 168615104, 3911, "da63c9b6885fc74306f0702358f2c48428a105ffb0edecfb001a4e24add4b4c3"},
		{"modules.builtin", 168619712, 10431, "ef55d7bc5528d2c01f38fc0d8f6473c75e14ec62349898f6529be9bbac871366"},
	}
)

// moduleArchive has the modules of a kernel that are not in the initramfs.
const moduleArchive = "modules.cpio"

// ErrMirror is a mirror that cannot be reached, or has not got what it should have.
var ErrMirror = errors.New("the mirror cannot be reached, or has not got it")

// ubuntuKey names the cache of the second kernel.
func ubuntuKey() string {
	h := sha256.New()
	fmt.Fprintln(h, recipeVersion, ubuntuRelease, ubuntuImagePackage, ubuntuModulePackage, ubuntuImage, ubuntuModules)
	return "ubuntu-" + hex.EncodeToString(h.Sum(nil))[:16]
}

// kernelDir is where a kernel's bzImage and vmlinux are.
func (l *Lab) kernelDir(k Kernel) string {
	if k == Ubuntu {
		return filepath.Join(filepath.Dir(l.dir), ubuntuKey())
	}
	return l.dir
}

// modules is the archive that has a kernel's modules.
func (l *Lab) modules(k Kernel) string {
	if k == Ubuntu {
		return filepath.Join(l.kernelDir(k), moduleArchive)
	}
	return filepath.Join(l.dir, initramfsFile)
}

// Fetch makes what is missing of a kernel, as Setup does of the rest. Start does it where a machine wants it.
func (l *Lab) Fetch(ctx context.Context, k Kernel) error {
	dir := l.kernelDir(k)
	now := time.Now()
	if k == Debian || os.Chtimes(dir, now, now) == nil { // it is there, and in use
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, setupLimit)
	defer cancel()
	unlock, err := lock(ctx, filepath.Join(filepath.Dir(dir), "lock"), l.log)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return nil // another process made it meanwhile
	}
	b := &build{ctx: ctx, dir: dir + ".tmp", root: l.root()}
	if err := os.RemoveAll(b.dir); err != nil {
		return err
	}
	return b.make(dir, l.log, []step{
		{"Ubuntu kernel", b.ubuntuKernel},
		{"its modules", b.ubuntuModules},
	})
}

// ubuntuKernel fetches bzImage and cuts vmlinux out of it.
func (b *build) ubuntuKernel() error {
	if err := b.ubuntu(ubuntuImagePackage, ubuntuImage, b.dir); err != nil {
		return err
	}
	bz := filepath.Join(b.dir, "bzImage")
	if err := os.Rename(filepath.Join(b.dir, ubuntuImage[0].file), bz); err != nil {
		return err
	}
	image, err := os.ReadFile(bz)
	if err != nil {
		return err
	}
	b.note = fmt.Sprintf("%s, %d MB", ubuntuRelease, len(image)>>20)
	return errors.Join(b.vmlinux(image), os.Remove(filepath.Join(b.dir, "boot")))
}

// ubuntuModules fetches the modules and makes an archive of them.
func (b *build) ubuntuModules() error {
	base := filepath.Join(b.dir, "modules")
	tree := filepath.Join(base, "usr/lib/modules", ubuntuRelease)
	if err := b.ubuntu(ubuntuModulePackage, ubuntuModules, tree); err != nil {
		return err
	}
	var packed []string
	for _, p := range ubuntuModules {
		if strings.HasSuffix(p.file, ".zst") {
			packed = append(packed, filepath.Join(tree, p.file))
		}
	}
	if _, err := output(b.ctx, b.root, "zstd", append([]string{"-q", "-d", "--rm"}, packed...)...); err != nil {
		return err
	}
	if err := os.Symlink("usr/lib", filepath.Join(base, "lib")); err != nil {
		return err
	}
	if err := b.depmod(base, ubuntuRelease); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(b.dir, moduleArchive))
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	a.dirs["lib"] = true // it is in the initramfs
	if err := a.tree(base); err != nil {
		return err
	}
	b.note = fmt.Sprintf("%d", len(packed))
	return errors.Join(a.w.Close(), f.Close(), os.RemoveAll(base))
}

// ubuntu fetches pieces of a package of Ubuntu's into a directory. They are in the order in which the package has them.
func (b *build) ubuntu(pkg string, pieces []piece, to string) error {
	mirror := os.Getenv(envUbuntu)
	if mirror == "" {
		mirror = ubuntuMirror
	}
	c := &http.Client{Transport: &http.Transport{
		Proxy: b.proxy, DialContext: (&net.Dialer{Timeout: answerWithin}).DialContext, TLSHandshakeTimeout: answerWithin, ResponseHeaderTimeout: answerWithin,
	}}
	defer c.CloseIdleConnections()
	var err error
	for range 3 { // as apt
		if err = fetchPieces(b.ctx, c, strings.TrimSuffix(mirror, "/")+"/"+pkg, pieces, to); !errors.Is(err, ErrMirror) || b.ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("%w; %s=URL names another mirror of Ubuntu 26.04 than %s", err, envUbuntu, mirror)
	}
	return nil
}

// answerWithin is how long a mirror may say nothing.
const answerWithin = 20 * time.Second

// proxy is what apt would use for a request, which is what the environment says if apt's configuration says nothing.
func (b *build) proxy(r *http.Request) (*url.URL, error) {
	if _, err := exec.LookPath("apt-config"); err != nil {
		return http.ProxyFromEnvironment(r)
	}
	out, err := command(b.ctx, exec.Command("apt-config", "shell", "p", "Acquire::"+r.URL.Scheme+"::Proxy::"+r.URL.Hostname(), "p", "Acquire::"+r.URL.Scheme+"::Proxy"))
	if err != nil {
		return nil, err
	}
	first, _, _ := strings.Cut(out, "\n")
	switch p := strings.Trim(strings.TrimPrefix(first, "p="), "'"); p {
	case "":
		return http.ProxyFromEnvironment(r)
	case "DIRECT":
		return nil, nil
	default:
		return url.Parse(p)
	}
}

// fetchPieces asks the file at a URL for a range for each piece that is not there yet. A server that does not know ranges sends the whole, and is read on.
func fetchPieces(ctx context.Context, c *http.Client, from string, pieces []piece, to string) error {
	var body io.ReadCloser
	defer func() {
		if body != nil {
			body.Close()
		}
	}()
	at, whole := int64(0), false // where body is, of the whole file
	for _, p := range pieces {
		file := filepath.Join(to, p.file)
		if _, err := os.Stat(file); err == nil {
			continue // of an attempt before
		}
		if !whole {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
			if err != nil {
				return err
			}
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", p.at, p.at+p.size-1))
			answer, err := c.Do(r)
			if err != nil {
				return fmt.Errorf("%w: %w", ErrMirror, err)
			}
			if body != nil {
				body.Close()
			}
			body = answer.Body
			switch answer.StatusCode {
			case http.StatusPartialContent:
				at = p.at
			case http.StatusOK:
				at, whole = 0, true
			default:
				return fmt.Errorf("%w: %s: %s", ErrMirror, from, answer.Status)
			}
		}
		b := make([]byte, p.size)
		if _, err := io.CopyN(io.Discard, body, p.at-at); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrMirror, from, err)
		}
		if _, err := io.ReadFull(body, b); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrMirror, from, err)
		}
		at = p.at + p.size
		if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != p.sum {
			return fmt.Errorf("%s in %s is not what it should be: its SHA-256 is %x, want %s", p.file, from, sum, p.sum)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			return err
		}
	}
	return nil
}
