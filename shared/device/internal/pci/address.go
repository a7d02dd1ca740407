// Package pci is what the ways to a PCI function have in common: addresses, the registers of BAR0 as this process sees them, and
// memory that stays where it is. It opens no function.
package pci

import (
	"fmt"
	"regexp"
	"strings"
)

// Of the configuration space: PCI Local Bus 3.0 6.1.
const (
	RegVendor  = 0x00
	RegCommand = 0x04

	CommandMemory      = 1 << 1
	CommandBusMaster   = 1 << 2
	CommandINTxDisable = 1 << 10
)

const (
	// Devices is where Linux shows its functions.
	Devices = "/sys/bus/pci/devices"
	// ClassNVMe is the class code of an NVM Express controller: NVMe over PCIe Transport 1.0c 3.1.1.
	ClassNVMe = 0x010802
	// MaxBAR0 bounds what a function may say of BAR0.
	MaxBAR0 = 1 << 24
)

var address = regexp.MustCompile(`^([0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]$`)

// ParseAddress returns the address of a function as sysfs has it, 0000:00:04.0. 00:04.0 is in domain 0.
func ParseAddress(s string) (string, error) {
	a := strings.ToLower(s)
	if !address.MatchString(a) {
		return "", fmt.Errorf("PCI address %q: want one such as 0000:00:04.0 or 00:04.0", s)
	}
	if strings.Count(a, ":") == 1 {
		a = "0000:" + a
	}
	return a, nil
}
