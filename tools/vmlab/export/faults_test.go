package export

import (
	"strings"
	"testing"
)

// TestNBDSeesAPauseAndNoError: requests that the device loses are sent once more after a reset, and the client finds its data.
func TestNBDSeesAPauseAndNoError(t *testing.T) {
	s := serve(t, []string{"fault:drop@write@after=500@first=2,drop@read@after=500@first=2,delay=300ms@flush@first=1,over=mem:size=64MiB"}, "--timeout", "1s")
	s.run("fio", "--ioengine=nbd", "--uri="+s.uri("1"), "--rw=randrw", "--bsrange=512-64k", "--iodepth=32", "--size=32M", "--fsync=200",
		"--verify=crc32c", "--verify_fatal=1", "--name=a")
	if log := s.log.String(); !strings.Contains(log, "reset") {
		t.Error("no request was lost: the log does not speak of a reset")
	}
}

// TestNBDErrorsOfTheMedium: clients get the errno that says what the device said, for the blocks that it was about.
func TestNBDErrorsOfTheMedium(t *testing.T) {
	s := serve(t, []string{"fault:status=unrecovered-read-error+dnr@read@lba=128-255,status=capacity-exceeded+dnr@write@lba=256-383," +
		"status=namespace-is-write-protected+dnr@write@lba=384-511,over=mem:size=64MiB"})
	for command, says := range map[string]string{
		"read 64k 64k":   "read failed: Input/output error",
		"write 128k 64k": "write failed: No space left on device",
		"write 192k 64k": "write failed: Operation not permitted",
		"read 0 64k":     "read 65536/65536 bytes at offset 0",
		"write 256k 64k": "wrote 65536/65536 bytes at offset 262144",
	} {
		cmd, out := s.program("qemu-io", "-f", "raw", "-t", "none", "-c", command, s.qemu("1"))
		_ = cmd.Run() // qemu-io's exit code is of no account, what it says is
		if !strings.Contains(out.String(), says) {
			t.Errorf("%s: %s", command, out)
		}
	}
}
