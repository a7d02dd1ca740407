package backend

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const childEnv = "SHADOWBELL_BACKEND_TEST_CHILD"

// childWithoutURing runs in a process of its own, where io_uring_setup fails as under a container's
// seccomp profile, and prints what Open says.
func childWithoutURing() int {
	runtime.LockOSThread()
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 0, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x00050000 | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000},
	}
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	if _, _, e := unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&p))); e != 0 {
		panic(e)
	}
	_, err := Open(os.Getenv(childEnv))
	fmt.Println(err)
	return 0
}

func TestNoURingIsSaidAtOpenAndLeavesNoFile(t *testing.T) {
	path := filepath.Join(diskDir(t), "new.img")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=file:"+path+",size=1MiB")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.TrimSpace(string(out))
	for _, want := range []string{path, "io_uring", "seccomp"} {
		if !strings.Contains(text, want) || strings.Contains(text, "\n") {
			t.Errorf("%q does not say %q on one line", text, want)
		}
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file was left behind: %v", err)
	}
}
