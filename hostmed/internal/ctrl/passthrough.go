package ctrl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Who answers a guest's admin commands where its namespace is of a real NVMe device: the policy, as tables from which docs/passthrough.md is made.
//
// Nothing goes to the device but by a rule here, and of that only where the guest has the namespace as a whole and the device's own
// Commands Supported and Effects log says that the command changes nothing beside what it is for. The log is the device's word, and
// the rules are ours: a device that says of every command that it is harmless gets no more of them.

// answerer is who answers a command.
type answerer uint8

const (
	byHostmed answerer = iota
	byDevice
	byNobody // Invalid Command Opcode
)

func (a answerer) String() string {
	return [...]string{"hostmed", "the device", "nobody"}[a]
}

// adminRule is the policy of an admin command.
type adminRule struct {
	op  uint8
	by  answerer
	why string
}

const ourQueues = "queues are hostmed's: the kernel or hostmed has the device's"

var adminRules = []adminRule{
	{nvme.AdminDeleteSQ, byHostmed, ourQueues},
	{nvme.AdminCreateSQ, byHostmed, ourQueues},
	{nvme.AdminGetLogPage, byHostmed, "log pages have a table of their own, below"},
	{nvme.AdminDeleteCQ, byHostmed, ourQueues},
	{nvme.AdminCreateCQ, byHostmed, ourQueues},
	{nvme.AdminIdentify, byHostmed, "a controller and namespaces of the guest's own, made of what the device says where that is the guest's business: block size, limits, optional commands"},
	{nvme.AdminAbort, byHostmed, "command identifiers are the guest's"},
	{nvme.AdminSetFeatures, byHostmed, "the device's features are its owner's: power, write cache, queues, thresholds; each guest has values of its own"},
	{nvme.AdminGetFeatures, byHostmed, "as above"},
	{nvme.AdminAsyncEventRequest, byHostmed, "the device's events are its driver's; the guest has those of its own controller"},
	{nvme.AdminNamespaceManagement, byHostmed, "in a subsystem with a pool, of namespaces in it; the device's would be the host's and other guests'"},
	{nvme.AdminFirmwareCommit, byNobody, "firmware is for all who use the device, and outlives the guest"},
	{nvme.AdminFirmwareDownload, byNobody, "as above"},
	{nvme.AdminDeviceSelfTest, byDevice, "it changes no data; short, extended and abort"},
	{nvme.AdminNamespaceAttachment, byHostmed, "as Namespace Management"},
	{nvme.AdminKeepAlive, byHostmed, "each controller has its own timer"},
	{nvme.AdminDirectiveSend, byNobody, "streams are a resource of the device that the host and other guests share"},
	{nvme.AdminDirectiveReceive, byNobody, "as above"},
	{nvme.AdminVirtualization, byNobody, "secondary controllers are the host's"},
	{nvme.AdminMISend, byNobody, "management of the whole device: reset, firmware, VPD"},
	{nvme.AdminMIReceive, byNobody, "as above"},
	{nvme.AdminCapacityManagement, byNobody, "capacity is the host's to divide"},
	{nvme.AdminLockdown, byNobody, "it would lock the host out"},
	{nvme.AdminDoorbellBufferConfig, byHostmed, "with shadow doorbells"},
	{nvme.AdminFabrics, byNobody, "there is no fabric"},
	{nvme.AdminFormatNVM, byHostmed, "in a subsystem: hostmed writes zeroes to the guest's blocks. The device's own Format NVM can reach all of its namespaces, and changes block sizes under the host's kernel"},
	{nvme.AdminSecuritySend, byNobody, "a password set by a guest would lock the device for everybody, and for ever"},
	{nvme.AdminSecurityReceive, byNobody, "as above"},
	{nvme.AdminSanitize, byNobody, "it erases the whole device"},
	{nvme.AdminGetLBAStatus, byHostmed, "blocks are the guest's"},
	{nvme.AdminDoorbellMemory2014, byHostmed, "with shadow doorbells"},
}

