package ublk

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestKilledServerLeavesAPauseAndNoError kills guestdrv several times under a load that checks every block, and starts it again.
func TestKilledServerLeavesAPauseAndNoError(t *testing.T) {
	dir := t.TempDir()
	g := boot(t, byVFIO,
		vmlab.Controller(t, hostmed.Shadow, "file:"+filepath.Join(dir, "a")+",size=128MiB"),
		vmlab.Controller(t, hostmed.Shadow, "file:"+filepath.Join(dir, "b")+",size=128MiB"))
	disk := g.serve(t, 0, "--id 3")
	if disk != "/dev/ublkb3" {
		t.Fatalf("serves %s", disk)
	}
	g.Run(t, fmt.Sprintf(`(fio --name=v --filename=%s --rw=randwrite --bs=4k --size=16M --numjobs=2 --offset_increment=64M --iodepth=32 --ioengine=libaio \
		--direct=1 --verify=crc32c --verify_fatal=1 --rate_iops=250,250 --group_reporting > /tmp/fio 2>&1; echo "fio ended: $?" >> /tmp/fio) < /dev/null > /dev/null 2>&1 &`, disk))
	const kills = 4
	stat := fmt.Sprintf("awk '{ print $1 + $5 }' /sys/block/%s/stat", filepath.Base(disk)) // reads and writes that have completed
	for n := range kills {
		// A fortieth of all, so that the load is on to the last.
		g.Run(t, fmt.Sprintf("from=$(%[1]s); until [ $(($(%[1]s) - from)) -ge 400 ]; do sleep 0.05; done", stat))
		g.Run(t, "kill -9 $(pidof guestdrv); for n in $(seq 100); do pidof guestdrv > /dev/null || exit 0; sleep 0.05; done; exit 1")
		if n == 0 {
			// Another namespace is not let near it, whatever is asked for, and the device waits on.
			for flags, want := range map[string]string{"--recover 3": "another namespace", "--id 3": "there is a ublk device 3", "--recover 4": "no such device"} {
				r := g.Try(t, "guestdrv serve "+g.devices[1]+" --ublk "+flags)
				if r.Exit == 0 || !strings.Contains(r.Stderr, want) {
					t.Errorf("%s by the wrong namespace: exit %d, %s", flags, r.Exit, r.Stderr)
				}
			}
		}
		flags := []string{"--recover 3", "--id 3", ""}[n%3]
		if again := g.serve(t, 0, flags); again != disk {
			t.Fatalf("serve %s came back as %s, not %s", flags, again, disk)
		}
	}
	r := g.long(t, 3*time.Minute, `until grep "fio ended" /tmp/fio; do sleep 0.5; done; cat /tmp/fio`)
	if !strings.Contains(r.Stdout, "fio ended: 0") || !regexp.MustCompile(`err= *0`).MatchString(r.Stdout) {
		t.Fatalf("fio under %d kills:\n%s", kills, r.Stdout)
	}
	for _, line := range regexp.MustCompile(`(?m)^ *(lat|clat) \(.*max=.*$|^.*issued rwts.*$`).FindAllString(r.Stdout, -1) {
		t.Log(strings.TrimSpace(line))
	}
	g.end(t, "TERM")
	if r := g.Try(t, "ls "+disk); r.Exit == 0 {
		t.Errorf("after SIGTERM the device is still there:\n%s", g.Run(t, "cat /tmp/serve.0"))
	}
	g.CheckDmesg(t)
}

// faulty is a disk whose controller loses two commands, and has writes fail.
const faulty = "fault:drop@write@after=700@first=1,drop@read@after=1500@first=1,status=write-fault@write@rate=1/300,seed=3,over=mem:size=64MiB"

// resetUnderLoad has commands vanish in the controller of the faulty disk, and some fail, under a load that checks every block: guestdrv resets the
// controller and sends again what was under way.
func (g *guest) resetUnderLoad(t *testing.T) {
	i := len(g.devices) - 1
	disk := g.serve(t, i, "--timeout 3s")
	r := g.long(t, 3*time.Minute, fmt.Sprintf(`fio --name=v --filename=%s --rw=randwrite --bs=4k --size=6M --numjobs=2 --offset_increment=32M --iodepth=32 --ioengine=libaio \
		--direct=1 --verify=crc32c --verify_fatal=1 --group_reporting`, disk))
	if r.Exit != 0 {
		t.Errorf("fio: exit %d\n%s%s", r.Exit, r.Stdout, r.Stderr)
	}
	g.end(t, "TERM")
	said := g.Run(t, fmt.Sprintf("cat /tmp/serve.%d", i))
	if m := regexp.MustCompile(`requests=\d+ errors=(\d+) .*resets=(\d+)`).FindStringSubmatch(said); m == nil || m[1] != "0" || m[2] == "0" {
		t.Errorf("guestdrv says\n%s", said)
	} else {
		t.Log(m[0])
	}
	g.CheckDmesg(t, `bogus Namespace Identifiers`)
}
