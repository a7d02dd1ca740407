package doorbells

import (
	"fmt"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestStride: a stock driver finds doorbells that are 64 bytes apart (CAP.DSTRD = 4), in every mode, in the page as in the registers.
func TestStride(t *testing.T) {
	lab := vmlab.Open(t)
	c := hostmed.Config{}
	for i, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap} {
		spec := fmt.Sprintf("mem:size=%dMiB", 16+i) // each its own: a spec that is named twice is one namespace
		c.Controllers = append(c.Controllers, hostmed.ControllerConfig{Namespaces: []string{spec}, Doorbells: mode, DSTRD: 4})
	}
	m := vmlab.Serve(t, &c)
	var config vmlab.Config
	for _, x := range c.Controllers {
		config.Devices = append(config.Devices, vmlab.VFIOUser(x.Socket))
	}
	vm := lab.Boot(t, config)
	const blocks = 512
	for i, x := range c.Controllers {
		vm.Run(t, fmt.Sprintf("fio --name=w --filename=%s --rw=randwrite --bs=4k --size=%d --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1",
			vm.Disk(t, i).Namespace(1), blocks*4096))
		s, err := m.Stats(x.Socket)
		if err != nil {
			t.Fatal(err)
		}
		if s.Writes < blocks || s.Reads < blocks || s.Errors != 0 {
			t.Errorf("%v: %+v, want at least %d writes and reads and no error", x.Doorbells, s, blocks)
		}
		rung := s.SQDoorbells + s.CQDoorbells
		if x.Doorbells == hostmed.Trap && rung < blocks || x.Doorbells == hostmed.Mmap && rung > 0 {
			t.Errorf("%v: %d doorbells came as messages", x.Doorbells, rung)
		}
		if x.Doorbells == hostmed.Shadow && s.CQDoorbells > blocks {
			t.Errorf("shadow: %d CQ doorbells came as messages: the page is not in use", s.CQDoorbells)
		}
	}
	vm.CheckDmesg(t)
}
