package pcifn

import (
	"os"
	"strings"
	"testing"
)

func TestStopDMAClearsOneBit(t *testing.T) {
	f := newFake(t)
	// One that a driver has is not touched: that driver waits for what the function writes.
	owned := "sys/bus/pci/devices/" + first + "/config"
	f.put(owned, "\x01\x02\x03\x04\x46\x05rest")
	if err := f.stopDMA(first); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(f.path(owned)); err != nil || b[4] != 0x46 {
		t.Errorf("config space of a function with a driver: % x, %v", b, err)
	}
	const alone = "0000:02:00.0"
	f.function(alone, "0x010802", "")
	config := "sys/bus/pci/devices/" + alone + "/config"
	f.put(config, "\x01\x02\x03\x04\x46\x05rest")
	if err := f.stopDMA("02:00.0"); err != nil {
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
