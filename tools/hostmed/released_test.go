package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestReleasedHasNoFaults: what breaks doorbell rules for tests is in no program that is built without its tag. With the tag it is, or this test would say nothing.
func TestReleasedHasNoFaults(t *testing.T) {
	tagged := filepath.Join(t.TempDir(), "hostmed")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-tags", "shadowbell_faults", "-o", tagged, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for path, want := range map[string]bool{hostmedBin: false, tagged: true} {
		program, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, mark := range []string{"SHADOWBELL_FAULTS", "sleep-anyway", "internal/broken.Break"} {
			if bytes.Contains(program, []byte(mark)) != want {
				t.Errorf("%s: %q is in it: %v", path, mark, !want)
			}
		}
	}
}
