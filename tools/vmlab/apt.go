package vmlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
)

// build is a cache that is being made.
type build struct {
	ctx  context.Context
	dir  string // everything
	root string // the unpacked packages
	note string // what the step that has just ended says of itself
}

const archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// lists fetches Debian's package lists with a private apt: the machine's settings (proxy, certificates, keys) with sources, state and cache
// of our own. Nothing is installed on the machine, and no root is needed.
func (b *build) lists() error {
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: the lab is made of Debian packages and needs a machine of Debian's family", tool)
		}
	}
	for _, d := range []string{"sources", "preferences", "state/lists/partial", "cache", "tools"} {
		if err := os.MkdirAll(filepath.Join(b.dir, "apt", d), 0o755); err != nil {
			return err
		}
	}
	// No package is installed yet. apt locks files beside this one, too.
	if err := os.WriteFile(b.apt("state/status"), nil, 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(b.apt("apt.conf"), []byte(b.aptConfig()), 0o644); err != nil {
		return err
	}
	pin := fmt.Sprintf("Package: %s\nPin: release n=%s\nPin-Priority: 900\n", strings.Join(fromBackports, " "), backports)
	if err := os.WriteFile(b.apt("preferences/vmlab"), []byte(pin), 0o644); err != nil {
		return err
	}
	mirrors, err := b.mirrors()
	if err != nil {
		return err
	}
	var tried []error
	for _, m := range mirrors {
		source := fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s %s\nComponents: main\n", m, suite, backports)
		if _, err := os.Stat(archiveKeyring); err == nil {
			source += "Signed-By: " + archiveKeyring + "\n"
		}
		if err := os.WriteFile(b.apt("sources/vmlab.sources"), []byte(source), 0o644); err != nil {
			return err
		}
		_, err := b.tool("apt-get", "update", "-qq", "--error-on=any")
		if err == nil {
			b.note = suite + ", " + backports
			return nil
		}
		tried = append(tried, fmt.Errorf("%s: %w", m, err))
	}
	return fmt.Errorf("no mirror of apt's configuration has Debian %s and %s; name one with %s=URL: %w", suite, backports, envMirror, errors.Join(tried...))
}

func (b *build) apt(name string) string { return filepath.Join(b.dir, "apt", name) }

// aptConfig is read after the machine's own files. Lists grow by assignment, so what must go is cleared.
func (b *build) aptConfig() string {
	return fmt.Sprintf(`#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi;
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Sandbox::User "";
APT::Default-Release "";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Get::Assume-Yes "true";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State %[1]q;
Dir::State::status %[5]q;
Dir::Cache %[2]q;
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts %[3]q;
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts %[4]q;
`, b.apt("state"), b.apt("cache"), b.apt("sources"), b.apt("preferences"), b.apt("state/status"))
}

// mirrors returns where packages may come from: what the machine's apt would fetch its lists from, Debian's first.
func (b *build) mirrors() ([]string, error) {
	if m := os.Getenv(envMirror); m != "" {
		return []string{m}, nil
	}
	// It needs neither lists, which images of containers come without, nor root.
	out, err := command(b.ctx, exec.Command("apt-get", "update", "--print-uris"))
	if err != nil {
		return nil, err
	}
	mirrors := mirrorsOf(out)
	if len(mirrors) == 0 {
		return nil, fmt.Errorf("apt is configured for no repository: add one to /etc/apt/sources.list.d, or name one with %s=URL", envMirror)
	}
	return mirrors, nil
}

// mirrorsOf finds the repositories in what apt-get update --print-uris prints: 'URI' file size.
func mirrorsOf(out string) []string {
	var mirrors []string
	for line := range strings.Lines(out) {
		uri, _, _ := strings.Cut(strings.TrimPrefix(line, "'"), "'")
		repository, release, ok := strings.Cut(uri, "/dists/")
		if ok && !strings.Contains(release, "-security/") && !slices.Contains(mirrors, repository) {
			mirrors = append(mirrors, repository)
		}
	}
	slices.SortStableFunc(mirrors, func(a, b string) int {
		debian := func(m string) int {
			if strings.HasSuffix(m, "/debian") {
				return 0
			}
			return 1
		}
		return debian(a) - debian(b)
	})
	return mirrors
}