// firstVendorAdmin is the first vendor specific opcode. Those have one rule: nobody, or the device where the spec says vendor.
const firstVendorAdmin = 0xc0

// adminRuleOf returns the policy of op.
func adminRuleOf(op uint8) adminRule {
	for _, r := range adminRules {
		if r.op == op {
			return r
		}
	}
	if op >= firstVendorAdmin {
		return adminRule{op, byDevice, "only with the option `vendor`, which says that the operator knows what they do: nothing else does"}
	}
	return adminRule{op, byNobody, "not known"}
}

// logRule is the policy of a log page.
type logRule struct {
	lid nvme.LogPage
	by  string
	why string
}

var logRules = []logRule{
	{nvme.LogSMART, "both", "temperature, spare, percentage used, thermal times and critical warnings are the device's; counters of commands and bytes are this guest's. Also where the guest has a slice"},
	{nvme.LogSelfTest, "the device", "where Device Self-test goes there. Of other namespaces' results neither the namespace nor the block that failed is shown"},
}

// device returns the device whose namespace the guest has as a whole, and which therefore may hear more of the guest; or nil.
func (c *Controller) device() backend.Administered {
	if len(c.cfg.Namespaces) != 1 {
		return nil
	}
	if d := administered(&c.cfg.Namespaces[0]); d != nil && d.Device().Whole {
		return d
	}
	return nil
}

func administered(n *Namespace) backend.Administered {
	if n.Backend == nil {
		return nil
	}
	d, _ := backend.Plain(n.Backend).(backend.Administered)
	return d
}

// harmless says whether a device's Commands Supported and Effects entry is one of a command that is there and changes nothing for anybody.
func harmless(entry uint32) bool {
	const effects = nvme.EffectBlockContent | nvme.EffectNamespaceCap | nvme.EffectNamespaceList | nvme.EffectControllerCap | 7<<nvme.EffectExclusiveShift
	return entry&nvme.EffectSupported != 0 && entry&effects == 0
}

// passes says whether op goes to the device.
func (c *Controller) passes(op uint8) bool {
	d := c.device()
	if d == nil || adminRuleOf(op).by != byDevice {
		return false
	}
	dev := d.Device()
	switch {
	case !harmless(dev.Effects.Admin[op]):
		return false
	case op == nvme.AdminDeviceSelfTest:
		return dev.Controller.OACS&nvme.OACSSelfTest != 0
	}
	return dev.Vendor && dev.Controller.AVSCC&1 != 0 // their data is as long as they say
}

// passedOpcodes are those that go to the device.
func (c *Controller) passedOpcodes() (ops []uint8) {
	if c.device() == nil {
		return nil
	}
	for op := range 256 {
		if c.passes(uint8(op)) {
			ops = append(ops, uint8(op))
		}
	}
	return ops
}

// passOn sends a command for which passes holds to the device.
func (c *Controller) passOn(cmd *nvme.Command) result {
	d := c.device()
	dev := d.Device()
	to := nvme.Command{Opcode: cmd.Opcode}
	switch cmd.NSID {
	case 0:
	case c.cfg.Namespaces[0].NSID, nvme.NSIDAll:
		to.NSID = dev.NSID // of all the device's namespaces this is the guest's
	default:
		return c.notAttached(cmd.NSID)
	}
	var data []byte
	if cmd.Opcode == nvme.AdminDeviceSelfTest {
		switch code := cmd.CDW10 & 0xf; code {
		case selfTestShort, selfTestExtended, selfTestAbort:
			to.CDW10 = code
		default:
			return fail(nvme.StatusInvalidField, dword(10, 0), "no such self-test")
		}
	} else {
		var r result
		if data, r = c.vendorData(cmd); !r.status.OK() {
			return r
		}
		to.CDW10, to.CDW11, to.CDW12, to.CDW13, to.CDW14, to.CDW15 = cmd.CDW10, cmd.CDW11, cmd.CDW12, cmd.CDW13, cmd.CDW14, cmd.CDW15
	}
	saved := *cmd
	var answer result
	return c.background(cmd, func() (err error) {
		answer.dw0, answer.status, err = d.Admin(&to, data)
		return err
	}, func(err error) result {
		switch {
		case err != nil:
			return result{status: nvme.StatusInternalError, loc: nowhere, cause: "the device", err: err}
		case !answer.status.OK():
			answer.loc, answer.cause = nowhere, "the device says so"
		case cmdReads(saved.Opcode) && len(data) > 0:
			if r := c.toHost(&saved, data); !r.status.OK() {
				return r
			}
		}
		return answer
	})
}

