package pcifn

import (
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// TestStopDMAAfterTheDriversEnd: the lock of a process that is about to end is waited for; that of the next one means that there is nothing to stop.
func TestStopDMAAfterTheDriversEnd(t *testing.T) {
	f := newFake(t)
	const alone = "0000:02:00.0"
	f.function(alone, "0x010802", "")
	dir := "sys/bus/pci/devices/" + alone
	f.put(dir+"/config", "\x01\x02\x03\x04\x46\x05rest")
	f.put(dir+"/resource0", "registers")
	hold := func() *os.File {
		bar, err := os.OpenFile(f.path(dir+"/resource0"), os.O_RDWR, 0)
		if err == nil {
			err = unix.Flock(int(bar.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		if err != nil {
			t.Fatal(err)
		}
		return bar
	}
	stopped := func(want bool) {
		t.Helper()
		if on, err := f.mayReach(alone); on == want || err != nil {
			t.Errorf("the function may reach memory: %v, %v", on, err)
		}
	}
	bar := hold()
	if err := f.stopDMA(alone); err != nil {
		t.Fatal(err)
	}
	stopped(false)
	time.AfterFunc(20*time.Millisecond, func() { bar.Close() })
	if err := f.stopDMA(alone); err != nil {
		t.Fatal(err)
	}
	stopped(true)
	f.awaitStopped(alone, time.Hour)
	f.put(dir+"/config", "\x01\x02\x03\x04\xff\xffrest")
	f.awaitStopped(alone, time.Hour) // it does not answer
	f.put(dir+"/config", "\x01\x02\x03\x04\x46\x05rest")
	f.awaitStopped(alone, 10*time.Millisecond)
	hold().Close() // the lock is nobody's
}
