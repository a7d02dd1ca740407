package nvmecli

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// io is nvme-cli on one namespace. What it does is looked at through the block device, and on the host in the file.
type io struct {
	*bench
	dev    string
	nsid   int
	block  int
	blocks int
	spec   string // file: and its options; otherwise there is nothing to look at on the host
}

// commands: read, write, compare, flush, dsm, write-zeroes, copy, verify, write-uncor, get-lba-status, and commands that no controller has.
func commands(t *testing.T, b *bench) {
	for nsid, id := range b.seen[0].ns {
		size, _ := id.BlockSize()
		x := io{bench: b, dev: b.block(nsid), nsid: nsid, block: int(size), blocks: int(id.NSZE), spec: b.sub.Namespaces[nsid-1].Spec}
		x.transfers(t)
		x.zeroes(t)
		x.allocation(t)
		x.copies(t)
		x.uncorrectable(t)
		x.bounds(t)
	}
}

// at is nvme-cli's start block and count of blocks.
func at(lba, count int) string { return fmt.Sprintf(" -s %d -c %d", lba, count-1) }

// has checks what is at lba, from in the guest and from outside.
func (x *io) has(t *testing.T, what string, lba int, want []byte) {
	t.Helper()
	x.Run(t, fmt.Sprintf("rm -f /tmp/got; nvme read %s%s -z %d -d /tmp/got", x.dev, at(lba, len(want)/x.block), len(want)))
	if got := x.get(t, "/tmp/got"); !bytes.Equal(got, want) {
		t.Errorf("%s: nvme read of block %d: %.64q, want %.64q", what, lba, got, want)
	}
	if x.spec[:4] == "file" {
		if got := onDisk(t, x.spec, int64(lba*x.block), len(want)); !bytes.Equal(got, want) {
			t.Errorf("%s: block %d in the file: %.64q, want %.64q", what, lba, got, want)
		}
	}
}

// fill writes a pattern of its own to some blocks, and returns it.
func (x *io) fill(t *testing.T, lba, count int, options string) []byte {
	t.Helper()
	data := pattern(fmt.Sprintf("block %d of %d", lba, x.nsid), count*x.block)
	x.put(t, "/tmp/data", data)
	x.says(t, fmt.Sprintf("nvme write %s%s -z %d -d /tmp/data %s 2>&1", x.dev, at(lba, count), len(data), options), "write: Success")
	return data
}

func (x *io) transfers(t *testing.T) {
	before := x.smart(t)
	data := x.fill(t, 16, 8, "--force-unit-access")
	x.has(t, "write with FUA", 16, data)
	long := x.fill(t, 1000, 128<<10/x.block, "")
	x.has(t, "write of 128 KiB", 1000, long)
	x.says(t, fmt.Sprintf("nvme flush %s", x.dev), "NVMe Flush: success")

	x.put(t, "/tmp/data", data)
	x.says(t, fmt.Sprintf("nvme compare %s%s -z %d -d /tmp/data 2>&1", x.dev, at(16, 8), len(data)), "compare: Success")
	data[len(data)-1] ^= 1
	x.put(t, "/tmp/data", data)
	x.fails(t, nvme.StatusCompareFailure, fmt.Sprintf("nvme compare %s%s -z %d -d /tmp/data", x.dev, at(16, 8), len(data)))
	after := x.smart(t)
	// Compare is a read. A failed one is in the error log, and no command that was done.
	if w, r := after["host_write_commands"]-before["host_write_commands"], after["host_read_commands"]-before["host_read_commands"]; w != 2 || r != 3 {
		t.Errorf("2 writes, 2 reads and 2 compares, one of which fails, are %d writes and %d reads in the health log", w, r)
	}
	if n := after["num_err_log_entries"] - before["num_err_log_entries"]; n != 1 {
		t.Errorf("a compare that fails made %d entries in the error log", n)
	}
}

