package nvmecli

import (
	"fmt"
	"strings"
	"testing"
)

// fileSystems: mkfs.ext4, files copied in, fstrim, unmounted, e2fsck finds nothing, in the guest and in the file on the host; the files are
// the same after another mount.
func fileSystems(t *testing.T, b *bench) {
	for _, nsid := range []int{1, 2} {
		dev := b.block(nsid)
		b.says(t, "mkfs.ext4 -q "+dev+" 2>&1 && echo made", "made")
		b.Run(t, "mkdir -p /mnt && mount -t ext4 "+dev+" /mnt")
		b.Run(t, "mkdir /mnt/libraries /mnt/many && cp -a /usr/lib/x86_64-linux-gnu/lib[a-m]* /mnt/libraries && for i in $(seq 200); do echo file $i > /mnt/many/$i; done")
		sums := b.Run(t, "cd /mnt && find . -type f | sort | xargs sha256sum")
		if n := strings.Count(sums, "\n") + 1; n < 210 {
			t.Fatalf("%d files were copied", n)
		}
		// What is deleted is given back.
		b.Run(t, "cp /usr/bin/busybox /mnt/big && sync && rm /mnt/big && sync")
		b.says(t, "fstrim -v /mnt", "/mnt: ")
		b.Run(t, "umount /mnt")
		b.Run(t, "e2fsck -fn "+dev)
		if spec := b.sub.Namespaces[nsid-1].Spec; strings.HasPrefix(spec, "file:") {
			path, _, _ := strings.Cut(strings.TrimPrefix(spec, "file:"), ",")
			if out, err := b.lab.Tool(t.Context(), "usr/sbin/e2fsck", "-fn", path); err != nil {
				t.Errorf("e2fsck on the host: %v\n%s", err, out)
			}
		}
		b.Run(t, "mount -t ext4 -o ro "+dev+" /mnt")
		if got := b.Run(t, "cd /mnt && find . -type f | sort | xargs sha256sum"); got != sums {
			t.Errorf("%s: the files have changed:\n%s", dev, firstDifference(got, sums))
		}
		b.Run(t, "umount /mnt")
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return fmt.Sprintf("%s\nwas\n%s", g[i], w[i])
		}
	}
	return fmt.Sprintf("%d files, were %d", len(g), len(w))
}
