package backend

import (
	"bytes"
	"strings"
	"testing"
)

// TestNVMeCharFormatOfAnother: a device that the host has formatted with other blocks is not erased: those that the slice had are others'.
func TestNVMeCharFormatOfAnother(t *testing.T) {
	d := newFakeChar()
	b := openFake(t, d, sliceSpec())
	pattern(d.data, 3)
	before := bytes.Clone(d.data)
	d.ns.LBAF[0].LBADS = 12
	b.happened(EventChanged)
	if err := b.Format(512); err == nil || !strings.Contains(err.Error(), "start hostmed again") {
		t.Error(err)
	}
	expect(t, d.data, before, "what another has")
}