func (x *io) zeroes(t *testing.T) {
	zeroes := make([]byte, 8*x.block)
	for i, options := range []string{"", "--deac", "--force-unit-access"} {
		lba := 64 * (i + 1)
		data := x.fill(t, lba, 16, "")
		x.says(t, fmt.Sprintf("nvme write-zeroes %s%s %s", x.dev, at(lba+4, 8), options), "NVME Write Zeroes Success")
		x.has(t, "write-zeroes "+options, lba, append(append(bytes.Clone(data[:4*x.block]), zeroes...), data[12*x.block:]...))
	}
	// Two ranges, the second of one page's worth of blocks.
	page := max(4096/x.block, 1)
	data := x.fill(t, 320, 4*page, "")
	x.says(t, fmt.Sprintf("nvme dsm %s --ad --slbs=%d,%d --blocks=%d,%d", x.dev, 320, 320+2*page, page, page), "NVMe DSM: success")
	gap := make([]byte, page*x.block)
	x.has(t, "dsm --ad", 320, bytes.Join([][]byte{gap, data[page*x.block : 2*page*x.block], gap, data[3*page*x.block:]}, nil))
	x.says(t, fmt.Sprintf("nvme dsm %s --idw --idr --slbs=0 --blocks=%d", x.dev, x.blocks), "NVMe DSM: success")
}

// allocation: a hole in a file is known, and reads of it fail for who asks for that.
func (x *io) allocation(t *testing.T) {
	if x.seen[0].ns[x.nsid].NSFEAT&nvme.NSFEATDeallocError == 0 {
		return
	}
	first, per := 8<<20/x.block, 64<<10/x.block
	x.Run(t, fmt.Sprintf("dd if=/bin/busybox of=%s bs=64k count=1 seek=129 oflag=direct 2>/dev/null", x.dev))
	x.status(t, 2, first, 4*per, "{ DSLBA: 0x%014x, NLB: 0x%06x, Status: 00 }", first+per, per)
	x.Run(t, fmt.Sprintf("nvme set-feature %s -n %d -f 5 -V 0x10000", x.ctrl(), x.nsid))
	x.fails(t, nvme.StatusDeallocated, fmt.Sprintf("nvme read %s%s -z %d -d /tmp/got", x.dev, at(first, 1), x.block))
	x.fails(t, nvme.StatusDeallocated, fmt.Sprintf("nvme verify %s%s", x.dev, at(first, 2*per)))
	x.says(t, fmt.Sprintf("nvme verify %s%s", x.dev, at(first+per, per)), "NVME Verify Success")
	x.Run(t, fmt.Sprintf("nvme set-feature %s -n %d -f 5 -V 0", x.ctrl(), x.nsid))
	x.has(t, "a hole", first, make([]byte, x.block))
}

// copies: Copy of two ranges, the later one first, and one whose source and target overlap.
func (x *io) copies(t *testing.T) {
	source := x.fill(t, 400, 32, "")
	x.fill(t, 500, 32, "")
	part := func(from, n int) []byte { return source[from*x.block : (from+n)*x.block] }
	x.says(t, fmt.Sprintf("nvme copy %s --sdlba=500 --slbs=420,402 --blocks=9,4", x.dev), "NVMe Copy: success")
	x.has(t, "copy", 500, append(bytes.Clone(part(20, 10)), part(2, 5)...))
	x.fails(t, nvme.StatusInvalidField, fmt.Sprintf("nvme copy %s --sdlba=500 --slbs=420 --blocks=9 --format=1", x.dev))
	x.fails(t, nvme.StatusLBAOutOfRange, fmt.Sprintf("nvme copy %s --sdlba=500 --slbs=%d --blocks=9", x.dev, x.blocks-9))
	x.fails(t, nvme.StatusLBAOutOfRange, fmt.Sprintf("nvme copy %s --sdlba=%d --slbs=400 --blocks=9", x.dev, x.blocks-9))
	x.has(t, "copies that failed", 500, append(bytes.Clone(part(20, 10)), part(2, 5)...))
}

