package devices

import (
	"context"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/shared/device/pcifn"
)

func TestNamesThatAreNone(t *testing.T) {
	for name, says := range map[string]string{
		"":                          "unknown kind",
		"/run/x.sock":               "unknown kind",
		"vfio-user:":                "unknown kind",
		"pci:disk":                  "want one such as",
		"pci:0000:ff:1f.7":          "no such PCI function",
		"sysfs:0000:ff:1f.7":        "no such PCI function",
		"vfio:0000:ff:1f.7":         "no such PCI function",
		"vfio:0000:ff:1f.7,noiommu": "no such PCI function",
		"vfio:0000:ff:1f.7,fast":    `option "fast"`,
	} {
		dev, err := Open(context.Background(), name)
		if dev != nil || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, %v; want %q", name, dev, err, says)
		}
	}
}

func TestTheWayThatIsChosen(t *testing.T) {
	const at = "0000:00:03.0"
	for _, tc := range []struct {
		f    pcifn.Function
		want string // or what the error says
	}{
		{pcifn.Function{Driver: "nvme"}, "guestdrv bind " + at},
		{pcifn.Function{Driver: "nvme", Group: "7", GroupType: "DMA"}, "guestdrv bind " + at},
		{pcifn.Function{Driver: "vfio-pci", Group: "7", GroupType: "unmanaged"}, "vfio:" + at},
		{pcifn.Function{Driver: "vfio-pci", Group: "0", NoIOMMU: true}, "vfio:" + at + ",noiommu"},
		{pcifn.Function{}, "sysfs:" + at},
		{pcifn.Function{Group: "7", GroupType: "identity"}, "sysfs:" + at},
		{pcifn.Function{Group: "7", GroupType: "DMA-FQ"}, "an IOMMU translates"},
	} {
		tc.f.Address = at
		name, why, err := Way(&tc.f)
		if err == nil && (name != tc.want || why == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %q, %q, %v; want %q", tc.f, name, why, err, tc.want)
		}
		if err == nil && !OnThisMachine(name) {
			t.Errorf("%s is not on this machine", name)
		}
	}
	if OnThisMachine("vfio-user:/x") {
		t.Error("a socket is hardware")
	}
}