// Values of STC of Device Self-test. NVMe Base 2.0c 5.9.
const (
	selfTestShort    = 1
	selfTestExtended = 2
	selfTestAbort    = 0xf
)

// cmdReads says whether an opcode moves data to the host: bits 1:0 are 10b.
func cmdReads(op uint8) bool { return op&3 == 2 }

// vendorData is the buffer for the data of a vendor specific command, filled if it goes to the device. NVMe Base 2.0c 3.3.3.1.
func (c *Controller) vendorData(cmd *nvme.Command) ([]byte, result) {
	n := uint64(cmd.CDW10) * 4
	switch {
	case cmd.Opcode&3 == 3:
		return nil, fail(nvme.StatusInvalidOpcode, inOpcode, "data both ways")
	case cmd.CDW11 != 0:
		return nil, fail(nvme.StatusInvalidField, dword(11, 0), "metadata of a vendor specific command")
	case cmd.Opcode&3 == 0 || n == 0:
		return nil, result{}
	case n > uint64(c.cfg.MDTSBytes):
		return nil, fail(nvme.StatusInvalidField, dword(10, 0), "NDT is more than MDTS")
	}
	data := make([]byte, n)
	if cmd.Opcode&3 == 1 {
		return data, c.fromHost(cmd, data)
	}
	return data, result{}
}

// readDeviceLog reads a log page of a device.
func readDeviceLog(d backend.Administered, lid nvme.LogPage, data []byte) error {
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(lid, nvme.NSIDAll, 0, uint64(len(data)), true); err != nil {
		return err
	}
	_, st, err := d.Admin(&cmd, data)
	if err == nil {
		err = st.Err()
	}
	if err != nil {
		return fmt.Errorf("%v of the device: %w", lid, err)
	}
	return nil
}

// hostDevices are those that the controller has namespaces of.
func (c *Controller) hostDevices() (ds []backend.Administered) {
	for i := range c.cfg.Namespaces {
		if d := administered(&c.cfg.Namespaces[i]); d != nil {
			ds = append(ds, d)
		}
	}
	return ds
}

// selfTestBytes is the size of log 06h: where a test is, and 20 results. NVMe Base 2.0c 5.16.1.7.
const (
	selfTestBytes   = 4 + 20*selfTestResult
	selfTestResult  = 28
	noSelfTestEntry = 0xf

	// In a result:
	selfTestValid = 2 // what of it is
	selfTestNSID  = 12
	selfTestSCT   = 24

	selfTestValidNSID = 1 << 0
	selfTestValidFLBA = 1 << 1
)

// deviceLog returns the work that log page lid needs of devices, and what is to be done with it on the session's goroutine; or nil.
func (c *Controller) deviceLog(lid nvme.LogPage) (work func() error, take func(error)) {
	switch lid {
	case nvme.LogSMART:
		ds := c.hostDevices()
		if len(ds) == 0 {
			return nil, nil
		}
		var h deviceHealth
		return func() error { return h.read(ds) }, func(err error) { c.takeHealth(&h, err) }
	case nvme.LogSelfTest:
		d := c.device()
		nsid := c.cfg.Namespaces[0].NSID
		page := make([]byte, selfTestBytes)
		return func() error {
				return readDeviceLog(d, nvme.LogSelfTest, page)
			}, func(err error) {
				if err != nil {
					page = nil
				}
				guestSelfTests(page, d.Device().NSID, nsid)
				c.health.selfTest = page
			}
	}
	return nil, nil
}