// uncorrectable: marked blocks fail, in the error log and among the media errors, until they are written.
func (x *io) uncorrectable(t *testing.T) {
	data := x.fill(t, 600, 24, "")
	x.says(t, fmt.Sprintf("nvme verify %s%s", x.dev, at(600, 24)), "NVME Verify Success")
	before := x.smart(t)
	x.says(t, fmt.Sprintf("nvme write-uncor %s%s", x.dev, at(608, 4)), "NVME Write Uncorrectable Success")
	x.fails(t, nvme.StatusUnrecoveredRead, fmt.Sprintf("nvme read %s%s -z %d -d /tmp/got", x.dev, at(600, 24), 24*x.block))
	x.fails(t, nvme.StatusUnrecoveredRead, fmt.Sprintf("nvme verify %s%s", x.dev, at(611, 1)))
	if after := x.smart(t); after["media_errors"]-before["media_errors"] != 2 || after["num_err_log_entries"]-before["num_err_log_entries"] != 2 {
		t.Errorf("2 failed reads are %d media errors and %d entries in the error log",
			after["media_errors"]-before["media_errors"], after["num_err_log_entries"]-before["num_err_log_entries"])
	}
	x.status(t, 0x10, 600, 24, "{ DSLBA: 0x%014x, NLB: 0x%06x, Status: 00 }", 608, 4)
	x.status(t, 0x11, 610, 24, "{ DSLBA: 0x%014x, NLB: 0x%06x, Status: 00 }", 610, 2)
	x.has(t, "the blocks before those that are uncorrectable", 600, data[:8*x.block])
	x.has(t, "the blocks behind those that are uncorrectable", 612, data[12*x.block:])
	x.put(t, "/tmp/data", data[8*x.block:12*x.block])
	x.Run(t, fmt.Sprintf("nvme write %s%s -z %d -d /tmp/data", x.dev, at(608, 4), 4*x.block))
	x.has(t, "blocks that were uncorrectable and are written", 600, data)
	x.status(t, 0x11, 600, 24, "(NLSD): 0")
	x.fails(t, nvme.StatusLBAOutOfRange, fmt.Sprintf("nvme verify %s%s", x.dev, at(x.blocks-1, 2)))
	x.fails(t, nvme.StatusLBAOutOfRange, fmt.Sprintf("nvme write-uncor %s%s", x.dev, at(x.blocks-1, 2)))
}

// status is get-lba-status, whose JSON output nvme-cli 2.13 dies of.
func (x *io) status(t *testing.T, action, lba, count int, format string, args ...any) {
	t.Helper()
	x.says(t, fmt.Sprintf("nvme get-lba-status %s -n %d -s %d -l %d -m 255 -a %#x", x.dev, x.nsid, lba, count, action),
		fmt.Sprintf(format, args...), "Completion Condition(CMPC): 2")
}

// bounds: what lies beyond the end, and what is no command at all, is refused with the right status and does nothing.
func (x *io) bounds(t *testing.T) {
	last := x.fill(t, x.blocks-1, 1, "")
	x.put(t, "/tmp/data", make([]byte, 2*x.block))
	beyond := at(x.blocks-1, 2)
	for _, command := range []string{
		fmt.Sprintf("write %s%s -z %d -d /tmp/data", x.dev, beyond, 2*x.block),
		fmt.Sprintf("read %s%s -z %d -d /tmp/got", x.dev, beyond, 2*x.block),
		fmt.Sprintf("compare %s%s -z %d -d /tmp/data", x.dev, beyond, 2*x.block),
		fmt.Sprintf("write-zeroes %s%s", x.dev, beyond),
		fmt.Sprintf("dsm %s --ad --slbs=%d --blocks=2", x.dev, x.blocks-1),
	} {
		x.fails(t, nvme.StatusLBAOutOfRange, "nvme "+command)
	}
	for _, opcode := range []int{0x03, 0x7f, 0xff} {
		x.fails(t, nvme.StatusInvalidOpcode, fmt.Sprintf("nvme io-passthru %s --opcode=%#x --namespace-id=%d", x.dev, opcode, x.nsid))
		x.fails(t, nvme.StatusInvalidOpcode, fmt.Sprintf("nvme admin-passthru %s --opcode=%#x", x.ctrl(), opcode))
	}
	x.has(t, "commands that failed", x.blocks-1, last)
}
