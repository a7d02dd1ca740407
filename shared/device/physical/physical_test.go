package physical

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFrame(t *testing.T) {
	if got, err := frame(1<<63 | 1<<55 | 0x1234); got != 0x1234000 || err != nil {
		t.Errorf("%#x, %v", got, err)
	}
	if _, err := frame(0x1234); err == nil {
		t.Error("a page that is not there has an address")
	}
	if _, err := frame(1 << 63); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("without the right: %v", err)
	}
}