// download fetches the packages, what they depend on, and the kernels.
func (b *build) download() error {
	if err := b.fetch("tools", packages...); err != nil {
		return err
	}
	if err := b.fetchKernel("tools", suite); err != nil {
		return err
	}
	if err := b.fetchKernel(newerDir, backports); err != nil {
		return err
	}
	if err := b.fetch("debian", debianPackages...); err != nil {
		return err
	}
	var size int64
	debs, err := filepath.Glob(b.apt("*/*.deb"))
	if err != nil {
		return err
	}
	for _, d := range debs {
		fi, err := os.Stat(d)
		if err != nil {
			return err
		}
		size += fi.Size()
	}
	b.note = fmt.Sprintf("%d packages, %d MB", len(debs), size>>20)
	return nil
}

// fetch downloads packages and what they depend on into a directory of their own.
func (b *build) fetch(dir string, names ...string) error {
	if err := os.MkdirAll(b.apt(dir+"/partial"), 0o755); err != nil {
		return err
	}
	_, err := b.tool("apt-get", append([]string{"-o", "Dir::Cache::Archives=" + b.apt(dir), "install", "-qq", "--download-only"}, names...)...)
	return err
}

// fetchKernel downloads a release's newest kernel, without what else it depends on, which would drag in an initramfs maker.
func (b *build) fetchKernel(dir, release string) error {
	out, err := b.tool("apt-cache", "depends", "--recurse", "--important", kernelPackage+"/"+release)
	if err != nil {
		return err
	}
	names := kernelPackages(out)
	if len(names) == 0 {
		return fmt.Errorf("%s of %s depends on no kernel: %q", kernelPackage, release, out)
	}
	if err := os.MkdirAll(b.apt(dir), 0o755); err != nil {
		return err
	}
	_, err = b.toolIn(dir, "apt-get", append([]string{"download", "-qq"}, names...)...)
	return err
}

// kernelPackages finds the packages of one version of the kernel in what apt-cache depends --recurse prints. Before Linux 6.19 it was one, now
// what was in that is in several.
func kernelPackages(out string) []string {
	var names []string
	for line := range strings.Lines(out) {
		name := strings.TrimSuffix(line, "\n")
		version, ok := strings.CutSuffix(name, kernelFlavour)
		if ok && strings.HasPrefix(name, "linux-") && strings.ContainsAny(version, "0123456789") && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// unpack makes the tree that the programs run from.
func (b *build) unpack() error {
	if err := b.extract("tools", b.root); err != nil {
		return err
	}
	version, err := output(b.ctx, b.root, "qemu-system-x86_64", "--version")
	if err != nil {
		return err
	}
	b.note, _, _ = strings.Cut(version, "\n")
	return nil
}

// extract makes one tree of the packages of a directory. Their scripts do not run.
func (b *build) extract(dir, root string) error {
	debs, err := filepath.Glob(b.apt(dir + "/*.deb"))
	if err != nil {
		return err
	}
	// Merged before the first package: each must find its place.
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.MkdirAll(filepath.Join(root, "usr", d), 0o755); err != nil {
			return err
		}
		if err := os.Symlink("usr/"+d, filepath.Join(root, d)); err != nil {
			return err
		}
	}
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	for _, d := range debs {
		g.Go(func() error {
			_, err := command(b.ctx, exec.Command("dpkg-deb", "--extract", d, root))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, pattern := range trimmed {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, p := range paths {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(b.apt(dir))
}

// tool runs one of apt's programs in the cache of packages.
func (b *build) tool(name string, args ...string) (string, error) {
	return b.toolIn("tools", name, args...)
}

// toolIn is tool with the directory where download puts things.
func (b *build) toolIn(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, append([]string{"-c", b.apt("apt.conf")}, args...)...)
	cmd.Dir = b.apt(dir)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	return command(b.ctx, cmd)
}

// command runs cmd, which dies with this process, and returns what it printed. An error has its last words.
func command(ctx context.Context, cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	p, err := start(cmd)
	if err != nil {
		return "", err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
		<-p.done
		return stdout.String(), fmt.Errorf("%s: %w", filepath.Base(cmd.Path), ctx.Err())
	}
	if p.err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), p.err, lastLines(stderr.String()+stdout.String(), 3))
	}
	return stdout.String(), nil
}
