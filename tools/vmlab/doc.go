// Package vmlab boots real Linux guests under QEMU for tests and demonstrations: a stock Debian kernel, with fio, nvme-cli and mkfs at hand,
// and any number of vfio-user disks in it.
//
// Setup makes everything that is needed from Debian packages, once per machine, into a cache directory (a minute or two; nothing is installed,
// no root is needed). docs/vmlab.md says what. Where a stock kernel boots under KVM it is used, elsewhere software emulation.
//
// A test is
//
//	func TestFlushReachesTheFile(t *testing.T) {
//		lab := vmlab.Open(t) // skips with -short, fails where there can be no lab
//		disk := vmlab.Controller(t, hostmed.Shadow, "file:"+t.TempDir()+"/disk,size=64MiB") // before the machine: it must outlive it
//		vm := lab.Boot(t, vmlab.Config{Devices: []vmlab.Device{disk}})
//		vm.Run(t, "fio --name=w --filename=/dev/nvme0n1 --rw=write --bs=64k --size=16M --direct=1 --end_fsync=1")
//		vm.CheckDmesg(t)
//	}
//
// A boot takes about 6 s under emulation, so tests share one where they can. Subtests plug in a disk each:
//
//	vm := lab.Boot(t, vmlab.Config{Ports: 8})
//	for _, spec := range specs {
//		device := vmlab.Controller(t, hostmed.Shadow, spec) // the outer t: QEMU keeps its connection
//		t.Run(spec, func(t *testing.T) {
//			d := vm.Plug(t, device)
//			vm.Run(t, "mkfs.ext4 -q "+d.Namespace(1))
//		})
//	}
//
// Boot, Run, Plug and the others that take a testing.TB end the test when something is wrong; Start, Exec, HotAdd, QMP, Restarted, Poweroff,
// Kill and Wait return errors, which have the end of the guest's console in them. Everything has a deadline. Nothing is left running, however the test
// ends: QEMU dies with the process that started it.
//
// QEMU 11.1's hazards, which a test should not run into by accident: it aborts on device_del of a vfio-user device, and when a server goes
// away while doorbells are messages; a server that is silent for 5 s is cut off.
package vmlab
