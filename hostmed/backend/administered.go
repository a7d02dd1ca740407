package backend

import "github.com/shadowbell/shadowbell/shared/nvme"

// Administered is a Backend over an NVMe device that can be asked admin commands. What of a guest's gets there is the policy of
// package ctrl (docs/passthrough.md); the backend only carries.
type Administered interface {
	Backend
	// Device is what of the device may be used. It does not change.
	Device() *Device
	// Admin runs an admin command on the device, with data to it or from it as bits 0 and 1 of the opcode say, and returns when it is done, which
	// may take long. Any goroutine may call it, also while the backend is being closed: then it is an error. Of c, opcode, NSID, which is the
	// device's, and CDW10 to CDW15 get there.
	Admin(c *nvme.Command, data []byte) (dw0 uint32, status nvme.Status, err error)
}

// Device is an NVMe device under a namespace.
type Device struct {
	NSID       uint32                  // the device's number of the namespace
	Whole      bool                    // all of the device's namespace is this one
	Vendor     bool                    // the operator lets the guest send vendor specific admin commands
	Controller nvme.IdentifyController // what the device says of itself: not to be believed
	Effects    nvme.CommandEffects     // its Commands Supported and Effects log; zeroes if it has none
}
