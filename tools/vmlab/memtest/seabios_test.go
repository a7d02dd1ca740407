package memtest

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// bootSector is a program of the BIOS's, which uses SeaBIOS's NVMe driver after SeaBIOS has locked its memory, and with it all of the
// machine's was unmapped and mapped again under the controller's queues. For n from 1 to 40 it reads sector n (int 13h, 42h), sends it up to
// the first zero to the serial port, and writes it to sector n + 100 (43h). If sector 300 does not begin with "2" it makes it so and resets the machine;
// if it does, it switches it off.
const bootSector = "ea057c0000" + // ljmp $0,$1f
	"fa31c08ed88ec08ed0bc007cfb" + // 1: cli; xor %ax,%ax; mov %ax,%ds; %es; %ss; mov $0x7c00,%sp; sti
	"88168c7c" + "b92800" + // mov %dl,drive; mov $40,%cx
	"51" + "b442" + "e84c00" + // next: push %cx; mov $0x42,%ah; call disk
	"be0080" + "ac" + "84c07406" + "baf803ee" + "ebf5" + // mov $0x8000,%si; 2: lodsb; test %al,%al; jz 3f; mov $0x3f8,%dx; out %al,%dx; jmp 2b
	"8306847c64" + "b443" + "e83400" + "832e847c63" + // 3: addw $100,lba; mov $0x43,%ah; call disk; subw $99,lba
	"59" + "e2da" + // pop %cx; loop next
	"b442" + "c706847c2c01" + "e82100" + // mov $0x42,%ah; movw $300,lba; call disk
	"803e00803274" + "11" + // cmpb $'2',0x8000; je off
	"c606008032" + "b443" + "e81000" + // movb $'2',0x8000; mov $0x43,%ah; call disk
	"b0fee664" + "f4" + "ebfd" + // mov $0xfe,%al; out %al,$0x64; halt: hlt; jmp halt
	"ba0406b80020ef" + "ebf4" + // off: mov $0x604,%dx; mov $0x2000,%ax; out %ax,%dx; jmp halt
	"b000" + "8a168c7c" + "be7c7c" + "cd13" + "72e7" + "c3" + // disk: mov $0,%al; mov drive,%dl; mov $dap,%si; int $0x13; jc halt; ret
	"8d7400" + // padding
	"10000100" + "00800000" + // dap: 16 bytes, 1 sector, at 0:8000h
	"01000000" + "00000000" + // lba
	"80" // drive

// TestSeaBIOSBoots: SeaBIOS starts from our disk, uses it, and so it does again after a reset of the machine, in each doorbell mode.
func TestSeaBIOSBoots(t *testing.T) {
	lab := vmlab.Open(t)
	sector, err := hex.DecodeString(bootSector)
	if err != nil {
		t.Fatal(err)
	}
	image := make([]byte, 1<<20)
	copy(image, sector)
	image[510], image[511] = 0x55, 0xaa
	for n := 1; n <= 40; n++ {
		copy(image[n*512:], fmt.Sprintf("sector %d\n", n))
	}
	for _, mode := range []hostmed.DoorbellMode{hostmed.Trap, hostmed.Mmap} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(file, image, 0o600); err != nil {
				t.Fatal(err)
			}
			disk := vmlab.Controller(t, mode, "file:"+file).With("bootindex", 1)
			vm := lab.Boot(t, vmlab.Config{Boot: vmlab.FromDisk, NoAgent: true, Reboot: true, CPUs: 1, MemoryMiB: 128, Devices: []vmlab.Device{disk}})
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
			defer cancel()
			if err := vm.Wait(ctx); err != nil {
				t.Fatalf("the machine did not start twice: %v", err)
			}
			got, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for n := 1; n <= 40; n++ {
				want := fmt.Sprintf("sector %d\n", n)
				if c := strings.Count(vm.Console(), want); c != 2 {
					t.Errorf("%q was read %d times, want once in each life", want, c)
				}
				if s := string(got[(n+100)*512:][:len(want)]); s != want {
					t.Errorf("sector %d is %q, want %q", n+100, s, want)
				}
			}
		})
	}
}
