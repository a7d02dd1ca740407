package pcifn

import (
	"os"
	"strings"
	"testing"
)

func TestStopDMAClearsOneBit(t *testing.T) {
	f := newFake(t)
	config := "sys/bus/pci/devices/" + second + "/config"
	f.put(config, "\x01\x02\x03\x04\x46\x05rest")
	if err := f.stopDMA("01:00.0"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.path(config))
	if err != nil || string(b) != "\x01\x02\x03\x04\x42\x05rest" {
		t.Errorf("config space % x, %v", b, err)
	}
	if err := f.stopDMA("0000:09:00.0"); err == nil || !strings.Contains(err.Error(), "0000:09:00.0") {
		t.Errorf("a function that is not there: %v", err)
	}
}
