package wire

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// OpenPort opens a guest's virtio-serial port, or waits for it. It finds the port by its name, in sysfs: there need not be a udev that makes links.
func OpenPort(name string, limit time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == name {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no virtio-serial port %s after %v", name, limit)
		}
	}
}
