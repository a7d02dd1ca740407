package ublk

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

// Command numbers as C's macros make them from <linux/ublk_cmd.h>.
func TestCommandNumbers(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uint32
	}{
		{"UBLK_U_CMD_GET_DEV_INFO", cmdGetDevInfo, 0x80207502},
		{"UBLK_U_CMD_ADD_DEV", cmdAddDev, 0xc0207504},
		{"UBLK_U_CMD_START_DEV", cmdStartDev, 0xc0207506},
		{"UBLK_U_CMD_GET_PARAMS", cmdGetParams, 0x80207509},
		{"UBLK_U_CMD_END_USER_RECOVERY", cmdEndRecovery, 0xc0207511},
		{"UBLK_U_CMD_GET_FEATURES", cmdGetFeatures, 0x80207513},
		{"UBLK_U_CMD_DEL_DEV_ASYNC", cmdDelDevAsync, 0x80207514},
		{"UBLK_U_CMD_UPDATE_SIZE", cmdUpdateSize, 0xc0207515},
		{"UBLK_U_IO_FETCH_REQ", ioFetch, 0xc0107520},
		{"UBLK_U_IO_COMMIT_AND_FETCH_REQ", ioCommitAndFetch, 0xc0107521},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, want %#x", c.name, c.got, c.want)
		}
	}
}

func unhex(t *testing.T, lines string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(lines), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStructuresAreTheKernels(t *testing.T) {
	dirty := func(n int) []byte { return bytes.Repeat([]byte{0xee}, n) }

	cmd := dirty(ctrlCmdSize)
	(&ctrlCmd{id: 7, len: 64, addr: 0x7f0011223344, data: 99}).put(cmd)
	if want := unhex(t, `07000000 ffff 4000 443322 11007f0000 6300000000000000 0000 0000 00000000`); !bytes.Equal(cmd, want) {
		t.Errorf("ublksrv_ctrl_cmd\n%x, want\n%x", cmd, want)
	}

	io := dirty(ioCmdSize)
	putIO(io, 3, 0x102, -5, 0x7f0000001000)
	if want := unhex(t, `0300 0201 fbffffff 00100000 007f0000`); !bytes.Equal(io, want) {
		t.Errorf("ublksrv_io_cmd\n%x, want\n%x", io, want)
	}

	info := Info{Queues: 2, Depth: 64, MaxIO: 128 << 10, ID: 5, Features: 0x458, Identity: 0x1122334455667788}
	b := dirty(devInfoSize)
	info.put(b)
	want := unhex(t, `0200 4000 0000 0000 00000200 05000000 00000000 00000000 5804000000000000 8877665544332211
		00000000 00000000 0000000000000000 0000000000000000`)
	if !bytes.Equal(b, want) {
		t.Errorf("ublksrv_ctrl_dev_info\n%x, want\n%x", b, want)
	}
	want[4], want[16] = 2, 0x39 // what the kernel fills in: the state, the server
	info.State, info.PID = Quiesced, 0x39
	if got := parseInfo(want); got != info {
		t.Errorf("read back as %+v, want %+v", got, info)
	}
}

func TestParams(t *testing.T) {
	p := Params{
		Size: 1 << 30, BlockSize: 512, PhysicalBlock: 4096, Chunk: 128 << 10, VolatileCache: true, MaxDiscard: 1 << 30, MaxZeroes: 32 << 20,
	}
	b := bytes.Repeat([]byte{0xee}, setSize)
	p.put(b, 64<<10)
	want := unhex(t, `3c000000 03000000
		0c000000 09 0c 0c 0c 80000000 00010000 0000200000000000 0000000000000000
		00000000 00100000 00002000 00000100 0100 0000`)
	if !bytes.Equal(b, want) {
		t.Errorf("ublk_params\n%x, want\n%x", b, want)
	}
	b = append(b, make([]byte, paramsSize-setSize)...)
	le.PutUint32(b[4:], 7)
	le.PutUint32(b[68:], 259)
	le.PutUint32(b[72:], 4)
	p.OptimalIO, p.DiscardUnit, p.Major, p.Minor = 4096, 4096, 259, 4
	if got := parseParams(b); got != p {
		t.Errorf("read back as %+v, want %+v", got, p)
	}

	plain := Params{Size: 4096 * 10, BlockSize: 4096, ReadOnly: true}
	plain.put(b, 4096)
	if got := parseParams(b); !got.ReadOnly || got.VolatileCache || got.MaxDiscard != 0 || got.BlockSize != 4096 || got.Size != plain.Size {
		t.Errorf("read back as %+v, want %+v", got, plain)
	}
	if le.Uint32(b[4:]) != paramBasic {
		t.Errorf("types %#x of a disk that cannot discard", le.Uint32(b[4:]))
	}
}

func TestDescriptor(t *testing.T) {
	got := parseDesc(unhex(t, `01200000 08000000 0010000000000000 0000000000000000`))
	if want := (ioDesc{op: opWrite, fua: true, sectors: 8, start: 0x1000}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
