package main

// qemuFails is what QEMU 11.1.3's nvme (one namespace, given by drive=) fails, and what it does instead of what the case demands. The table
// in docs/conformance.md is made of it: TestQEMUTable holds them together.
var qemuFails = map[string]string{
	"reg.aqa.reserved":                  "reserved bits of AQA keep what is written",
	"reg.asq.reserved":                  "bits 11:0 of ASQ and ACQ keep what is written",
	"state.function-reset":              "AQA, ASQ and ACQ survive a function level reset",
	"admin.identify.cns-00.copy-limits": "Copy is offered (ONCS bit 8), MSSRL and MCL are 0: no range can be copied",
	"admin.identify.cns-00.nsid-all":    "Invalid Namespace or Format, though OACS offers Namespace Management",
	"admin.identify.cns-03.descriptors": "the namespace has neither EUI64 nor NGUID nor UUID",
	"admin.identify.prp.unaligned":      "bits 1:0 of PRP1 are used: data goes to the odd address",
	"queue.delete.absent":               "Delete I/O CQ of a queue that is not there is Completion Queue Invalid (1/00h)",
	"feature.reset":                     "Asynchronous Event Configuration outlives a controller reset",
	"feature.select.default":            "Asynchronous Event Configuration is not its default after a reset",
	"feature.select.reserved":           "a reserved SEL reads the current value",
	"log.effects":                       "the effects log says that Verify is supported, ONCS that it is not",
	"log.firmware":                      "the active slot's revision is 1.0, FR of Identify the version of QEMU",
	"doorbell.shadow.live":              "a queue that was there before Doorbell Buffer Config is lost: no event index is written for it, so no doorbell wakes it up",
	"io.opcode.optional":                "Verify works, though ONCS does not offer it",
	"io.prp.unaligned":                  "bits 1:0 of PRP1 are used: data goes to the odd address",
	"io.sgl.segments":                   "Invalid SGL Segment Descriptor for a chain of three segments",
	"io.sgl.too-long":                   "a data block that is too long is taken, though SGLS does not offer it",
	"io.sgl.type":                       "a type that PCIe does not have is Invalid SGL Segment Descriptor",
	"namespace.delete.absent":           "Namespace Management is Invalid Command Opcode, though OACS offers it",
	"namespace.life":                    "Namespace Management is Invalid Command Opcode, though OACS offers it",
	"namespace.reserved-select":         "Namespace Management is Invalid Command Opcode, though OACS offers it",
}
