package nvme

import (
	"testing"
	"unsafe"
)

// The offsets are those of the specification's figures, in bytes.
func TestLayout(t *testing.T) {
	var (
		sqe Command
		cqe Completion
		ctl IdentifyController
		ns  IdentifyNamespace
		ind IdentifyIndependentNamespace
		nvm IdentifyControllerNVM
		psd PowerState
		smt SMARTLog
		erl ErrorLogEntry
		fws FirmwareSlotLog
		eff CommandEffects
		dsm DSMRange
		lba LBAFormat
		tel TelemetryHeader
		sgl SGLDescriptor
		cpy CopyRange
	)
	tests := []struct {
		name      string
		got, want uintptr
	}{
		{"TELEMETRY.IEEE", unsafe.Offsetof(tel.IEEE), 5},
		{"TELEMETRY.LastBlock1", unsafe.Offsetof(tel.LastBlock1), 8},
		{"TELEMETRY.LastBlock4", unsafe.Offsetof(tel.LastBlock4), 16},
		{"TELEMETRY.HostScope", unsafe.Offsetof(tel.HostScope), 380},
		{"TELEMETRY.HostOrScope", unsafe.Offsetof(tel.HostOrScope), 381},
		{"TELEMETRY.Available", unsafe.Offsetof(tel.Available), 382},
		{"TELEMETRY.Generation", unsafe.Offsetof(tel.Generation), 383},
		{"TELEMETRY.Reason", unsafe.Offsetof(tel.Reason), 384},
		{"SQE.CID", unsafe.Offsetof(sqe.CID), 2},
		{"SQE.NSID", unsafe.Offsetof(sqe.NSID), 4},
		{"SQE.CDW2", unsafe.Offsetof(sqe.CDW2), 8},
		{"SQE.MPTR", unsafe.Offsetof(sqe.MPTR), 16},
		{"SQE.PRP1", unsafe.Offsetof(sqe.PRP1), 24},
		{"SQE.PRP2", unsafe.Offsetof(sqe.PRP2), 32},
		{"SQE.CDW10", unsafe.Offsetof(sqe.CDW10), 40},
		{"SQE.CDW15", unsafe.Offsetof(sqe.CDW15), 60},
		{"Copy.SLBA", unsafe.Offsetof(cpy.SLBA), 8},
		{"Copy.NLB", unsafe.Offsetof(cpy.NLB), 16},
		{"Copy.EILBRT", unsafe.Offsetof(cpy.EILBRT), 24},
		{"SGL.Length", unsafe.Offsetof(sgl.Length), 8},
		{"SGL.ID", unsafe.Offsetof(sgl.ID), 15},
		{"CQE.SQHead", unsafe.Offsetof(cqe.SQHead), 8},
		{"CQE.SQID", unsafe.Offsetof(cqe.SQID), 10},
		{"CQE.CID", unsafe.Offsetof(cqe.CID), 12},
		{"CQE.StatusPhase", unsafe.Offsetof(cqe.StatusPhase), 14},

		{"ID.SSVID", unsafe.Offsetof(ctl.SSVID), 2},
		{"ID.SN", unsafe.Offsetof(ctl.SN), 4},
		{"ID.MN", unsafe.Offsetof(ctl.MN), 24},
		{"ID.FR", unsafe.Offsetof(ctl.FR), 64},
		{"ID.RAB", unsafe.Offsetof(ctl.RAB), 72},
		{"ID.IEEE", unsafe.Offsetof(ctl.IEEE), 73},
		{"ID.CMIC", unsafe.Offsetof(ctl.CMIC), 76},
		{"ID.MDTS", unsafe.Offsetof(ctl.MDTS), 77},
		{"ID.CNTLID", unsafe.Offsetof(ctl.CNTLID), 78},
		{"ID.VER", unsafe.Offsetof(ctl.VER), 80},
		{"ID.RTD3R", unsafe.Offsetof(ctl.RTD3R), 84},
		{"ID.OAES", unsafe.Offsetof(ctl.OAES), 92},
		{"ID.CTRATT", unsafe.Offsetof(ctl.CTRATT), 96},
		{"ID.RRLS", unsafe.Offsetof(ctl.RRLS), 100},
		{"ID.CNTRLTYPE", unsafe.Offsetof(ctl.CNTRLTYPE), 111},
		{"ID.FGUID", unsafe.Offsetof(ctl.FGUID), 112},
		{"ID.CRDT1", unsafe.Offsetof(ctl.CRDT1), 128},
		{"ID.NVMSR", unsafe.Offsetof(ctl.NVMSR), 253},
		{"ID.MEC", unsafe.Offsetof(ctl.MEC), 255},
		{"ID.OACS", unsafe.Offsetof(ctl.OACS), 256},
		{"ID.ACL", unsafe.Offsetof(ctl.ACL), 258},
		{"ID.AERL", unsafe.Offsetof(ctl.AERL), 259},
		{"ID.FRMW", unsafe.Offsetof(ctl.FRMW), 260},
		{"ID.LPA", unsafe.Offsetof(ctl.LPA), 261},
		{"ID.ELPE", unsafe.Offsetof(ctl.ELPE), 262},
		{"ID.NPSS", unsafe.Offsetof(ctl.NPSS), 263},
		{"ID.WCTEMP", unsafe.Offsetof(ctl.WCTEMP), 266},
		{"ID.HMPRE", unsafe.Offsetof(ctl.HMPRE), 272},
		{"ID.TNVMCAP", unsafe.Offsetof(ctl.TNVMCAP), 280},
		{"ID.UNVMCAP", unsafe.Offsetof(ctl.UNVMCAP), 296},
		{"ID.RPMBS", unsafe.Offsetof(ctl.RPMBS), 312},
		{"ID.KAS", unsafe.Offsetof(ctl.KAS), 320},
		{"ID.SANICAP", unsafe.Offsetof(ctl.SANICAP), 328},
		{"ID.ENDGIDMAX", unsafe.Offsetof(ctl.ENDGIDMAX), 340},
		{"ID.ANAGRPMAX", unsafe.Offsetof(ctl.ANAGRPMAX), 344},
		{"ID.PELS", unsafe.Offsetof(ctl.PELS), 352},
		{"ID.DOMAINID", unsafe.Offsetof(ctl.DOMAINID), 356},
		{"ID.MEGCAP", unsafe.Offsetof(ctl.MEGCAP), 368},
		{"ID.SQES", unsafe.Offsetof(ctl.SQES), 512},
		{"ID.CQES", unsafe.Offsetof(ctl.CQES), 513},
		{"ID.MAXCMD", unsafe.Offsetof(ctl.MAXCMD), 514},
		{"ID.NN", unsafe.Offsetof(ctl.NN), 516},
		{"ID.ONCS", unsafe.Offsetof(ctl.ONCS), 520},
		{"ID.FUSES", unsafe.Offsetof(ctl.FUSES), 522},
		{"ID.FNA", unsafe.Offsetof(ctl.FNA), 524},
		{"ID.VWC", unsafe.Offsetof(ctl.VWC), 525},
		{"ID.AWUN", unsafe.Offsetof(ctl.AWUN), 526},
		{"ID.AWUPF", unsafe.Offsetof(ctl.AWUPF), 528},
		{"ID.ACWU", unsafe.Offsetof(ctl.ACWU), 532},
		{"ID.SGLS", unsafe.Offsetof(ctl.SGLS), 536},
		{"ID.MNAN", unsafe.Offsetof(ctl.MNAN), 540},
		{"ID.MAXDNA", unsafe.Offsetof(ctl.MAXDNA), 544},
		{"ID.MAXCNA", unsafe.Offsetof(ctl.MAXCNA), 560},
		{"ID.SUBNQN", unsafe.Offsetof(ctl.SUBNQN), 768},
		{"ID.IOCCSZ", unsafe.Offsetof(ctl.IOCCSZ), 1792},
		{"ID.OFCS", unsafe.Offsetof(ctl.OFCS), 1804},
		{"ID.PSD", unsafe.Offsetof(ctl.PSD), 2048},
		{"ID.VendorSpecific", unsafe.Offsetof(ctl.VendorSpecific), 3072},
		{"PSD.Flags", unsafe.Offsetof(psd.Flags), 3},
		{"PSD.ENLAT", unsafe.Offsetof(psd.ENLAT), 4},
		{"PSD.RRT", unsafe.Offsetof(psd.RRT), 12},
		{"PSD.IDLP", unsafe.Offsetof(psd.IDLP), 16},
		{"PSD.ACTP", unsafe.Offsetof(psd.ACTP), 20},
		{"PSD.APWS", unsafe.Offsetof(psd.APWS), 22},
		{"IDNVM.DMRL", unsafe.Offsetof(nvm.DMRL), 3},
		{"IDNVM.DMRSL", unsafe.Offsetof(nvm.DMRSL), 4},
		{"IDNVM.DMSL", unsafe.Offsetof(nvm.DMSL), 8},

		{"NS.NUSE", unsafe.Offsetof(ns.NUSE), 16},
		{"NS.NSFEAT", unsafe.Offsetof(ns.NSFEAT), 24},
		{"NS.NLBAF", unsafe.Offsetof(ns.NLBAF), 25},
		{"NS.FLBAS", unsafe.Offsetof(ns.FLBAS), 26},
		{"NS.NMIC", unsafe.Offsetof(ns.NMIC), 30},
		{"NS.DLFEAT", unsafe.Offsetof(ns.DLFEAT), 33},
		{"NS.NAWUN", unsafe.Offsetof(ns.NAWUN), 34},
		{"NS.NOIOB", unsafe.Offsetof(ns.NOIOB), 46},
		{"NS.NVMCAP", unsafe.Offsetof(ns.NVMCAP), 48},
		{"NS.NPWG", unsafe.Offsetof(ns.NPWG), 64},
		{"NS.NPDG", unsafe.Offsetof(ns.NPDG), 68},
		{"NS.NOWS", unsafe.Offsetof(ns.NOWS), 72},
		{"NS.MSSRL", unsafe.Offsetof(ns.MSSRL), 74},
		{"NS.MCL", unsafe.Offsetof(ns.MCL), 76},
		{"NS.MSRC", unsafe.Offsetof(ns.MSRC), 80},
		{"NS.ANAGRPID", unsafe.Offsetof(ns.ANAGRPID), 92},
		{"NS.NSATTR", unsafe.Offsetof(ns.NSATTR), 99},
		{"NS.NVMSETID", unsafe.Offsetof(ns.NVMSETID), 100},
		{"NS.NGUID", unsafe.Offsetof(ns.NGUID), 104},
		{"NS.EUI64", unsafe.Offsetof(ns.EUI64), 120},
		{"NS.LBAF", unsafe.Offsetof(ns.LBAF), 128},
		{"NS.VendorSpecific", unsafe.Offsetof(ns.VendorSpecific), 384},
		{"LBAF.LBADS", unsafe.Offsetof(lba.LBADS), 2},
		{"IND.ANAGRPID", unsafe.Offsetof(ind.ANAGRPID), 4},
		{"IND.NSATTR", unsafe.Offsetof(ind.NSATTR), 8},
		{"IND.NVMSETID", unsafe.Offsetof(ind.NVMSETID), 10},
		{"IND.NSTAT", unsafe.Offsetof(ind.NSTAT), 14},

		{"SMART.compositeTemp", unsafe.Offsetof(smt.compositeTemp), 1},
		{"SMART.AvailableSpare", unsafe.Offsetof(smt.AvailableSpare), 3},
		{"SMART.DataUnitsRead", unsafe.Offsetof(smt.DataUnitsRead), 32},
		{"SMART.HostReads", unsafe.Offsetof(smt.HostReads), 64},
		{"SMART.BusyMinutes", unsafe.Offsetof(smt.BusyMinutes), 96},
		{"SMART.PowerOnHours", unsafe.Offsetof(smt.PowerOnHours), 128},
		{"SMART.ErrorLogEntries", unsafe.Offsetof(smt.ErrorLogEntries), 176},
		{"SMART.WarningMinutes", unsafe.Offsetof(smt.WarningMinutes), 192},
		{"SMART.TempSensor", unsafe.Offsetof(smt.TempSensor), 200},
		{"SMART.ThermalSeconds2", unsafe.Offsetof(smt.ThermalSeconds2), 228},
		{"ERR.StatusRaw", unsafe.Offsetof(erl.StatusRaw), 12},
		{"ERR.Location", unsafe.Offsetof(erl.Location), 14},
		{"ERR.LBA", unsafe.Offsetof(erl.LBA), 16},
		{"ERR.NSID", unsafe.Offsetof(erl.NSID), 24},
		{"ERR.VendorLog", unsafe.Offsetof(erl.VendorLog), 28},
		{"ERR.CmdInfo", unsafe.Offsetof(erl.CmdInfo), 32},
		{"ERR.TrInfo", unsafe.Offsetof(erl.TrInfo), 40},
		{"FW.Slot", unsafe.Offsetof(fws.Slot), 8},
		{"EFF.IO", unsafe.Offsetof(eff.IO), 1024},
		{"DSM.Length", unsafe.Offsetof(dsm.Length), 4},
		{"DSM.SLBA", unsafe.Offsetof(dsm.SLBA), 8},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s is at byte %d, want %d", tt.name, tt.got, tt.want)
		}
	}
}