// guestSelfTests gives the results in a self-test log the guest's namespace id. Which block of somebody else's namespace has failed is not the guest's
// business.
func guestSelfTests(page []byte, from, to uint32) {
	for at := 4; at+selfTestResult <= len(page); at += selfTestResult {
		x := page[at:][:selfTestResult]
		switch nsid := binary.LittleEndian.Uint32(x[selfTestNSID:]); {
		case x[0]&0xf == noSelfTestEntry:
			clear(x[1:])
		case nsid == from:
			binary.LittleEndian.PutUint32(x[selfTestNSID:], to)
		default:
			x[selfTestValid] &^= selfTestValidNSID | selfTestValidFLBA
			clear(x[selfTestNSID:selfTestSCT]) // and FLBA
		}
	}
}

// deviceHealth is what the SMART logs of the devices under a controller say, the worst of them.
type deviceHealth struct {
	known bool
	log   nvme.SMARTLog
}

// read asks the devices.
func (h *deviceHealth) read(ds []backend.Administered) error {
	var errs []error
	for _, d := range ds {
		var l nvme.SMARTLog
		if err := readDeviceLog(d, nvme.LogSMART, l.Bytes()[:]); err != nil {
			errs = append(errs, err)
			continue
		}
		h.add(&l)
	}
	return errors.Join(errs...)
}

// deviceWarnings are those critical warnings that are the device's to give: the temperature's are by the guest's own thresholds.
const deviceWarnings = nvme.SMARTWarningSpare | nvme.SMARTWarningReliability | nvme.SMARTWarningReadOnly | nvme.SMARTWarningBackup

// temperatures in kelvin that a device can have: others are nonsense, and are not shown.
const (
	coldest = 150
	hottest = 600
)

func sane(kelvin uint16) uint16 {
	if kelvin < coldest || kelvin > hottest {
		return 0
	}
	return kelvin
}

// add takes l into account.
func (h *deviceHealth) add(l *nvme.SMARTLog) {
	w := &h.log
	if !h.known {
		h.known = true
		w.AvailableSpare = 100
	}
	w.CriticalWarning |= l.CriticalWarning & deviceWarnings
	w.SetTemperature(max(w.Temperature(), sane(l.Temperature())))
	if l.AvailableSpare <= w.AvailableSpare {
		w.AvailableSpare, w.SpareThreshold = l.AvailableSpare, min(l.SpareThreshold, 100)
	}
	w.PercentageUsed = max(w.PercentageUsed, l.PercentageUsed)
	w.WarningMinutes = max(w.WarningMinutes, l.WarningMinutes)
	w.CriticalMinutes = max(w.CriticalMinutes, l.CriticalMinutes)
	for i, k := range l.TempSensor {
		w.TempSensor[i] = max(w.TempSensor[i], sane(k))
	}
	w.ThermalCount1, w.ThermalCount2 = max(w.ThermalCount1, l.ThermalCount1), max(w.ThermalCount2, l.ThermalCount2)
	w.ThermalSeconds1, w.ThermalSeconds2 = max(w.ThermalSeconds1, l.ThermalSeconds1), max(w.ThermalSeconds2, l.ThermalSeconds2)
}

// takeHealth shows what the devices said. Of those that did not answer it keeps what they said before.
func (c *Controller) takeHealth(h *deviceHealth, err error) {
	if err != nil && !c.health.silent {
		c.log.warn("the health of a device of the host's", "error", err)
	}
	c.health.silent = err != nil
	if h.known {
		c.health.device = *h
	}
	if c.ready {
		c.checkHealth()
	}
}
